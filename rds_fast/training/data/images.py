"""Images held in memory, the three splits of a data set, and the order in which training takes its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

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
        index_device: where the indices of a batch are expected.
    """

    @property
    def labels(self) -> Tensor: ...
    @property
    def classes(self) -> int: ...
    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    @property
    def index_device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> Split:
        """The same split, whose samples are given out on a device."""
        ...

    def take(self, indices: Tensor) -> Images:
        """The samples at ``indices`` (K,), in that order, in memory."""
        ...

    def batches(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (K, C, H, W), floats in [0, 1] or bytes, and labels (K,) of each batch."""
        ...


@dataclasses.dataclass(frozen=True)
class Images:
    """One split in memory.

    Attributes:
        images: (N, C, H, W), floats in [0, 1] or unsigned bytes.
        labels: (N,), int64 in [0, classes).
        signal_on_top: (N,), bool: the digit is the upper block; None where there are no blocks.
        classes: how many there are.
    """

    images: Tensor
    labels: Tensor
    signal_on_top: Tensor | None
    classes: int = 10

    class_names = None

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
        on_top = None if self.signal_on_top is None else self.signal_on_top.to(device)
        return Images(self.images.to(device), self.labels.to(device), on_top, self.classes)

    def take(self, indices: Tensor) -> Images:
        """The samples at ``indices`` (K,), in that order."""
        on_top = None if self.signal_on_top is None else self.signal_on_top[indices]
        return Images(self.images[indices], self.labels[indices], on_top, self.classes)

    def batches(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of each batch, as they are held."""
        for batch in batches:
            yield self.images[batch.indices], self.labels[batch.indices]


class Splits(NamedTuple):
    """Training, validation and test data. No choice is ever to be made on the test split."""

    train: Split
    validation: Split
    test: Split


def in_unit_interval(images: Tensor) -> Tensor:
    """Images as a model takes them: bytes become float32 in [0, 1], floats stay as they are."""
    return images if images.is_floating_point() else images.float() / 255.0


def epoch_order(seed: int, epoch: int, samples: int) -> Tensor:
    """(samples,): the order of the data in an epoch. It follows from seed and epoch: nothing has to be saved."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derived_seed(seed, epoch)))


def derived_seed(*entropy: int) -> int:
    """One seed from several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
