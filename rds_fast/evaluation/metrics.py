"""The metrics by name: what measures each, which are measured unasked, and what each needs of the data."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
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
from .other_data import parse_source
from .results import Results
from .settings import ALL, EvaluationSettings

Measure = Callable[[nn.Module, data.Split, EvaluationSettings], Results]
Obstacle = Callable[[data.Split, EvaluationSettings], str | None]


def _nothing(split: data.Split, settings: EvaluationSettings) -> str | None:
    return None


def _no_spuriosity(split: data.Split, settings: EvaluationSettings) -> str | None:
    if settings.spuriosity is None:
        return "no file of spuriosity scores is given"
    if settings.limit is not None:
        return "spuriosity scores are of the whole split, and a limit is given"
    there = Path(settings.spuriosity).is_file()
    return None if there else f"there is no file {settings.spuriosity}, which spuriosity names"


def _no_null_block(split: data.Split, settings: EvaluationSettings) -> str | None:
    return "these data have no null block" if getattr(split, "signal_on_top", None) is None else None


def _no_groups(split: data.Split, settings: EvaluationSettings) -> str | None:
    return "these data have no groups" if split.group_names is None else None


def _no_other_data(split: data.Split, settings: EvaluationSettings) -> str | None:
    if not settings.ood_data:
        return "ood_data names no other data"
    folders = {source: parse_source(source)[1] for source in settings.ood_data}
    absent = [source for source, folder in folders.items() if folder and not Path(folder).expanduser().is_dir()]
    return f"there is no folder of {', '.join(absent)}, which ood_data names" if absent else None


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
        figures: those of its scalars of which more is better, so that a sweep may choose by them.
    """

    measure: Measure
    unasked: bool = True
    asked_by: str | None = None
    obstacle: Obstacle = _nothing
    figures: tuple[str, ...] = ()


# In this order they are measured. Those that read further files come first: what is wrong there is found before the
# long work.
METRICS: dict[str, Metric] = {
    "spuriosity": Metric(spuriosity.measure, unasked=False, asked_by="spuriosity", obstacle=_no_spuriosity),
    "out_of_distribution": Metric(
        out_of_distribution.measure, unasked=False, asked_by="ood_data", obstacle=_no_other_data
    ),
    "accuracy": Metric(accuracy.measure, figures=("accuracy",)),
    "calibration": Metric(calibration.measure),
    "groups": Metric(groups.measure, obstacle=_no_groups, figures=("worst_group_accuracy",)),
    "pgd": Metric(robust_accuracy.measure, figures=("linf_accuracy", "l2_accuracy")),
    "autoattack": Metric(
        auto_attack.measure,
        unasked=False,
        obstacle=_no_autoattack,
        figures=("autoattack_linf_accuracy", "autoattack_l2_accuracy"),
    ),
    "sanity": Metric(sanity.measure, unasked=False),
    "leakage": Metric(leakage.measure, obstacle=_no_null_block),
    "gradient_norm": Metric(gradient_norm.measure),
    "attribution": Metric(
        attribution_robustness.measure, unasked=False, figures=("top_k_intersection", "kendall_tau", "spearman")
    ),
    "pixel_perturbation": Metric(pixel_perturbation.measure, unasked=False, figures=("pixel_least_auc",)),
    "gradient_perturbation": Metric(
        gradient_perturbation.measure, unasked=False, figures=("input_perturbation_down_auc",)
    ),
}
# Figure -> the metric that gives it.
FIGURES = {figure: name for name, metric in METRICS.items() for figure in metric.figures}


def _asked_by_settings(settings: EvaluationSettings) -> set[str]:
    return {name for name, metric in METRICS.items() if metric.asked_by and getattr(settings, metric.asked_by)}


def chosen(split: data.Split, settings: EvaluationSettings) -> tuple[dict[str, Metric], tuple[str, ...]]:
    """The metrics to measure, in the order of ``METRICS``, and a note on each that was left out.

    Raises:
        ValueError: a metric that was asked for by its name cannot be measured; the message says why.
    """
    named = set(settings.metrics) - {ALL}
    asked = _asked_by_settings(settings)
    if not settings.metrics or ALL in settings.metrics:
        named |= asked
    notes = [f"{name} is left out: it is not among the metrics named." for name in METRICS if name in asked - named]
    metrics = {}
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
