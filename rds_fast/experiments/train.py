"""``rds-fast train``. Its options are the fields of TrainingConfig, so that each is described once."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training import runs
from ..training.config import FIELDS, TrainingConfig
from ..training.fields import option, put_options
from ..training.loop import TrainingInterrupted
from ..training.loop import train as train_model
from ..training.processes import check_one_process
from . import recipes, words

_KEYS = ("variant", *FIELDS)


def _option(name: str) -> inspect.Parameter:
    """A field as an option; one of several values is repeated."""
    if name.endswith("_milestones"):
        return option(FIELDS[name], list[int], ["--" + name.replace("_", "-").removesuffix("s")])
    return option(FIELDS[name], typing.get_type_hints(TrainingConfig)[name])


def train(
    recipe: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|KEY=VALUE",
            help="A recipe of rds-fast recipes, or a TOML file; settings as key=value, variant=NAME among them.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/last"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder, with its settings.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    **settings: Any,
) -> None:
    """Train a classifier with or without a penalty on its input gradient, and keep all that is needed to go on.

    What is not given is as in the recipe, or has the default that stands here.
    """
    check_one_process()
    name, assigned = _split(recipe or ())
    given = {name: value for name, value in settings.items() if value is not None and value != []}
    config = _config(name, _together(given, assigned), out if resume else None)
    evaluation = recipes.load(name).evaluation if name else {}
    try:
        result = train_model(config, out, resume=resume, overwrite=overwrite, quiet=quiet, evaluation=evaluation)
    except TrainingInterrupted as interruption:
        print(f"\n{interruption}. To go on:\n  {_resume_command(out)}", file=sys.stderr)
        raise typer.Exit(130) from None
    length = f"{config.epochs} epochs" if config.steps is None else f"{config.steps} steps"
    print(
        f"validation accuracy {100 * result.validation_accuracy:.1f}% after {length}, "
        f"{result.seconds:.1f} s of training; the model is {out / runs.MODEL}"
    )


def _split(given: list[str] | tuple[()]) -> words.Words:
    """The recipe and the settings of training, none of them the evaluation's."""
    for word in given:
        if word.startswith(words.EVALUATION):
            raise ValueError(f"{word} is given, and training measures the accuracy alone; rds-fast sweep takes it")
    return words.split(given, _KEYS)


def _together(given: Mapping[str, Any], assigned: Mapping[str, str]) -> dict[str, Any]:
    """The settings of the options and of the words, none of them in both."""
    for name in given:
        if name in assigned:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{name} is given twice, as {flag} and as {name}={assigned[name]}; give it once")
    variant = {"variant": assigned["variant"]} if "variant" in assigned else {}
    return {**given, **words.values({key: text for key, text in assigned.items() if key != "variant"}), **variant}


def _config(recipe: str | None, given: dict[str, Any], resumed: Path | None) -> TrainingConfig:
    """The settings of the run, each of those given having an effect.

    Raises:
        ValueError: one is wrong, or has no effect beside the others.
    """
    variant = given.pop("variant", None)
    if recipe is not None:
        config = recipes.load(recipe).config(variant, given)
    elif variant is not None:
        raise ValueError(f"variant={variant} is given without a recipe; give one: {', '.join(recipes.names())}")
    else:
        config = dataclasses.replace(runs.read_config(resumed), **given) if resumed else TrainingConfig(**given)
    config.check_effects(given)
    return config


def _resume_command(out: Path) -> str:
    """The command that goes on, in the way this one was called."""
    called = Path(sys.argv[0]).name
    program = ["python", "-m", "rds_fast"] if called == "__main__.py" else [called]
    return shlex.join([*program, "train", "--out", str(out), "--resume"])


put_options(train, "settings", map(_option, FIELDS))
