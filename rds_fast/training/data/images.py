"""Images held in memory, and the three splits of a data set."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .augmentation import NO_AUGMENTATION, Augmentation

BLOCK = 28  # the height and width of each of the two blocks of BlockMNIST


class Batch(NamedTuple):
    """The samples of one step: their indices (K,), and what decides the random changes that are made to them."""

    indices: Tensor
    seed: int = 0
    epoch: int = 0


class Split(Protocol):
    """One split of a data set, in memory (``Images``) or on the disk (``ImageFiles``).

    Attributes:
        labels: (N,), int64 in [0, classes).
        classes: how many there are.
        class_names: what they are called, where that is known.
        groups: (N,), int64 in [0, len(group_names)): the part of the population that a sample belongs to, which
            accuracy is to be compared over; None where the data have none.
        group_names: what they are called; None where there are none.
        index_device: where the indices of a batch are expected.
    """

    @property
    def labels(self) -> Tensor: ...
    @property
    def classes(self) -> int: ...
    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    @property
    def groups(self) -> Tensor | None: ...
    @property
    def group_names(self) -> tuple[str, ...] | None: ...
    @property
    def index_device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> Split:
        """The same split, whose samples are given out on a device."""
        ...

    def take(self, indices: Tensor) -> Images:
        """The samples at ``indices`` (K,), in that order, in memory, with their labels and groups; never augmented."""
        ...

    def batches(
        self, batches: Iterable[Batch], augmentation: Augmentation = NO_AUGMENTATION
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (K, C, H, W), floats in [0, 1] or bytes, and labels (K,) of each batch.

        Those of a batch's groups are ``split.groups[batch.indices]``.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Images:
    """One split in memory.

    Attributes:
        images: (N, C, H, W), floats in [0, 1] or unsigned bytes.
        labels: (N,), int64 in [0, classes).
        signal_on_top: (N,), bool: the digit is the upper block; None where there are no blocks.
        classes: how many there are.
        class_names: what they are called; None where that is not known.
        groups, group_names: see ``Split``; both or neither.

    Raises:
        ValueError: groups without names, names without groups, or another number of groups than of labels.
    """

    images: Tensor
    labels: Tensor
    signal_on_top: Tensor | None = None
    classes: int = 10
    class_names: tuple[str, ...] | None = None
    groups: Tensor | None = None
    group_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_groups(len(self.labels), self.groups, self.group_names)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def index_device(self) -> torch.device:
        return self.labels.device

    @property
    def null_mask(self) -> Tensor:
        """(N, 1, H, W), bool: True on the whole 28×28 null block of each sample.

        Raises:
            ValueError: the data have no null block.
        """
        if self.signal_on_top is None:
            raise ValueError(
                "these images have no null block; feature leakage needs block-mnist or block-fashion-mnist"
            )
        lower_half = torch.arange(2 * BLOCK, device=self.labels.device) >= BLOCK
        null_rows = lower_half == self.signal_on_top[:, None]
        return null_rows[:, None, :, None].expand(-1, 1, -1, BLOCK)

    def to(self, device: torch.device | str) -> Images:
        """The same split on a device."""
        return self._each(lambda values: values.to(device))

    def take(self, indices: Tensor) -> Images:
        """The samples at ``indices`` (K,), in that order."""
        return self._each(lambda values: values[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Images:
        """The same change made to all that there is one of a sample."""
        on_top = None if self.signal_on_top is None else change(self.signal_on_top)
        groups = None if self.groups is None else change(self.groups)
        return dataclasses.replace(
            self, images=change(self.images), labels=change(self.labels), signal_on_top=on_top, groups=groups
        )

    def batches(
        self, batches: Iterable[Batch], augmentation: Augmentation = NO_AUGMENTATION
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of each batch, as they are held but for the augmentation.

        Raises:
            ValueError: the augmentation takes parts of images of any size, and these have one.
        """
        if augmentation.resized_crop:
            raise ValueError(
                "the augmentation is 'resized-crop-flip' and these images are held in memory in one size; it needs "
                "images from files, such as imagefolder; use 'crop' or 'crop-flip' here"
            )
        for batch in batches:
            yield augmentation(self.images[batch.indices], *batch), self.labels[batch.indices]


def check_groups(samples: int, groups: Tensor | None, group_names: tuple[str, ...] | None) -> None:
    """Raises ValueError unless there are names and one group a sample, or neither."""
    if (groups is None) != (group_names is None):
        given, needed = ("groups", "group_names") if group_names is None else ("group_names", "groups")
        raise ValueError(f"{given} is given and {needed} is missing; give both, or neither")
    if groups is not None and groups.shape != (samples,):
        raise ValueError(f"groups is of shape {tuple(groups.shape)}; there must be one for each of {samples} samples")


class Splits(NamedTuple):
    """Training, validation and test data. No choice is ever to be made on the test split."""

    train: Split
    validation: Split
    test: Split


def in_unit_interval(images: Tensor) -> Tensor:
    """Images as a model takes them: bytes become float32 in [0, 1], floats stay as they are."""
    return images if images.is_floating_point() else images.float() / 255.0


def fingerprint(split: Split) -> str:
    """A digest that tells splits apart: of all labels, and of the pixels of 16 samples spread over the split.

    Two runs whose splits differ in it saw different samples, whatever their settings say.
    """
    digest = hashlib.sha256(split.labels.cpu().numpy().tobytes())
    spread = torch.linspace(0, len(split) - 1, min(16, len(split))).long().unique().to(split.index_device)
    digest.update(split.take(spread).images.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
