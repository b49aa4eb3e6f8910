"""The accuracy that projected gradient descent leaves in an L∞ and in an L2 ball around each sample."""

from __future__ import annotations

import functools

import torch
from torch import nn

from ..attacks.pgd import pgd
from ..training import data
from .accuracy import classified_rightly
from .results import Results
from .samples import batches_of
from .settings import EvaluationSettings


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``linf_accuracy`` and ``l2_accuracy``: classified rightly as they are and after PGD from every random start."""
    return Results({f"{norm}_accuracy": _accuracy(model, split, settings, norm) for norm in ("linf", "l2")})


def _accuracy(model: nn.Module, split: data.Split, settings: EvaluationSettings, norm: str) -> float:
    # One generator a norm, so that leaving one out would not move the other's starts.
    generator = torch.Generator(split.labels.device).manual_seed(settings.seed)
    epsilon = {"linf": settings.linf_epsilon, "l2": settings.l2_epsilon}[norm]
    step_size = {"linf": settings.linf_step_size, "l2": settings.l2_step_size}[norm]
    attack = functools.partial(pgd, norm=norm, steps=settings.steps, step_size=step_size, generator=generator)
    right = []
    for batch in batches_of(split, settings.batch_size):
        x, y = data.in_unit_interval(batch.images), batch.labels
        still_right = classified_rightly(model, x, y)
        for _ in range(settings.restarts):
            still_right &= classified_rightly(model, attack(model, x, y, epsilon), y)
        right.append(still_right)
    return float(torch.cat(right).double().mean())
