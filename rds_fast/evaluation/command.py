"""``rds-fast evaluate`` and ``compare``. The options of evaluate are the fields of EvaluationSettings."""

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
from ..training.config import FIELDS as TRAINING_FIELDS
from ..training.config import TrainingConfig
from ..training.devices import cpu_threads
from ..training.extras import require
from ..training.fields import option, put_options
from . import comparison, report, table
from . import page as html_page  # an option of evaluate is called page
from .evaluate import evaluate_run
from .metrics import METRICS
from .settings import ALL, FIELDS, EvaluationSettings

# What loading the data takes of the place; device and threads are options of their own.
_PLACE = ("data_root", "download", "workers")


def _option(name: str) -> inspect.Parameter:
    """A setting as an option; several values have commas between them."""
    kind, remark = typing.get_type_hints(EvaluationSettings)[name], ""
    if typing.get_origin(kind) is tuple:
        kind, remark = str, "Separated by commas."
    flags = ("--" + name.replace("_", "-"), *FIELDS[name].metadata["flags"])
    return option(FIELDS[name], kind, flags, names=(*METRICS, ALL) if name == "metrics" else (), remark=remark)


def _option_of_place(name: str) -> inspect.Parameter:
    """A setting of the training as an option: where its data lie now, and how they are read there."""
    return option(TRAINING_FIELDS[name], typing.get_type_hints(TrainingConfig)[name])


def settings_from(options: dict[str, Any], of_run: Mapping[str, Any] | None = None) -> EvaluationSettings:
    """The settings that the options given ask for, the rest being those that belong to the run, or the defaults.

    Raises:
        ValueError: a value is unknown, out of range or no number where one is needed.
    """
    given = {name: value for name, value in options.items() if value is not None}
    hints = typing.get_type_hints(EvaluationSettings)
    for name, value in given.items():
        if typing.get_origin(hints[name]) is tuple:
            given[name] = _several(name, value, typing.get_args(hints[name])[0])
    return EvaluationSettings.from_settings({**(of_run or {}), **given})


def _several(name: str, text: str, kind: Any) -> tuple[Any, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return tuple(kind(part) for part in parts)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; it must be numbers with commas between them") from error


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    *,
    split: Annotated[str, typer.Option(help="test, or validation while anything is still to be chosen.")] = "test",
    page: Annotated[bool, typer.Option("--page/--no-page", help=f"Write {runs.EVALUATION_PAGE} as well.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.")] = None,
    **options: Any,
) -> None:
    """Measure a trained model: accuracy, robustness, attributions, calibration.

    What is not given is as in the recipe that the run was trained by, or has the default that stands here. Prints a
    table and writes evaluation.json and evaluation.html, a page that needs no other file, into the run's folder.
    """
    place = {name: value for name in _PLACE if (value := options.pop(name)) is not None}
    settings = settings_from(options, runs.read_evaluation_settings(run))
    _require_output(*(["matplotlib"] if page else []))
    config = dataclasses.replace(runs.read_config(run), **place)
    config.check_effects(place)
    splits = runs.load_data(run, config) if (run / runs.MODEL).is_file() else None  # else evaluate_run says so
    with cpu_threads(threads):
        evaluate_run(run, settings, split=split, device=device, splits=splits, place=place, report=_to_stderr)
        found = comparison.compare([run])
        _print(found, run.name)
        print(f"written: {run / runs.EVALUATION}")
        if page:
            lead = report.lead_of(found)
            content = report.render(found, title=run.name, lead=lead, splits=splits, commands=[command_line()])
            html_page.write(run / runs.EVALUATION_PAGE, content)
            print(f"report: {(run / runs.EVALUATION_PAGE).resolve()}")


def compare(
    run: Annotated[list[Path], typer.Argument(help="Folders of evaluated runs.", show_default=False)],
    *,
    out: Annotated[
        Path | None,
        typer.Option(help="The page (default: comparison.html, or none with --markdown or --csv).", show_default=False),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print the figures as CSV, with every digit.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Compare runs that differ in data, split, samples or the evaluation.")
    ] = False,
    data_root: Annotated[
        str | None,
        typer.Option(help="Folder of the data's files, for the page's maps, where they lie elsewhere now."),
    ] = None,
) -> None:
    """Set evaluated runs side by side: a table, curves and attribution maps.

    Runs that differ in nothing but the seed are one row, with mean and standard error. The best of each column is
    bold.
    """
    if markdown and csv:
        raise ValueError("--markdown and --csv are both given; the table is printed once, so give one of them")
    wants_page = out is not None or not (markdown or csv)
    if data_root is not None and not wants_page:
        raise ValueError("--data-root is given and no page is written, which alone shows images; give --out")
    _require_output(*(["matplotlib"] if wants_page else []))
    found = comparison.compare(run, force=force)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if markdown:
        print(table.markdown(found.models, found.settings), end="")
    elif csv:
        print(table.comma_separated(found.models, found.settings), end="")
    else:
        _print(found, found.first.training.data)
    if wants_page:
        path = out or Path("comparison.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        names = dict.fromkeys(group.training.data for group in found.groups)
        title, lead = f"Comparison on {', '.join(names)}", report.lead_of(found)
        splits = None
        if data_root is not None:
            splits = dataclasses.replace(found.first.training, data_root=data_root).load_data()
        content = report.render(found, title=title, lead=lead, splits=splits, commands=[command_line()])
        html_page.write(path, content)
        _to_stderr(f"report: {path.resolve()}")


def _print(found: comparison.Comparison, name: str) -> None:
    """The table, what follows from it, and the notes."""
    first, several = found.first, any(len(group.runs) > 1 for group in found.groups)
    title = f"{name}, {first.evaluation.samples} {first.split} samples"
    captions = ["mean ± standard error over the seeds"] if several else []
    captions += ["the best of each column is bold"] if len(found.groups) > 1 else []
    table.print_table(title, found.models, found.settings, "; ".join(captions) or None)
    for sentence in [*report.spoken(found), *report.notes_of(found)]:
        print(f"- {sentence}")


def _require_output(*modules: str) -> None:
    """What prints the results, looked for before the work rather than after it."""
    for module in ("rich.table", *modules):
        require(module, "the results")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def command_line() -> str:
    """The command that is running, as a user would type it."""
    return shlex.join(["rds-fast", *sys.argv[1:]])


put_options(evaluate, "options", [*map(_option, FIELDS), *map(_option_of_place, _PLACE)])
