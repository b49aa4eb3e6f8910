"""Which samples each step takes. It follows from the settings: nothing of it has to be saved."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .data import Batch, epoch_order


class Order:
    """The training samples in batches, in an order of its own for each epoch, whose last batch may be smaller.

    Attributes:
        steps_per_epoch: batches in one pass over the data.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, device: torch.device) -> None:
        self._samples, self._batch_size, self._seed, self._device = samples, batch_size, seed, device
        self.steps_per_epoch = math.ceil(samples / batch_size)
        self._epoch = functools.lru_cache(maxsize=2)(self._order_of_epoch)

    def _order_of_epoch(self, epoch: int) -> Tensor:
        return epoch_order(self._seed, epoch, self._samples).to(self._device)

    def batch(self, step: int) -> Batch:
        """The samples of a step that is counted from 0."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self._batch_size
        return Batch(self._epoch(epoch)[first : first + self._batch_size], self._seed, epoch)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Those of the steps from the first to before the last."""
        return map(self.batch, range(first_step, last_step))

    def samples_before(self, step: int) -> int:
        """How many samples, each as often as it was taken, the steps before this one take."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self._samples + min(step_of_epoch * self._batch_size, self._samples)
