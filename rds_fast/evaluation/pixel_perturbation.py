"""Pixel perturbation: what becomes of a prediction as pixels are removed, the most or the least relevant first."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn

from ..training import data
from .attributions import attributions, pixel_scores
from .results import Curve, Results
from .samples import batches_of, drawn
from .settings import EvaluationSettings

ORDERS = {"most": "the most relevant first", "least": "the least relevant first"}


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``pixel_most_auc`` and ``pixel_least_auc``, and the curves they are the areas under.

    Each curve has a point for no pixel removed and one for each of ``perturbation_ratios``; an area is by the trapezoid
    rule between the first and the last of them, not divided by their distance (0.9 at most, if the last ratio is 0.9).
    A good attribution has a small ``pixel_most_auc`` and a large ``pixel_least_auc``. The curves are the accuracy and
    the mean probability of the true class, on one draw of ``attribution_limit`` samples, the same for every model.
    """
    sample = drawn(split, settings.attribution_limit, settings.seed)
    fill = None if settings.fill == "mean" else float(settings.fill)
    rows = [
        _measure(model, batch, settings, fill)
        for batch in batches_of(sample, max(1, settings.batch_size // _samples_at_once(settings)))
    ]
    means = {name: torch.cat([row[name] for row in rows]).mean(0).tolist() for name in rows[0]}
    ratios = (0.0, *settings.perturbation_ratios)
    curves = {
        name: Curve(f"share of pixels removed, {ORDERS[order]}", label, ratios, tuple(means[name]))
        for order in ORDERS
        for name, label in ((f"pixel_{order}_accuracy", "accuracy"), (f"pixel_{order}_probability", "probability"))
    }
    return Results({f"pixel_{order}_auc": area(curves[f"pixel_{order}_accuracy"]) for order in ORDERS}, curves)


def remove_pixels(x: Tensor, scores: Tensor, ratio: float, *, order: str = "most", fill: float | None = None) -> Tensor:
    """The samples without a share of their pixels.

    Args:
        x: (N, C, ...), or (N, D), where each value is a pixel.
        scores: (N, P), how relevant each pixel is; of equal ones the first is removed first.
        ratio: of the P pixels, round(ratio · P) are removed, in [0, 1].
        order: ``"most"`` or ``"least"`` relevant first.
        fill: what removed pixels become; None: the mean of the kept ones of the same sample and channel (of all of
            them, where none is kept).

    Returns:
        Of x's shape and dtype.

    Raises:
        ValueError: the scores do not fit x, the ratio is out of range, or the order is unknown.
    """
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (N, C, ...) or (N, D)")
    pixels = x.shape[2:].numel() if x.dim() > 2 else x.shape[1]
    if scores.shape != (len(x), pixels):
        raise ValueError(f"the scores have shape {tuple(scores.shape)}; x has {len(x)} samples of {pixels} pixels")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}; it must be from 0 to 1")
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; it must be 'most' or 'least'")
    ranking = scores.argsort(dim=1, descending=order == "most", stable=True)[:, : round(ratio * pixels)]
    removed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ranking, True)
    values = x.flatten(2) if x.dim() > 2 else x[:, None]
    removed = removed[:, None].expand_as(values)
    filling = values.new_tensor(fill) if fill is not None else _mean_of_kept(values, removed)
    return torch.where(removed, filling, values).view(x.shape)


def area(curve: Curve) -> float:
    """The area under a curve by the trapezoid rule, from its first x to its last."""
    points = list(zip(curve.x, curve.y, strict=True))
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))


def _mean_of_kept(values: Tensor, removed: Tensor) -> Tensor:
    """(N, C, 1)."""
    removed = removed & ~removed.all(2, keepdim=True)  # none kept: the mean of all
    kept = (~removed).sum(2, keepdim=True)
    return values.masked_fill(removed, 0).sum(2, keepdim=True, dtype=torch.float64).div(kept).to(values.dtype)


def _measure(
    model: nn.Module, batch: data.Images, settings: EvaluationSettings, fill: float | None
) -> dict[str, Tensor]:
    """(N, ratios + 1) of each curve: right or not, and the probability of the true class."""
    x, y = data.in_unit_interval(batch.images), batch.labels
    method = settings.perturbation_attribution
    scores = pixel_scores(attributions(model, x, y, method, path_steps=settings.path_steps, seed=settings.seed))
    figures = {}
    for order in ORDERS:
        remove = functools.partial(remove_pixels, x, scores, order=order, fill=fill)
        logits = [_logits(model, remove(ratio)) for ratio in (0.0, *settings.perturbation_ratios)]
        figures[f"pixel_{order}_accuracy"] = torch.stack([each.argmax(1) == y for each in logits], 1).double()
        figures[f"pixel_{order}_probability"] = torch.stack(
            [each.double().softmax(1).gather(1, y[:, None])[:, 0] for each in logits], 1
        )
    return figures


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits


def _samples_at_once(settings: EvaluationSettings) -> int:
    """How many inputs of the model one sample makes, at most, at a time."""
    return 25 if settings.perturbation_attribution == "smoothgrad" else 1
