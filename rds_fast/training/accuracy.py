"""How well a model does on a split."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import data


@torch.no_grad()
def evaluate_accuracy(
    model: nn.Module, split: data.Split, batch_size: int = 1000, inputs: Callable[[Tensor], Tensor] | None = None
) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy of a model, in the mode it is in, on data of its device.

    Args:
        model: the classifier.
        split: the data.
        batch_size: samples at a time.
        inputs: makes what the model takes of a batch of the split; default: ``data.in_unit_interval``.
    """
    inputs = inputs or data.in_unit_interval
    batches = map(data.Batch, torch.arange(len(split), device=split.index_device).split(batch_size))
    sums: list[Tensor] = []
    for images, y in split.batches(batches):
        logits = model(inputs(images))
        loss = nn.functional.cross_entropy(logits.float(), y, reduction="sum").double()
        sums.append(torch.stack([(logits.argmax(1) == y).sum().double(), loss]))
    correct, total_loss = torch.stack(sums).sum(0).tolist()  # once: each look at the device waits for it
    return correct / len(split), total_loss / len(split)
