"""The commands ``rds-fast sweep`` and ``demo``: arguments in, tables and files out."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from ..training.checkpoints import write_atomically
from ..training.config import TrainingConfig
from ..training.extras import require
from ..training.loop import TrainingInterrupted
from .command import command_line
from .comparison import Comparison, compare
from .demo import chosen_weights, label
from .demo import demo as run_demo
from .demo_report import render
from .report import spoken
from .settings import EvaluationSettings
from .sweep import BASELINE, OBJECTIVES, PENALTIES, SWEEP, WEIGHTS, average
from .sweep import sweep as run_sweep
from .table import console, print_table

typer = require("typer", "the command line")

_DEFAULTS = EvaluationSettings()

Linf = Annotated[float, typer.Option("--linf", help="Radius of the L∞ attack; inputs are in [0, 1].")]
L2 = Annotated[float, typer.Option("--l2", help="Radius of the L2 attack.")]
Steps = Annotated[int, typer.Option(help="Steps of each attack.")]
AttackSeed = Annotated[int, typer.Option("--attack-seed", help="Seed of the attacks' random starts.")]
Limit = Annotated[int | None, typer.Option(help="Measure this many samples, drawn at random, not the whole split.")]
BatchSize = Annotated[int, typer.Option(help="Samples measured at a time.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]


def sweep(
    out: Annotated[Path, typer.Option(help="Folder of the sweep; one that was stopped goes on.")] = Path("runs/sweep"),
    objective: Annotated[
        list[str] | None, typer.Option(help=f"Penalties to sweep over, of {', '.join(PENALTIES)}; default: all.")
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(help=f"Candidate weights, the same for all; default: {', '.join(f'{w:g}' for w in WEIGHTS)}."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train each candidate with this many seeds, 0 and up.")] = 1,
    data: Annotated[str, typer.Option(help="Data set, as of rds-fast train.")] = TrainingConfig.data,
    data_root: Annotated[Path | None, typer.Option(help="Folder of IDX files.")] = None,
    model: Annotated[str, typer.Option(help="Model, as of rds-fast train.")] = TrainingConfig.model,
    epochs: Annotated[int, typer.Option(help="Epochs of each run.")] = TrainingConfig.epochs,
    linf: Linf = _DEFAULTS.linf_epsilon,
    l2: L2 = _DEFAULTS.l2_epsilon,
    steps: Steps = _DEFAULTS.steps,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Choose the penalties' weights by one rule on the validation split.

    Trains cross-entropy alone and every penalty with every candidate weight. Chosen is, for each penalty, the weight
    of the highest accuracy under L∞ PGD among those at most 2 points less accurate than cross-entropy alone.
    """
    _require_output()
    base = TrainingConfig(
        data=data,
        data_root=str(data_root) if data_root else None,
        model=model,
        epochs=epochs,
        device=device,
        threads=threads,
    )
    with _interruptible("the same command goes on"):
        record = run_sweep(
            out,
            base,
            EvaluationSettings(linf_epsilon=linf, l2_epsilon=l2, steps=steps),
            objectives=objective or PENALTIES,
            weights=weight or WEIGHTS,
            seeds=range(seeds),
            command=command_line(),
        )
    _print_sweep(record)
    print(f"written: {out / SWEEP}")


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
    steps: Steps = _DEFAULTS.steps,
    limit: Limit = None,
    device: Device = "auto",
    threads: Threads = 1,  # so small a model gains little by two, and loses much where another program has one
) -> None:
    """Train and compare four models on real digits, and write a report with pictures.

    Cross-entropy alone, two input-gradient penalties and the density penalty, on BlockMNIST, measured on the test
    split, with the weights that rds-fast sweep chose on the validation split.
    """
    _require_output("matplotlib")
    started = time.perf_counter()
    settings = EvaluationSettings(steps=steps, limit=limit)
    record = chosen_weights(weights)
    with _interruptible("the same command begins again"):
        models = run_demo(out, record, settings, seeds=range(seeds), epochs=epochs, device=device, threads=threads)
    found = compare([trained.run_dir for each in models.values() for trained in each])
    duel = (label("density", models["density"]), label("target-logit", models["target-logit"]))
    _print_demo(found, duel)
    commands = [f"{record['command']}   # chose the weights, on the validation split", command_line()]
    page = out / "report.html"
    write_atomically(page, render(found, record, commands, duel=duel).encode())
    print(f"\nreport: {page.resolve()}   ({time.perf_counter() - started:.0f} s in all)")


def _print_demo(found: Comparison, duel: tuple[str, str]) -> None:
    title = f"{found.first.training.data}, {found.first.evaluation.samples} test samples"
    several = len(found.groups[0].runs)
    seeds = f"mean ± standard error over {several} seeds" if several > 1 else "one seed"
    print_table(title, found.models, found.settings, f"{seeds}; the best of each column is bold")
    for sentence in spoken(found, duel):
        print(f"- {sentence}")


def _require_output(*modules: str) -> None:
    """What prints the results, looked for before the work rather than after it."""
    for module in ("rich.table", *modules):
        require(module, "the results")


@contextlib.contextmanager
def _interruptible(advice: str) -> Iterator[None]:
    """Ends with a line that says how to go on, where Ctrl-C stops a training."""
    try:
        yield
    except TrainingInterrupted:
        print(f"\nstopped; {advice}: {command_line()}", file=sys.stderr)
        raise typer.Exit(130) from None


def _print_sweep(record: dict[str, Any]) -> None:
    rich_table = require("rich.table", "the table of results")
    table = rich_table.Table(title="validation split; chosen weights in bold", caption=record["rule"])
    for heading in ("objective", "weight", "accuracy", "PGD L∞", ""):
        table.add_column(heading, justify="left" if heading in ("objective", "") else "right")
    baseline = average(record["trials"], BASELINE, 0.0, record["seeds"])
    table.add_row(OBJECTIVES[BASELINE].title, "–", *_percent(baseline.accuracy, baseline.linf_accuracy), "")
    for name, choice in record["choices"].items():
        for weight in record["weights"]:
            candidate = average(record["trials"], name, weight, record["seeds"])
            chosen = weight == choice["weight"]
            cells = (OBJECTIVES[name].title, f"{weight:g}", *_percent(candidate.accuracy, candidate.linf_accuracy))
            table.add_row(*cells, _remark(choice) if chosen else "", style="bold" if chosen else None)
    console().print(table)


def _percent(*accuracies: float) -> tuple[str, ...]:
    return tuple(f"{100 * accuracy:.1f}%" for accuracy in accuracies)


def _remark(choice: dict[str, Any]) -> str:
    if not choice["within_margin"]:
        return "chosen; none is within 2 points of cross-entropy"
    return "chosen; at the edge of the candidates" if choice["at_edge"] else "chosen"
