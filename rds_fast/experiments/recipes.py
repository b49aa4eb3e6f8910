"""Recipes: one TOML file an experiment: what is trained, compared, chosen and measured, and on whose authority.

title = "..."                     what it is, in a line
source = "..."                    paper, table, section
variant = "density"               the variant that is trained where none is asked for

[[ours]]                          settings that the source does not give, or that differ from it
settings = ["epochs", "evaluation.steps"]
why = "..."

[training]                        fields of TrainingConfig, for all variants
[variants.density]                what is compared: a title and the fields in which it differs
title = "density"
reported = { accuracy = 0.99 }    perhaps: what the source reports of it, in [0, 1]
[sweep]                           see ``Selection``; grid.weight = [...] is an axis of the grid
[evaluation]                      fields of EvaluationSettings
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..evaluation.metrics import FIGURES
from ..evaluation.settings import FIELDS as EVALUATION_FIELDS
from ..evaluation.settings import EvaluationSettings
from ..training.config import FIELDS, PATHS, TrainingConfig
from ..training.data.lists import read_text
from ..training.names import check_name

_FOLDER = ("training", "recipes")
_PARTS = ("title", "source", "variant", "ours", "training", "variants", "sweep", "evaluation")
_ELSEWHERE = dict.fromkeys(PATHS, "elsewhere")  # what only the user knows

# What is measured where something is to be chosen; [sweep.evaluation] may change it.
WHILE_CHOOSING = {"metrics": ("accuracy", "pgd")}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of the objectives that a recipe compares.

    Attributes:
        title: what it is called before readers.
        settings: fields of TrainingConfig.
        reported: figures that the source reports of it, by their names in an evaluation.
    """

    title: str
    settings: Mapping[str, Any]
    reported: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Selection:
    """How a sweep chooses among the candidates of each variant, on the validation split.

    Chosen is the candidate with the most of ``measure`` among those at most ``margin`` below the mean accuracy of the
    baseline.

    Attributes:
        grid: setting -> the values it takes, for each variant that it has an effect on and that does not set it.
        baseline: the variant whose accuracy is to be kept.
        measure: a figure of the evaluation; more is better.
        margin: of accuracy, in [0, 1].
        evaluation: settings of the evaluation that differ while anything is still to be chosen.
    """

    grid: Mapping[str, tuple[Any, ...]]
    baseline: str
    measure: str
    margin: float
    evaluation: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An experiment: see the beginning of this file for the parts.

    Attributes:
        ours: setting -> why it is not the source's.
    """

    name: str
    title: str
    source: str
    variant: str
    ours: Mapping[str, str]
    training: Mapping[str, Any]
    variants: Mapping[str, Variant]
    selection: Selection
    evaluation: Mapping[str, Any]

    def config(self, variant: str | None = None, changes: Mapping[str, Any] | None = None) -> TrainingConfig:
        """The settings of one run: the recipe's, the variant's, and ``changes``, the later before the earlier.

        Raises:
            ValueError: the variant or a setting is unknown, or a value is wrong.
        """
        variant = self.variant if variant is None else variant
        check_name("variant", variant, self.variants)
        settings = {**self.training, **self.variants[variant].settings, **(changes or {})}
        for name in settings:
            check_name("a setting", name, FIELDS)
        return TrainingConfig(**settings)

    def settings(self, changes: Mapping[str, Any] | None = None, *, choosing: bool = False) -> EvaluationSettings:
        """The settings of the evaluation, in the end or while anything is still to be chosen.

        Raises:
            ValueError, TypeError: a setting is unknown, or a value is wrong.
        """
        chosen = {**WHILE_CHOOSING, **self.selection.evaluation} if choosing else {}
        return EvaluationSettings.from_settings({**self.evaluation, **chosen, **(changes or {})})


def names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    return tuple(sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml")))


def load(name: str) -> Recipe:
    """A recipe by its name, or by the path of a TOML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name is unknown, or the recipe holds what no recipe may: the message names it.
    """
    if not name.endswith(".toml"):
        check_name("recipe", name, names())
        return parse(name, _folder().joinpath(f"{name}.toml").read_text(encoding="utf-8"))
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {path}; give a TOML file, or one of {', '.join(names())}")
    return parse(path.stem, read_text(path))


def text(name: str) -> str:
    """The file of a recipe that comes with the package."""
    check_name("recipe", name, names())
    return _folder().joinpath(f"{name}.toml").read_text(encoding="utf-8")


def parse(name: str, content: str) -> Recipe:
    """The recipe that a TOML file's content describes.

    Raises:
        ValueError: it is no TOML, a key is unknown or missing, or a value is wrong or would have no effect.
    """
    try:
        recipe = _recipe(name, tomllib.loads(content))
        _check(recipe)
        evaluation = recipe.settings().to_settings()  # whose paths are absolute: a run keeps them
        recipe = dataclasses.replace(recipe, evaluation={key: evaluation[key] for key in recipe.evaluation})
    except (ValueError, TypeError) as error:
        raise ValueError(f"recipe {name}: {error}") from error
    return recipe


def _folder() -> Any:
    return resources.files(__package__.rpartition(".")[0]).joinpath(*_FOLDER)


def _recipe(name: str, content: dict[str, Any]) -> Recipe:
    """The parts, each known and of its kind."""
    for part in content:
        check_name("a part", part, _PARTS)
    missing = [part for part in ("title", "source", "variant", "training", "variants") if not content.get(part)]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; a recipe says what it is, whose, and what it trains")
    variants = {key: _variant(key, table) for key, table in content["variants"].items()}
    return Recipe(
        name=name,
        **{part: _of_kind(part, content[part], str) for part in ("title", "source", "variant")},
        ours=_ours(content.get("ours", [])),
        training=_of_kind("training", content["training"], dict),
        variants=variants,
        selection=_selection(content.get("sweep", {}), next(iter(variants))),
        evaluation=_of_kind("evaluation", content.get("evaluation", {}), dict),
    )


def _of_kind(name: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        wanted = {str: "a text", dict: "a table", list: "a list"}[kind]
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")
    return value


def _variant(name: str, table: dict[str, Any]) -> Variant:
    settings = dict(_of_kind(f"variants.{name}", table, dict))
    title = _of_kind(f"variants.{name}.title", settings.pop("title", name), str)
    reported = _of_kind(f"variants.{name}.reported", settings.pop("reported", {}), dict)
    return Variant(title, settings, {figure: float(value) for figure, value in reported.items()})


def _ours(entries: list[dict[str, Any]]) -> dict[str, str]:
    """Setting -> why, of all entries; each names settings that there are."""
    reasons: dict[str, str] = {}
    for entry in _of_kind("ours", entries, list):
        if set(entry) != {"settings", "why"}:
            raise ValueError(f"an entry of ours holds {', '.join(entry)}; it must hold settings and why")
        for setting in _of_kind("settings of ours", entry["settings"], list):
            part, dot, field = setting.partition(".")
            if dot:
                check_name("a part that is ours", part, ("evaluation", "sweep"))
                check_name(f"a setting of {part}", field, EVALUATION_FIELDS if part == "evaluation" else _SWEEP)
            else:
                check_name("a setting that is ours", setting, (*FIELDS, "variants"))
            reasons[setting] = _of_kind("why", entry["why"], str)
    return reasons


_SWEEP = ("grid", "baseline", "measure", "margin", "evaluation")


def _selection(table: dict[str, Any], first: str) -> Selection:
    for key in _of_kind("sweep", table, dict):
        check_name("a setting of sweep", key, _SWEEP)
    grid = _of_kind("sweep.grid", table.get("grid", {}), dict)
    for setting, values in grid.items():
        check_name("an axis of the grid", setting, FIELDS)
        if not _of_kind(f"sweep.grid.{setting}", values, list):
            raise ValueError(f"sweep.grid.{setting} is empty; give the values to try")
    margin = table.get("margin", 0.02)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
        raise ValueError(f"sweep.margin is {margin!r}; it must be a share of accuracy, at least 0 and below 1")
    return Selection(
        grid={setting: tuple(values) for setting, values in grid.items()},
        baseline=table.get("baseline", first),
        measure=_of_kind("sweep.measure", table.get("measure", "linf_accuracy"), str),
        margin=float(margin),
        evaluation=_of_kind("sweep.evaluation", table.get("evaluation", {}), dict),
    )


def _check(recipe: Recipe) -> None:
    """Every variant is a run that can be trained, every setting has an effect, and the evaluation is one."""
    check_name("variant", recipe.variant, recipe.variants)
    check_name("sweep.baseline", recipe.selection.baseline, recipe.variants)
    check_name("sweep.measure", recipe.selection.measure, FIGURES)
    configs = {}
    for name, variant in recipe.variants.items():
        if "seed" in variant.settings:
            raise ValueError(f"variants.{name} holds a seed; seeds are counted up from 0 by --seeds")
        try:
            configs[name] = recipe.config(name, {**_ELSEWHERE, **recipe.training, **variant.settings})
        except (ValueError, TypeError) as error:
            raise ValueError(f"variant {name}: {error}") from error
        for setting in variant.settings:
            _check_effect(f"{setting} of variant {name}", [configs[name].without_effect(setting)])
    for setting in (*recipe.training, *recipe.selection.grid):
        _check_effect(setting, [config.without_effect(setting) for config in configs.values()])
    for setting, values in recipe.selection.grid.items():
        for config in (config for config in configs.values() if config.without_effect(setting) is None):
            for value in values:
                dataclasses.replace(config, **{setting: value})
    recipe.settings()
    recipe.settings(choosing=True)


def _check_effect(setting: str, reasons: list[str | None]) -> None:
    if None not in reasons:
        raise ValueError(f"{setting} would have no effect: {reasons[0]}. Leave it out")
