"""What kinds of runs are called: the objective, and the settings that tell one kind from another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..training.config import FIELDS, OBJECTIVES, RESUMABLE_CHANGES, TrainingConfig

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
# These are said by the title itself, or tell runs of one kind apart.
_IN_TITLE = ("objective", "of", "method")
_NOT_OF_A_KIND = ("seed", *RESUMABLE_CHANGES)


def objective_title(config: TrainingConfig) -> str:
    """What is minimised, in a few words."""
    if config.objective == "input-gradient":
        return _OF[config.of]
    if config.objective == "density":
        return "density ‖∇ log p‖" if config.method == "exact" else "density, Taylor"
    title = _TITLES.get(config.objective, config.objective)
    return f"{title} of {config.of.replace('_', ' ')}" if config.objective == "gradient-matching" else title


def kind(config: TrainingConfig) -> dict[str, Any]:
    """The settings that have an effect on what is computed, but for the seed: alike for runs of one kind."""
    names = [name for name in FIELDS if name not in _NOT_OF_A_KIND]
    return {name: getattr(config, name) for name in names if config.without_effect(name) is None}


def order(config: TrainingConfig) -> tuple[Any, ...]:
    """By this kinds are sorted: cross-entropy first, then by objective, then by their numbers from small to large."""
    position = OBJECTIVES.index(config.objective)
    values = [value for value in kind(config).values() if isinstance(value, (int, float))]
    return (config.objective != BASELINE, position, config.of, config.method, config.model, values)


def titles(configs: Sequence[TrainingConfig]) -> list[str]:
    """A title for each of several kinds: its objective, its weight, and the settings in which they differ."""
    kinds = [kind(config) for config in configs]
    shown = [name for name in FIELDS if name not in _IN_TITLE and _tells(name, [k[name] for k in kinds if name in k])]
    found = []
    for config, settings in zip(configs, kinds, strict=True):
        parts = [_part(name, settings[name]) for name in shown if name in settings]
        found.append(", ".join([objective_title(config), *parts]))
    return found


def common(configs: Sequence[TrainingConfig]) -> dict[str, Any]:
    """The settings that all kinds have, with one value."""
    kinds = [kind(config) for config in configs]
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
