"""Images in folders, one folder a class, decoded in worker processes while the model trains.

What a sample looks like in an epoch (where it is cropped, whether it is flipped) is drawn from the seed, the epoch and
the sample's index alone. So a resumed run sees the same bits as one that was never stopped, whatever the number of
workers then and now; only another version of Pillow or torchvision could decode or scale an image to others.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..extras import require, require_torchvision
from .images import Batch, Images, Splits, derived_seed

_FOLDERS = ("train", "val", "test")
CPU = torch.device("cpu")
_PURPOSE = "a folder of images"


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """One split on the disk; ``Images`` is what it becomes when samples are taken.

    Attributes:
        paths: (N,), the files as bytes in one array: a list of as many strings would be copied, page by page, into
            every worker as it counts references.
        targets: (N,), int64 in [0, classes), on the CPU.
        class_names: the folders' names, in the order of the class indices.
        image_size: height and width of what is given out.
        augment: crop and flip at random, rather than resize and crop the middle.
        workers: processes that decode; 0: this one does.
        device: where samples are given out.
    """

    paths: np.ndarray
    targets: Tensor
    class_names: tuple[str, ...]
    image_size: int
    augment: bool
    workers: int
    device: torch.device = CPU

    index_device = CPU

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def labels(self) -> Tensor:
        return self.targets.to(self.device)

    def to(self, device: torch.device | str) -> ImageFiles:
        """The same split, whose samples are given out on a device."""
        return dataclasses.replace(self, device=torch.device(device))

    def take(self, indices: Tensor) -> Images:
        """The samples at ``indices`` (K,), in that order, in memory."""
        here = dataclasses.replace(self, workers=0)  # one batch goes to one worker, and a worker takes time to start
        images, labels = next(here.batches([Batch(indices)]))
        return Images(images, labels, None, self.classes)

    def batches(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (K, 3, H, W), bytes, and labels (K,) of each batch, decoded ahead by the workers.

        Raises:
            ValueError: a file is no image that can be read.
        """
        loader = DataLoader(
            _Decoded(self),
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
            images, labels = decoded
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


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

    def __init__(self, files: ImageFiles) -> None:
        self._paths, self._targets = files.paths, files.targets
        self._transform = _transform(files.image_size, files.augment)

    def __getitem__(self, key: tuple[int, int, int]) -> Tensor:
        path = os.fsdecode(self._paths[key[2]])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(derived_seed(*key))
            try:
                with require("PIL.Image", _PURPOSE).open(path) as image:
                    return self._transform(image.convert("RGB"))
            except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises, by the format
                raise ValueError(f"{path} cannot be read as an image ({error}); replace or remove it") from error

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor] | ValueError:
        try:
            images = torch.stack([self[key] for key in keys])
        except ValueError as error:  # as a value: raised in a worker, it would come back with two tracebacks in it
            return ValueError(str(error))
        return images, self._targets[[index for _, _, index in keys]]


def _transform(image_size: int, augment: bool) -> Callable[[Any], Tensor]:
    """From a Pillow image to bytes (3, image_size, image_size), as is usual for ImageNet."""
    transforms = require_torchvision("torchvision.transforms", _PURPOSE)
    if augment:
        changes = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()]
    else:
        changes = [transforms.Resize(round(image_size * 256 / 224)), transforms.CenterCrop(image_size)]
    composed: Callable[[Any], Tensor] = transforms.Compose([*changes, transforms.PILToTensor()])
    return composed


def load(root: str | Path, image_size: int, workers: int | None) -> Splits:
    """The splits under ``root``: ``train/CLASS/*.jpg``, ``val/CLASS/*.jpg`` and, if it is there, ``test/CLASS/*.jpg``.

    Args:
        root: the folder.
        image_size: height and width of the images that are given out.
        workers: processes that decode; None: as many as there are cores to run on; 0: none besides this one.

    Returns:
        ImageFiles; the test split is empty where there is no ``test``.

    Raises:
        FileNotFoundError: root, train or val is missing, or a class has no images.
        ValueError: val or test has other classes than train.
        ImportError: torchvision is not installed.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"the data root {root} is not a folder; expected one that holds train and val")
    folders = {name: root / name for name in _FOLDERS}
    absent = [name for name in ("train", "val") if not folders[name].is_dir()]
    if absent:
        raise FileNotFoundError(
            f"{root} holds no folder {' and no folder '.join(absent)}; expected train/CLASS and val/CLASS, with the "
            "images of each class in a folder of its name"
        )
    workers = usable_cores() if workers is None else workers
    make = functools.partial(ImageFiles, image_size=image_size, workers=workers)
    train = make(*_listed(folders["train"]), augment=True)
    validation = make(*_listed(folders["val"]), augment=False)
    test = make(*_listed(folders["test"]), augment=False) if folders["test"].is_dir() else _without_samples(validation)
    for name, split in (("val", validation), ("test", test)):
        _check_same_classes(root, train, name, split)
    return Splits(train, validation, test)


def _listed(folder: Path) -> tuple[np.ndarray, Tensor, tuple[str, ...]]:
    """The files, targets and class names of a folder."""
    datasets = require_torchvision("torchvision.datasets", _PURPOSE)
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise FileNotFoundError(f"{folder} holds no folders; expected one for each class, with its images in it")
    found = datasets.ImageFolder(str(folder), allow_empty=True)
    targets = torch.tensor(found.targets, dtype=torch.int64)
    counts = torch.bincount(targets, minlength=len(found.classes)).tolist()
    empty = [name for name, count in zip(found.classes, counts, strict=True) if count == 0]
    if empty:
        raise FileNotFoundError(
            f"{folder} holds no images of {_few(empty)}; expected files ending in {', '.join(found.extensions)}"
        )
    paths = np.array([os.fsencode(path) for path, _ in found.samples])
    return paths, targets, tuple(found.classes)


def _without_samples(split: ImageFiles) -> ImageFiles:
    return dataclasses.replace(split, paths=split.paths[:0], targets=split.targets[:0])


def _check_same_classes(root: Path, train: ImageFiles, name: str, split: ImageFiles) -> None:
    missing = sorted(set(train.class_names) - set(split.class_names))
    unknown = sorted(set(split.class_names) - set(train.class_names))
    faults = [f"{name} lacks {_few(missing)}"] * bool(missing) + [f"train lacks {_few(unknown)}"] * bool(unknown)
    if faults:
        raise ValueError(f"the classes under {root} differ: {'; '.join(faults)}. Each needs the same folders")


def _few(names: list[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
