"""The commands ``rds-fast sweep``, ``recipes`` and ``demo``: arguments in, tables and files out."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from ..evaluation.command import command_line
from ..evaluation.comparison import Comparison, compare
from ..evaluation.page import write
from ..evaluation.report import spoken
from ..evaluation.settings import FIELDS as EVALUATION_FIELDS
from ..evaluation.settings import EvaluationSettings
from ..evaluation.table import console, print_table, printable
from ..training.config import FIELDS, PLACE
from ..training.extras import require
from ..training.loop import TrainingInterrupted
from ..training.processes import check_one_process
from . import recipes as recipe_files
from . import words
from .chosen import measure_chosen
from .demo import chosen_weights, label
from .demo import demo as run_demo
from .demo_report import render
from .plan import Plan
from .sweep import SWEEP, average
from .sweep import sweep as run_sweep

typer = require("typer", "the command line")

DEFAULT_RECIPE = "block-mnist"
_KEYS = ("variant", *FIELDS, *(words.EVALUATION + name for name in EVALUATION_FIELDS))

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this one as it is, a TOML file.")] = None,
) -> None:
    """List the recipes: experiments that rds-fast train and sweep know by name, with their sources."""
    if name is not None:
        print(recipe_files.text(name), end="")
        return
    for each in recipe_files.names():
        recipe = recipe_files.load(each)
        print(f"{each}: {recipe.title}\n    source: {recipe.source}\n    variants: {', '.join(recipe.variants)}")


def sweep(
    recipe: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|KEY=V1,V2",
            help="A recipe of rds-fast recipes, or a TOML file (default: block-mnist). Settings: one value holds for "
            "all runs, several are an axis of the grid; variant=NAMES; evaluation.KEY=VALUE.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the sweep; one that was stopped goes on (default: runs/sweep-RECIPE)."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train each candidate with this many seeds, 0 and up.")] = 1,
    test: Annotated[bool, typer.Option("--test", help="Then measure the chosen runs on the test split.")] = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a recipe's variants over a grid of settings, and choose by one rule on the validation split.

    Chosen is, for each variant, the candidate of the highest accuracy under attack among those at most 2 points less
    accurate than the baseline, or what the recipe says instead.
    """
    check_one_process()
    require("rich.table", "the results")  # looked for before the work rather than after it
    name, assigned = words.split(recipe or (), _KEYS)
    loaded = recipe_files.load(name or DEFAULT_RECIPE)
    plan, evaluation = _plan(loaded, assigned, range(seeds), {"device": device, "threads": threads})
    while_choosing, in_the_end = loaded.settings(evaluation, choosing=True), loaded.settings(evaluation)
    out = out or Path("runs") / f"sweep-{loaded.name}"
    with _interruptible("the same command goes on"):
        record = run_sweep(plan, out, while_choosing, test=in_the_end if test else None, command=command_line())
        _print_sweep(record)
        if test:
            place = {name: value for name, value in plan.changes.items() if name in PLACE}
            found = measure_chosen(out, record, in_the_end, place=place)
            models = {_label(record, variant): figures for variant, figures in found.items()}
            print_table(f"{loaded.title}, test split", models, in_the_end)
            _print_reported(loaded, in_the_end)
    print(f"written: {out / SWEEP}")


def _plan(
    recipe: recipe_files.Recipe, assigned: Mapping[str, str], seeds: range, running: dict[str, Any]
) -> tuple[Plan, dict[str, Any]]:
    """The runs that the words ask for, and the settings of the evaluation that they change."""
    changes = {name: value for name, value in running.items() if value is not None}
    axes: dict[str, list[Any]] = {}
    evaluation: dict[str, Any] = {}
    for key, text in assigned.items():
        if key == "variant":
            continue
        if key.startswith(words.EVALUATION):
            evaluation[key.removeprefix(words.EVALUATION)] = words.value(key, text)
        elif words.is_several(key) or key in PLACE:  # which is no axis, and a path may have a comma in it
            changes[key] = words.value(key, text)
        else:
            values = [words.value(key, part) for part in text.split(",")]
            if len(values) > 1 or key in recipe.selection.grid:
                axes[key] = values
            else:
                changes[key] = values[0]
    variants = assigned["variant"].split(",") if "variant" in assigned else ()
    return Plan(recipe, changes, axes, variants, tuple(seeds)), evaluation


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demonstration; an earlier one is replaced.")] = Path(
        "runs/demo"
    ),
    weights: Annotated[
        Path | None,
        typer.Option(help="Record of another sweep, its sweep.json or its folder; default: the one shipped."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each run; default: as in the sweep.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train each model with this many seeds, 0 and up.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of each attack.")] = EvaluationSettings.steps,
    limit: Annotated[int | None, typer.Option(help="Measure this many samples, not the whole split.")] = None,
    device: Device = "auto",
    threads: Threads = 1,  # so small a model gains little by two, and loses much where another program has one
) -> None:
    """Train and compare four models on real digits, and write a report with pictures.

    Cross-entropy alone, two input-gradient penalties and the density penalty, on BlockMNIST, measured on the test
    split, with the weights that rds-fast sweep chose on the validation split.
    """
    check_one_process()
    for module in ("rich.table", "matplotlib"):
        require(module, "the results")
    started = time.perf_counter()
    settings = EvaluationSettings(steps=steps, limit=limit)
    record = chosen_weights(weights)
    with _interruptible("the same command begins again"):
        models = run_demo(out, record, settings, seeds=range(seeds), epochs=epochs, device=device, threads=threads)
    found = compare([trained.run_dir for each in models.values() for trained in each])
    duel = (label(record, "density"), label(record, "target-logit"))
    _print_demo(found, duel)
    commands = [f"{record['command']}   # chose the weights, on the validation split", command_line()]
    page = out / "report.html"
    write(page, render(found, record, commands, duel=duel))
    print(f"\nreport: {page.resolve()}   ({time.perf_counter() - started:.0f} s in all)")


def _print_demo(found: Comparison, duel: tuple[str, str]) -> None:
    title = f"{found.first.training.data}, {found.first.evaluation.samples} test samples"
    several = len(found.groups[0].runs)
    seeds = f"mean ± standard error over {several} seeds" if several > 1 else "one seed"
    print_table(title, found.models, found.settings, f"{seeds}; the best of each column is bold")
    for sentence in spoken(found, duel):
        print(f"- {sentence}")


@contextlib.contextmanager
def _interruptible(advice: str) -> Iterator[None]:
    """Ends with a line that says how to go on, where Ctrl-C stops a training."""
    try:
        yield
    except TrainingInterrupted:
        print(f"\nstopped; {advice}: {command_line()}", file=sys.stderr)
        raise typer.Exit(130) from None


def _print_sweep(record: Mapping[str, Any]) -> None:
    measure = record["selection"]["measure"]
    table = require("rich.table", "the table of results").Table(
        title="validation split; chosen candidates in bold", caption=record["rule"]
    )
    for heading in ("variant", "settings", "accuracy", measure, ""):
        table.add_column(heading, justify="right" if heading in ("accuracy", measure) else "left")
    for variant, choice in record["choices"].items():
        for settings in record["points"][variant]:
            candidate = average(record["trials"], variant, settings, record["seeds"], measure)
            figures = ("diverged", "") if candidate is None else _percent(candidate.accuracy, candidate.measure)
            chosen = settings == choice["settings"]
            cells = (record["variants"][variant]["title"], _shown(settings), *figures)
            cells += (_remark(choice) if chosen else "",)
            table.add_row(*map(printable, cells), style="bold" if chosen else None)
    console().print(table)


def _print_reported(recipe: recipe_files.Recipe, settings: EvaluationSettings) -> None:
    """What the source says of the variants, to be set beside what was measured."""
    reported: dict[str, list[Mapping[str, float | None]]] = {
        variant.title: [dict(variant.reported)] for variant in recipe.variants.values() if variant.reported
    }
    if reported:
        print_table("as the source reports", reported, settings, recipe.source)


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "–"


def _label(record: Mapping[str, Any], variant: str) -> str:
    """What a table calls the chosen models of a variant."""
    title, settings = record["variants"][variant]["title"], record["choices"][variant]["settings"]
    return f"{title}, {_shown(settings)}" if settings else title


def _percent(*accuracies: float) -> tuple[str, ...]:
    return tuple(f"{100 * accuracy:.1f}%" for accuracy in accuracies)


def _remark(choice: Mapping[str, Any]) -> str:
    if not choice["within_margin"]:
        return "chosen; none is within the margin of the baseline"
    return "chosen; at the edge of the candidates" if choice["at_edge"] else "chosen"
