"""The chosen runs of a sweep, measured on the test split. Nothing is chosen any more when this begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..evaluation.settings import EvaluationSettings
from ..training import runs
from ..training.processes import alone
from .plan import folder, key
from .sweep import ANOTHER, SWEEP, Loaded, Record, Scalars, evaluate, write


def chosen_runs(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], int]]:
    """(variant, settings of the grid, seed) of every run that was chosen."""
    for variant, choice in record["choices"].items():
        for seed in record["seeds"]:
            yield variant, choice["settings"], seed


def measure_chosen(
    out: str | Path,
    record: Record,
    settings: EvaluationSettings,
    *,
    place: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, list[Scalars]]:
    """Measure the chosen runs on the test split, but for those that are measured; the record keeps the figures.

    Args:
        out: the folder of the sweep.
        record: of the sweep, finished; its ``tests`` are added to and written to the disk.
        settings: of the evaluation; figures of other settings are dropped.
        place: settings of the training that belong to the place, where they differ from the runs' own.
        report: is told of each run as it is done.

    Returns:
        variant -> the figures of its runs, one a seed.

    Raises:
        FileNotFoundError: a run was removed.
    """
    with alone(Path(out), ANOTHER):
        return _measure_chosen(Path(out), record, settings, place or {}, report)


def _measure_chosen(
    out: Path, record: Record, settings: EvaluationSettings, place: Mapping[str, Any], report: Callable[[str], None]
) -> dict[str, list[Scalars]]:
    loaded = Loaded()
    before = record.get("test_evaluation")
    if before is None or EvaluationSettings.from_settings(before).wherever() != settings.wherever():
        record |= {"test_evaluation": settings.to_settings(), "tests": []}
    done = {key(test["variant"], test["settings"], test["seed"]): test["figures"] for test in record["tests"]}
    found: dict[str, list[Scalars]] = {}
    for variant, point, seed in chosen_runs(record):
        if key(variant, point, seed) not in done:
            run_dir = out / folder(variant, point, seed)
            config = dataclasses.replace(runs.read_config(run_dir), **place)
            figures = evaluate(run_dir, config, settings, "test", loaded.splits(config))
            done[key(variant, point, seed)] = figures
            record["tests"].append({"variant": variant, "settings": dict(point), "seed": seed, "figures": figures})
            write(out / SWEEP, record)
            report(f"{run_dir.name}: measured on the test split")
        found.setdefault(variant, []).append(done[key(variant, point, seed)])
    return found
