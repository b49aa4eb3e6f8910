"""Images in files, decoded in worker processes while the model trains.

What a sample looks like in an epoch (where it is cropped, whether it is flipped) is drawn from the seed, the epoch and
the sample's index alone. So a resumed run sees the same bits as one that was never stopped, whatever the number of
workers then and now; only another version of this package, Pillow or torchvision could find other files, or decode or
scale an image to other bits.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..extras import require_torchvision
from .augmentation import NO_AUGMENTATION, Augmentation
from .decoding import PURPOSE, Transform, read_picture
from .images import Batch, Images, check_groups
from .randomness import derived_seed

CPU = torch.device("cpu")
_DECODED_AT_A_TIME = 256


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """One split on the disk; ``Images`` is what it becomes when samples are taken.

    Attributes:
        paths: (N,), the files as bytes in one array: a list of as many strings would be copied, page by page, into
            every worker as it counts references.
        targets: (N,), int64 in [0, classes), on the CPU.
        class_names: in the order of the class indices.
        image_size: height and width of what is given out.
        transform: makes bytes (3, image_size, image_size) of a Pillow image in RGB, and raises ValueError where it
            cannot; no randomness.
        workers: processes that decode; 0: this one does.
        groups_of_samples: (N,), int64, on the CPU; None where the data have no groups.
        group_names: see ``Split``.
        device: where samples are given out.

    Raises:
        ValueError: groups without names, names without groups, or another number of groups than of targets.
    """

    paths: np.ndarray
    targets: Tensor
    class_names: tuple[str, ...]
    image_size: int
    transform: Transform
    workers: int
    groups_of_samples: Tensor | None = None
    group_names: tuple[str, ...] | None = None
    device: torch.device = CPU

    index_device = CPU

    def __post_init__(self) -> None:
        check_groups(len(self.targets), self.groups_of_samples, self.group_names)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def labels(self) -> Tensor:
        return self.targets.to(self.device)

    @property
    def groups(self) -> Tensor | None:
        return None if self.groups_of_samples is None else self.groups_of_samples.to(self.device)

    def to(self, device: torch.device | str) -> ImageFiles:
        """The same split, whose samples are given out on a device."""
        return dataclasses.replace(self, device=torch.device(device))

    def select(self, indices: Tensor) -> ImageFiles:
        """The samples at ``indices`` (K,), in that order, still on the disk."""
        groups = None if self.groups_of_samples is None else self.groups_of_samples[indices]
        return dataclasses.replace(
            self, paths=self.paths[indices.numpy()], targets=self.targets[indices], groups_of_samples=groups
        )

    def take(self, indices: Tensor) -> Images:
        """The samples at ``indices`` (K,), in that order, in memory; never augmented."""
        here = dataclasses.replace(self, workers=0)  # one batch goes to one worker, and a worker takes time to start
        images, labels = next(here.batches([Batch(indices)]))
        groups = None if self.groups_of_samples is None else self.groups_of_samples[indices].to(self.device)
        return Images(images, labels, None, self.classes, self.class_names, groups, self.group_names)

    def in_memory(self) -> Images:
        """All samples, decoded: for sets of small images, which are then augmented on the device."""
        images = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8, device=self.device)
        chunks = images.split(_DECODED_AT_A_TIME)
        batches = map(Batch, torch.arange(len(self)).split(_DECODED_AT_A_TIME))
        for chunk, (decoded, _) in zip(chunks, self.batches(batches), strict=True):
            chunk.copy_(decoded)
        return Images(images, self.labels, None, self.classes, self.class_names, self.groups, self.group_names)

    def batches(
        self, batches: Iterable[Batch], augmentation: Augmentation = NO_AUGMENTATION
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (K, 3, H, W), bytes, and labels (K,) of each batch, decoded ahead by the workers.

        Raises:
            ValueError: a file is no image that can be read.
        """
        loader = DataLoader(
            _Decoded(self, augmentation.resized_crop),
            batch_sampler=_keys(batches),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_interrupts_to_the_parent,
            generator=torch.Generator(),  # else it draws from the global one, which dropout needs undisturbed
        )
        for decoded in loader:
            if isinstance(decoded, Exception):
                raise decoded
            images, labels, batch = decoded
            images = augmentation(images.to(self.device, non_blocking=True), *batch)
            yield images, labels.to(self.device, non_blocking=True)


def image_files(
    paths: Sequence[Path | str],
    targets: Sequence[int],
    class_names: Sequence[str],
    image_size: int,
    transform: Transform,
    workers: int | None,
    groups: Sequence[int] | None = None,
    group_names: Sequence[str] | None = None,
) -> ImageFiles:
    """Image files of plain lists; ``workers`` None: one for each core that this process may run on."""
    return ImageFiles(
        np.array([os.fsencode(path) for path in paths], dtype=np.bytes_),
        torch.tensor(targets, dtype=torch.int64),
        tuple(class_names),
        image_size,
        transform,
        usable_cores() if workers is None else workers,
        None if groups is None else torch.tensor(groups, dtype=torch.int64),
        None if group_names is None else tuple(group_names),
    )


def middle_crop(image_size: int) -> Transform:
    """The middle image_size × image_size pixels once the shorter side is scaled to 256/224 of it: ImageNet's usual."""
    transforms = require_torchvision("torchvision.transforms", PURPOSE)
    resized = transforms.Resize(round(image_size * 256 / 224))
    composed: Transform = transforms.Compose([resized, transforms.CenterCrop(image_size), transforms.PILToTensor()])
    return composed


def stretched(image_size: int, *, middle: int | None = None) -> Transform:
    """The whole image, or its middle ``middle`` × ``middle`` pixels, scaled to image_size × image_size."""
    transforms = require_torchvision("torchvision.transforms", PURPOSE)
    changes = [] if middle is None else [transforms.CenterCrop(middle)]
    composed: Transform = transforms.Compose(
        [*changes, transforms.Resize((image_size, image_size)), transforms.PILToTensor()]
    )
    return composed


def _resized_crop(image_size: int) -> Transform:
    """A random part and a random flip, as is usual for training on ImageNet."""
    transforms = require_torchvision("torchvision.transforms", PURPOSE)
    changes = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    composed: Transform = transforms.Compose(changes)
    return composed


def _keys(batches: Iterable[Batch]) -> Iterator[list[tuple[int, int, int]]]:
    for batch in batches:
        yield [(batch.seed, batch.epoch, index) for index in batch.indices.tolist()]


def _as_it_is(decoded: Any) -> Any:
    return decoded


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training finishes its step, and needs the workers for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Decoded(Dataset[Any]):
    """What the workers hold. Its items are whole batches, keyed by (seed, epoch, index)."""

    def __init__(self, files: ImageFiles, resized_crop: bool) -> None:
        self._paths, self._targets, self._size = files.paths, files.targets, files.image_size
        self._transform = _resized_crop(files.image_size) if resized_crop else files.transform

    def __getitem__(self, key: tuple[int, int, int]) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(derived_seed(*key))
            return read_picture(os.fsdecode(self._paths[key[2]]), self._transform)

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Batch] | ValueError:
        try:
            images = [self[key] for key in keys]
        except ValueError as error:  # as a value: raised in a worker, it would come back with two tracebacks in it
            return ValueError(str(error))
        indices = torch.tensor([index for _, _, index in keys], dtype=torch.int64)
        if not keys:
            return torch.empty(0, 3, self._size, self._size, dtype=torch.uint8), self._targets[indices], Batch(indices)
        return torch.stack(images), self._targets[indices], Batch(indices, *keys[0][:2])


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
