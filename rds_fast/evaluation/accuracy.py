"""The share of a split that a model classifies rightly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..training import data
from .results import Results
from .samples import batches_of
from .settings import EvaluationSettings


@torch.no_grad()
def classified_rightly(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N,), bool: the largest logit is the label's."""
    return model(x).argmax(1) == y


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``accuracy``: the share classified rightly."""
    right = [
        classified_rightly(model, data.in_unit_interval(batch.images), batch.labels)
        for batch in batches_of(split, settings.batch_size)
    ]
    return Results({"accuracy": float(torch.cat(right).double().mean())})
