"""How much of a model's attributions an attack that leaves the predictions alone can change."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..training import data
from .accuracy import classified_rightly
from .attribution_attack import attribution_attack
from .attributions import attributions, pixel_scores
from .rank_correlation import kendall_tau, spearman, top_k_intersection
from .results import Results
from .samples import batches_of, drawn
from .settings import EvaluationSettings

FIGURES = ("top_k_intersection", "kendall_tau", "spearman")


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``top_k_intersection``, ``kendall_tau`` and ``spearman`` between attributions before and after an attack.

    The attributions are integrated gradients of the true class's logit from a black image, as |values| summed over
    channels; the attack is ``attribution_attack``. As in the evaluation code of Chen et al. (2019), samples that the
    model classifies wrongly are left out, and the figures are means over the others of one draw of
    ``attribution_limit`` samples, the same for every model. None where no figure of a sample is defined. That code is
    ``attribution_keep="kendall"``, ``attribution_softplus=1`` and ``attack_path_steps=100``, with one restart.

    Raises:
        ValueError: ``attribution_k`` is more than an image has pixels.
    """
    generator = torch.Generator(split.labels.device).manual_seed(settings.seed)
    sample = drawn(split, settings.attribution_limit, settings.seed)
    # The attack looks at that many points of each sample at once: the batch size counts them, too.
    batches = batches_of(sample, max(1, settings.batch_size // settings.attack_path_steps))
    parts = [_compare(model, batch, settings, generator) for batch in batches]
    figures = {name: torch.cat([part[name] for part in parts]) for name in FIGURES}
    together = torch.stack(tuple(figures.values()))
    attacked, undefined = together.shape[1], int(together.isnan().any(0).sum())
    return Results(
        {name: _mean(values) for name, values in figures.items()},
        notes=_notes(settings, attacked, len(sample), undefined),
    )


def _compare(
    model: nn.Module, batch: data.Images, settings: EvaluationSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """The figures of the samples of a batch that are classified rightly."""
    x, y = data.in_unit_interval(batch.images), batch.labels
    right = classified_rightly(model, x, y)
    x, y = x[right], y[right]
    if not len(x):
        return dict.fromkeys(FIGURES, torch.empty(0, dtype=torch.float64, device=x.device))
    moved = attribution_attack(
        model,
        x,
        y,
        _radius(settings),
        k=settings.attribution_k,
        steps=settings.attribution_steps,
        step_size=settings.attribution_step_size,
        restarts=settings.attribution_restarts,
        path_steps=settings.path_steps,
        attack_path_steps=settings.attack_path_steps,
        keep=settings.attribution_keep,
        softplus=settings.attribution_softplus,
        generator=generator,
    )
    before, after = (_scores(model, images, y, settings) for images in (x, moved))
    top_k = top_k_intersection(before, after, settings.attribution_k)
    return dict(zip(FIGURES, (top_k, kendall_tau(before, after), spearman(before, after)), strict=True))


def _scores(model: nn.Module, x: Tensor, y: Tensor, settings: EvaluationSettings) -> Tensor:
    """(N, P): the pixel scores of the integrated gradients."""
    return pixel_scores(attributions(model, x, y, "integrated_gradients", path_steps=settings.path_steps))


def _radius(settings: EvaluationSettings) -> float:
    return settings.linf_epsilon if settings.attribution_epsilon is None else settings.attribution_epsilon


def _mean(values: Tensor) -> float | None:
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean


def _notes(settings: EvaluationSettings, attacked: int, drawn: int, undefined: int) -> tuple[str, ...]:
    notes = [
        f"Attributions were attacked within {_radius(settings):g} (L∞) on the {attacked} of {drawn} samples that are "
        f"classified rightly; {settings.attribution_k} pixels count as the top."
    ]
    if undefined:
        notes.append(f"On {undefined} of them an attribution is constant or zero, so a figure of theirs is undefined.")
    return tuple(notes)
