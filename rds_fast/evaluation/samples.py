"""The samples of a split that a metric looks at: some of them at random, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..training import data


def drawn(split: data.Split, limit: int | None, seed: int) -> data.Split:
    """``limit`` samples of a split drawn at random, in the split's order; all where it has no more, or with no limit.

    The draw follows from seed, limit and the size of the split alone, so every model is measured on the same samples.
    """
    if limit is None or limit >= len(split):
        return split
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.take(order[:limit].sort().values.to(split.index_device))


def batches_of(split: data.Split, batch_size: int) -> Iterator[data.Images]:
    """The samples of a split in their order, at most ``batch_size`` at a time, where the split gives them out.

    Their images are floats in [0, 1] or bytes, as the split holds them: ``data.in_unit_interval`` makes what a model
    takes.
    """
    for indices in torch.arange(len(split), device=split.index_device).split(batch_size):
        if len(indices):  # an empty range is split into one empty part
            yield split.take(indices)
