"""The runs of a sweep: every point of a grid, for every variant that it has an effect on, with every seed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..training.config import FIELDS, PLACE, TrainingConfig
from ..training.names import check_name
from .recipes import Recipe

_NO_AXIS = ("seed", "objective", *PLACE)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        variant: its name in the recipe.
        settings: the values of the grid's axes that have an effect on it, as JSON can hold them.
        seed: of weights and data order.
        config: all its settings.
    """

    variant: str
    settings: Mapping[str, Any]
    seed: int
    config: TrainingConfig

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the other runs of the sweep."""
        return key(self.variant, self.settings, self.seed)

    @property
    def name(self) -> str:
        """What its folder is called."""
        return folder(self.variant, self.settings, self.seed)


def key(variant: str, settings: Mapping[str, Any], seed: int) -> tuple[str, str, int]:
    """What tells one run of a sweep from another."""
    return variant, json.dumps(settings, sort_keys=True), seed


def folder(variant: str, settings: Mapping[str, Any], seed: int) -> str:
    """What the folder of a run is called."""
    return "-".join([variant, *(f"{name}{value}" for name, value in settings.items()), f"seed{seed}"]).replace("/", "_")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep is to run.

    Args:
        recipe: says what is compared.
        changes: settings of all runs, before the recipe's and the variants'.
        axes: setting -> candidate values, before the recipe's grid and the variants' settings.
        variants: names of those to run, the baseline always among them; default: all.
        seeds: each run is trained once with each.

    Raises:
        ValueError: a name is unknown, a value is wrong, or a setting has no effect on any variant.
    """

    recipe: Recipe
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    axes: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    variants: Sequence[str] = ()
    seeds: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        wanted = self.variants or tuple(self.recipe.variants)
        for name in wanted:
            check_name("variant", name, self.recipe.variants)
        ordered = (name for name in self.recipe.variants if name in wanted or name == self.baseline)
        object.__setattr__(self, "variants", tuple(ordered))
        object.__setattr__(self, "axes", {setting: _candidates(setting, self.axes[setting]) for setting in self.axes})
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}; a sweep needs at least one, and each once")
        for setting in (*self.changes, *self.axes):
            check_name("a setting", setting, FIELDS)
        for setting in ("objective", "seed"):
            if setting in self.changes:
                raise ValueError(f"{setting} is given; a sweep takes its objectives by variant=, its seeds by --seeds")
        self._check_effects(self.trials)  # whose settings are all made, so that what is wrong fails before any work

    @property
    def baseline(self) -> str:
        """The variant whose accuracy is to be kept."""
        return self.recipe.selection.baseline

    @property
    def trials(self) -> list[Trial]:
        """The runs, variant by variant and point by point, each point with all its seeds."""
        return [
            Trial(variant, settings, seed, dataclasses.replace(config, seed=seed))
            for variant in self.variants
            for settings, config in self.points(variant)
            for seed in self.seeds
        ]

    def points(self, variant: str) -> Iterator[tuple[dict[str, Any], TrainingConfig]]:
        """The points of the grid for a variant: the axes that have an effect on it, and the whole settings."""
        own = self.recipe.variants[variant].settings
        grid = {name: _candidates(name, values) for name, values in self.recipe.selection.grid.items()}
        grid = {name: values for name, values in grid.items() if name not in own and name not in self.changes}
        grid.update({name: tuple(values) for name, values in self.axes.items()})
        seen = set()
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            config = self.recipe.config(variant, {**self.changes, **point})
            effective = {name: plain(value) for name, value in point.items() if config.without_effect(name) is None}
            if key(variant, effective, 0) not in seen:
                seen.add(key(variant, effective, 0))
                yield effective, config

    def _check_effects(self, trials: Sequence[Trial]) -> None:
        """What is given has an effect on one of the variants at least."""
        for setting in (*self.changes, *self.axes):
            reasons = [trial.config.without_effect(setting) for trial in trials]
            if None not in reasons:
                # The last variant's: the first is mostly the baseline, which has no penalty at all.
                raise ValueError(f"{setting} would have no effect: {reasons[-1]}. Leave it out")


def _candidates(setting: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """The values of an axis, each once, numbers in rising order: of equals the smallest, which changes least, wins."""
    if setting in _NO_AXIS:
        raise ValueError(f"{setting} has {len(values)} values; give one (seeds are counted by --seeds)")
    unique = list(dict.fromkeys(values))
    if not unique:
        raise ValueError(f"{setting} has no values; give those to try, as in {setting}=0.1,1")
    if setting == "weight" and 0 in unique:
        raise ValueError("a weight of 0 is given; candidates are above 0, since 0 is cross-entropy")
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in unique)
    return tuple(sorted(unique) if numbers else unique)


def plain(value: Any) -> Any:
    """A value as JSON can hold it; infinity, as p may be, is written as TrainingConfig writes it."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value
