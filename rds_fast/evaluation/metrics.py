"""The metrics by name: what measures each, which are measured unasked, and what each needs of the data."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ..training import data
from ..training.extras import missing
from . import (
    accuracy,
    attribution_robustness,
    auto_attack,
    calibration,
    gradient_norm,
    gradient_perturbation,
    groups,
    leakage,
    out_of_distribution,
    pixel_perturbation,
    robust_accuracy,
    sanity,
    spuriosity,
)
from .results import Results
from .settings import ALL, EvaluationSettings

Measure = Callable[[nn.Module, data.Split, EvaluationSettings], Results]
Obstacle = Callable[[data.Split, EvaluationSettings], str | None]


def _nothing(split: data.Split, settings: EvaluationSettings) -> str | None:
    return None


def _no_spuriosity(split: data.Split, settings: EvaluationSettings) -> str | None:
    if settings.spuriosity is None:
        return "no file of spuriosity scores is given"
    return None if settings.limit is None else "spuriosity scores are of the whole split, and a limit is given"


def _no_null_block(split: data.Split, settings: EvaluationSettings) -> str | None:
    return "these data have no null block" if getattr(split, "signal_on_top", None) is None else None


def _no_groups(split: data.Split, settings: EvaluationSettings) -> str | None:
    return "these data have no groups" if split.group_names is None else None


def _no_other_data(split: data.Split, settings: EvaluationSettings) -> str | None:
    return None if settings.ood_data else "ood_data names no other data"


def _no_autoattack(split: data.Split, settings: EvaluationSettings) -> str | None:
    if importlib.util.find_spec(auto_attack.PACKAGE) is None:
        return str(missing(auto_attack.PACKAGE, "AutoAttack"))
    return None


class Metric(NamedTuple):
    """One metric.

    Attributes:
        measure: of a model in eval mode and a split on its device.
        unasked: it is cheap, and measured where no metric is named.
        asked_by: a setting that is there for it alone: where no metric is named, it asks for this one if it is given.
        obstacle: why it cannot be measured on a split with some settings; None if it can.
    """

    measure: Measure
    unasked: bool = True
    asked_by: str | None = None
    obstacle: Obstacle = _nothing


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy.measure),
    "calibration": Metric(calibration.measure),
    "groups": Metric(groups.measure, obstacle=_no_groups),
    "spuriosity": Metric(spuriosity.measure, unasked=False, asked_by="spuriosity", obstacle=_no_spuriosity),
    "pgd": Metric(robust_accuracy.measure),
    "autoattack": Metric(auto_attack.measure, unasked=False, obstacle=_no_autoattack),
    "sanity": Metric(sanity.measure, unasked=False),
    "leakage": Metric(leakage.measure, obstacle=_no_null_block),
    "gradient_norm": Metric(gradient_norm.measure),
    "attribution": Metric(attribution_robustness.measure, unasked=False),
    "pixel_perturbation": Metric(pixel_perturbation.measure, unasked=False),
    "gradient_perturbation": Metric(gradient_perturbation.measure, unasked=False),
    "out_of_distribution": Metric(
        out_of_distribution.measure, unasked=False, asked_by="ood_data", obstacle=_no_other_data
    ),
}


def _asked_by_settings(settings: EvaluationSettings) -> set[str]:
    return {name for name, metric in METRICS.items() if metric.asked_by and getattr(settings, metric.asked_by)}


def chosen(split: data.Split, settings: EvaluationSettings) -> tuple[dict[str, Metric], tuple[str, ...]]:
    """The metrics to measure, in the order of ``METRICS``, and a note on each that was left out.

    Raises:
        ValueError: a metric that was asked for by its name cannot be measured; the message says why.
    """
    named = set(settings.metrics) - {ALL} if settings.metrics else _asked_by_settings(settings)
    metrics, notes = {}, []
    for name, metric in METRICS.items():
        if name not in named and ALL not in settings.metrics and (settings.metrics or not metric.unasked):
            continue
        reason = metric.obstacle(split, settings)
        if reason is None:
            metrics[name] = metric
        elif name in named:
            raise ValueError(f"the metric {name} cannot be measured: {reason}. Leave it out, or mend that")
        else:
            notes.append(f"{name} is left out: {reason}.")
    return metrics, tuple(notes)
