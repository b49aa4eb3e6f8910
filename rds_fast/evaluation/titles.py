"""What kinds of runs are called: the objective, and the settings that tell one kind from another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ..training.config import FIELDS, OBJECTIVES, PATHS, PLACE, TrainingConfig
from .record import Record

BASELINE = "cross-entropy"

_SYMBOLS = {"weight": "λ", "epsilon": "ε", "weight_schedule": "schedule"}
_OF = {"target_logit": "target logit ‖∇ f_y‖", "cross_entropy": "input gradient ‖∇ CE‖"}
_TITLES = {
    BASELINE: "cross-entropy",
    "adversarial": "adversarial training",
    "attribution": "IG-NORM",
    "robust-attribution": "IG-SUM-NORM",
    "jacobian": "Jacobian",
    "gradient-matching": "gradient matching",
}
# These are said by the title itself.
_IN_TITLE = ("objective", "of", "method")


def objective_title(config: TrainingConfig) -> str:
    """What is minimised, in a few words."""
    if config.objective == "input-gradient":
        return _OF[config.of]
    if config.objective == "density":
        return "density ‖∇ log p‖" if config.method == "exact" else "density, Taylor"
    title = _TITLES.get(config.objective, config.objective)
    return f"{title} of {config.of.replace('_', ' ')}" if config.objective == "gradient-matching" else title


def kind(record: Record) -> dict[str, Any]:
    """The settings of a run that have an effect on what is computed, but for the seed: alike for runs of one kind."""
    config = record.training
    names = [name for name in FIELDS if name != "seed" and name not in PLACE]
    return {name: getattr(config, name) for name in names if config.without_effect(name) is None}


def identity(record: Record) -> dict[str, str | None]:
    """What tells a run's training data and teacher from others: their digests or, for want of them, their folders."""
    config = record.training
    paths = {name: getattr(config, name) for name in PATHS if config.without_effect(name) is None}
    return dict(record.identity) or paths


def order(record: Record) -> tuple[Any, ...]:
    """By this kinds are sorted: cross-entropy first, then by objective, then by their numbers from small to large."""
    config = record.training
    position = OBJECTIVES.index(config.objective)
    values = [value for value in kind(record).values() if isinstance(value, (int, float))]
    return (config.objective != BASELINE, position, config.of, config.method, config.model, values)


def titles(records: Sequence[Record]) -> list[str]:
    """A title for each of several kinds: its objective, its weight, and the settings in which they differ.

    Kinds that differ in training data or teacher alone have that at the end.
    """
    kinds = [kind(record) for record in records]
    shown = [name for name in FIELDS if name not in _IN_TITLE and _tells(name, [k[name] for k in kinds if name in k])]
    found = []
    for record, settings in zip(records, kinds, strict=True):
        parts = [_part(name, settings[name]) for name in shown if name in settings]
        found.append(", ".join([objective_title(record.training), *parts]))
    outside = [identity(record) for record in records]
    names = dict.fromkeys(itertools.chain(*outside))
    told = [name for name in names if _tells(name, [each.get(name) for each in outside])]
    return [
        ", ".join([title, *(_part(name, each.get(name)) for name in told)]) if found.count(title) > 1 else title
        for title, each in zip(found, outside, strict=True)
    ]


def common(records: Sequence[Record]) -> dict[str, Any]:
    """The settings that all kinds have, with one value."""
    kinds = [kind(record) for record in records]
    return {name: value for name, value in kinds[0].items() if all(name in k and k[name] == value for k in kinds)}


def _tells(name: str, values: Sequence[Any]) -> bool:
    return name == "weight" or any(value != values[0] for value in values)


def _part(name: str, value: Any) -> str:
    word = _SYMBOLS.get(name, name.replace("_", " "))
    if isinstance(value, bool):
        return word if value else f"no {word}"
    if isinstance(value, tuple):
        value = " ".join(map(str, value)) or "none"
    return f"{word} = {value:g}" if isinstance(value, float) else f"{word} = {value}"
