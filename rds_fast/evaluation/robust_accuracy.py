"""The accuracy that projected gradient descent leaves in an L∞ and in an L2 ball around each sample."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..attacks.pgd import pgd
from ..training import data
from .accuracy import classified_rightly
from .results import Results
from .samples import batches_of
from .settings import EvaluationSettings


def robust_to_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    norm: str = "linf",
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """(N,), bool: classified rightly as it is and after PGD from each of ``restarts`` random starts.

    The first start is of all samples, so that it is the same for every model; only those that no start has broken yet
    are attacked again. Arguments and errors as of ``pgd``.
    """
    if restarts < 1:
        raise ValueError(f"restarts is {restarts}; it must be 1 or more")
    robust = classified_rightly(model, x, y)
    for start in range(restarts):
        left = robust.nonzero()[:, 0] if start else torch.arange(len(y), device=y.device)
        moved = pgd(
            model,
            x[left],
            y[left],
            epsilon,
            norm=norm,
            steps=steps,
            step_size=step_size,
            bounds=bounds,
            generator=generator,
        )
        if len(left):
            robust[left] &= classified_rightly(model, moved, y[left])
    return robust


def outlasts(one: Tensor, other: Tensor) -> bool:
    """Whether significantly more samples withstand one attack than another.

    The same samples are under both, so those that withstand both or neither say nothing: of those that withstand
    only the one or only the other, b and c in number, about half should be of each kind if the attacks are equally
    strong, and b − c has the standard error √(b + c) (McNemar 1947). The answer is b − c > 2 √(b + c).

    Args:
        one, other: (N,), bool: the sample withstands the attack.
    """
    b, c = int((one & ~other).sum()), int((other & ~one).sum())
    return b - c > 2 * math.sqrt(b + c)


def over_batches(
    split: data.Split, settings: EvaluationSettings, outcome: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """outcome(x, y) (N,) of every batch of a split, as one; x are floats in [0, 1]."""
    return torch.cat(
        [outcome(data.in_unit_interval(batch.images), batch.labels) for batch in batches_of(split, settings.batch_size)]
    )


def robust_on_split(
    model: nn.Module,
    split: data.Split,
    settings: EvaluationSettings,
    epsilon: float,
    *,
    norm: str = "linf",
    steps: int,
    step_size: float | None = None,
) -> Tensor:
    """(N,), bool: ``robust_to_pgd`` on a whole split, with the seed, the restarts and the batches of the settings.

    Each start is of all that is left of the split before the next one is drawn. So the first is the same for every
    model and every number of restarts, in each batch, and one restart more can only lower the accuracy.
    """
    generator = torch.Generator(split.labels.device).manual_seed(settings.seed)

    def outcome(x: Tensor, y: Tensor) -> Tensor:
        return robust_to_pgd(model, x, y, epsilon, norm=norm, steps=steps, step_size=step_size, generator=generator)

    robust = over_batches(split, settings, outcome)
    for _ in range(1, settings.restarts):
        left = robust.nonzero()[:, 0]
        if len(left):
            robust[left] = over_batches(split.take(left.to(split.index_device)), settings, outcome)
    return robust


def robust_to_the_settings_pgd(model: nn.Module, split: data.Split, settings: EvaluationSettings, norm: str) -> Tensor:
    """(N,), bool: ``robust_on_split`` with the radius, the steps and the step size of the settings.

    Each norm has a generator of its own, so that leaving one out would not move the other's starts.
    """
    epsilon, step_size = {
        "linf": (settings.linf_epsilon, settings.linf_step_size),
        "l2": (settings.l2_epsilon, settings.l2_step_size),
    }[norm]
    return robust_on_split(model, split, settings, epsilon, norm=norm, steps=settings.steps, step_size=step_size)


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``linf_accuracy`` and ``l2_accuracy``: classified rightly as they are and after PGD from every random start."""
    return Results(
        {
            f"{norm}_accuracy": float(robust_to_the_settings_pgd(model, split, settings, norm).double().mean())
            for norm in ("linf", "l2")
        }
    )
