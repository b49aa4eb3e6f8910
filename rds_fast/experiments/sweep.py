"""A sweep: every run of a plan, trained and measured on the validation split, and the choice among them.

What is done is told by the files alone: a run by its model, its figures by sweep.json or, where the process died
between the two, by its evaluation.json. So a sweep may be killed at any moment; the same command goes on, and neither
repeats nor loses a run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation import record as evaluations
from ..evaluation.evaluate import evaluate_run, measurable
from ..evaluation.metrics import FIGURES, METRICS
from ..evaluation.settings import ALL, EvaluationSettings
from ..training import data, runs
from ..training.checkpoints import write_atomically
from ..training.config import FIELDS, PATHS, PLACE, TrainingConfig, as_meant
from ..training.data.lists import read_text
from ..training.devices import cpu_threads, resolve_device
from ..training.loop import NonFiniteError, train
from ..training.processes import alone
from .choice import Candidate, choose, rule
from .plan import Plan, Trial, key, plain

SWEEP = "sweep.json"
ANOTHER = "another sweep"
_PARTS = (
    *("rule", "command", "training", "variants", "selection", "evaluation", "device"),
    *("trials", "seeds", "points", "choices"),
)

Record = dict[str, Any]
Scalars = dict[str, float | None]


def sweep(
    plan: Plan,
    out: str | Path,
    settings: EvaluationSettings,
    *,
    test: EvaluationSettings | None = None,
    command: str = "",
    report: Callable[[str], None] = print,
) -> Record:
    """Train and evaluate every run of a plan that is not done yet, and choose; the record is ``out/sweep.json``.

    Args:
        plan: the runs.
        out: a folder; each run goes below it. A sweep that was stopped goes on from there, with more runs if need be.
        settings: of the evaluation on the validation split.
        test: of that on the test split, where one follows: what is wrong with it is said before any run.
        command: the command line, for the record.
        report: is told of each run as it is done.

    Returns:
        The record: ``trials`` (one a run), ``choices`` (one a variant), and all that decided them.

    Raises:
        ValueError: ``out`` holds a sweep made with other settings, or one that is running, or every run of a variant
            diverged; or an evaluation does not fit the data, or does not give what is to be chosen by.
    """
    _check_measured(plan.recipe.selection.measure, settings)
    out = Path(out)
    fresh = _fresh(plan, settings)
    with alone(out, ANOTHER):
        return _sweep(plan, out, settings, test, fresh, command, report)


def _check_measured(measure: str, settings: EvaluationSettings) -> None:
    named = settings.metrics or tuple(name for name, metric in METRICS.items() if metric.unasked)
    for figure in ("accuracy", measure):
        if FIGURES[figure] not in named and ALL not in named:
            raise ValueError(
                f"the sweep chooses by {figure} and metrics is {','.join(named)}; add {FIGURES[figure]}, which gives it"
            )


def _sweep(
    plan: Plan,
    out: Path,
    settings: EvaluationSettings,
    test: EvaluationSettings | None,
    fresh: Record,
    command: str,
    report: Callable[[str], None],
) -> Record:
    record = _open(out / SWEEP, fresh)
    for folder in (out, *(out / trial.name for trial in plan.trials)):
        runs.remove_temporaries(folder)
    done = {key(trial["variant"], trial["settings"], trial["seed"]) for trial in record["trials"]}
    missing = [trial for trial in plan.trials if trial.key not in done]
    loaded = Loaded()
    for number, trial in enumerate(missing, 1):
        for split, wanted in (("validation", settings), ("test", test)):  # now, not when the training is done
            if wanted is not None:
                measurable(loaded.splits(trial.config), split, wanted, trial.config.data_root)
        found = _try(trial, out / trial.name, settings, plan.recipe.evaluation, loaded)
        record["trials"].append(
            {"variant": trial.variant, "settings": dict(trial.settings), "seed": trial.seed, **found}
        )
        write(out / SWEEP, record)
        report(f"[{number}/{len(missing)}] {trial.name}: {_told(found, plan.recipe.selection.measure)}")
    record |= {"command": command, "seeds": list(plan.seeds), "points": _points(plan)}
    record["choices"] = choices(record)
    write(out / SWEEP, record)
    return record


class Loaded:
    """The data of the last run, since those of the next are mostly the same."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._splits: data.Splits | None = None

    def splits(self, config: TrainingConfig) -> data.Splits:
        """What ``config.load_data()`` gives; raises as that does."""
        names = [name for name, field in FIELDS.items() if field.metadata["group"] == "Data"]
        wanted = tuple(getattr(config, name) for name in (*names, "workers"))
        if self._splits is None or self._key != wanted:
            self._splits, self._key = config.load_data(), wanted
        return self._splits


def _try(
    trial: Trial, run_dir: Path, settings: EvaluationSettings, of_recipe: Mapping[str, Any], loaded: Loaded
) -> dict[str, Any]:
    """The figures of a run, or the error by which it ended; ``of_recipe``: how it is to be measured in the end."""
    if (run_dir / runs.MODEL).exists():
        runs.check_same(run_dir, trial.config)
        if (figures := _measured(run_dir, settings)) is not None:
            return {"figures": figures}
    splits = loaded.splits(trial.config)
    if not (run_dir / runs.MODEL).exists():
        try:
            begun = (run_dir / runs.CONFIG).exists()
            train(trial.config, run_dir, resume=begun, quiet=True, splits=splits, evaluation=of_recipe)
        except NonFiniteError as error:  # it would end so again: no reason to stop the others
            return {"error": str(error)}
    return {"figures": evaluate(run_dir, trial.config, settings, "validation", splits)}


def evaluate(
    run_dir: Path, config: TrainingConfig, settings: EvaluationSettings, split: str, splits: data.Splits
) -> Scalars:
    """The figures of a finished run, computed where and as it was trained."""
    with cpu_threads(config.threads):
        return evaluate_run(
            run_dir, settings, split=split, device=config.device, splits=splits, place=config.place
        ).scalars


def _measured(run_dir: Path, settings: EvaluationSettings) -> Scalars | None:
    """The figures in evaluation.json, if they are those that are wanted."""
    try:
        found = evaluations.read(run_dir)
    except (FileNotFoundError, ValueError):
        return None
    same = (found.split, found.settings.wherever()) == ("validation", settings.wherever())
    return found.evaluation.scalars if same else None


def choices(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The choice for each variant, the baseline too, from the trials of the record's points and seeds.

    Raises:
        ValueError: every run of a variant diverged, or the evaluation has no figure to choose by.
    """
    selection = record["selection"]
    found = {variant: candidates(record, variant) for variant in record["points"]}
    for variant, those in found.items():
        if not those:
            raise ValueError(f"every run of {variant} diverged, so there is nothing to choose from; try other settings")
    accuracy = max(candidate.accuracy for candidate in found[selection["baseline"]])
    return {variant: choose(those, accuracy, selection["margin"])._asdict() for variant, those in found.items()}


def candidates(record: Mapping[str, Any], variant: str) -> list[Candidate]:
    """The points of a variant's grid of which no run diverged, with their figures."""
    measure = record["selection"]["measure"]
    each = (average(record["trials"], variant, point, record["seeds"], measure) for point in record["points"][variant])
    return [candidate for candidate in each if candidate is not None]


def average(
    trials: Sequence[Mapping[str, Any]], variant: str, settings: Mapping[str, Any], seeds: Sequence[int], measure: str
) -> Candidate | None:
    """A point's figures, averaged over the seeds; None if one of its runs diverged.

    Raises:
        ValueError: the evaluation has no such measure, or no accuracy.
    """
    wanted = {key(variant, settings, seed) for seed in seeds}
    of_point = [trial for trial in trials if key(trial["variant"], trial["settings"], trial["seed"]) in wanted]
    if any("error" in trial for trial in of_point):
        return None
    for name in ("accuracy", measure):
        if any(trial["figures"].get(name) is None for trial in of_point):
            had = ", ".join(of_point[0]["figures"])
            raise ValueError(f"the evaluation has no {name} to choose by; it has {had}. Name the metric that gives it")
    means = (statistics.fmean(trial["figures"][name] for trial in of_point) for name in ("accuracy", measure))
    return Candidate(settings, *means)


def _told(found: Mapping[str, Any], measure: str) -> str:
    if "error" in found:
        return f"diverged ({found['error']})"
    present = {name: found["figures"].get(name) for name in ("accuracy", measure)}
    return ", ".join(f"{name} {100 * value:.1f}%" for name, value in present.items() if value is not None)


def _open(path: Path, fresh: Record) -> Record:
    """The record of a new sweep, or of the one to go on with, which may be at another place now.

    Raises:
        ValueError: it is damaged, or of a sweep with other settings.
    """
    if not path.exists():
        return fresh
    record = read(path)
    before, now = _of_experiment(record), _of_experiment(fresh)
    differing = [part for part in now if part in before and before[part] != now[part]]
    if differing:
        raise ValueError(f"{path} is of a sweep with other settings ({', '.join(differing)}); give another --out")
    here = {name: fresh[name] for name in ("training", "evaluation", "device")}
    return record | here | {"variants": record["variants"] | fresh["variants"]}


def _of_experiment(record: Record) -> dict[str, Any]:
    """What makes a sweep this one wherever it runs: the parts of its record, and each variant by its name."""
    evaluation = EvaluationSettings.from_settings(record["evaluation"]).wherever()
    parts = {"training": _movable(record["training"]), "selection": record["selection"], "evaluation": evaluation}
    variants = record["variants"].items()
    return parts | {name: each | {"settings": _movable(each["settings"])} for name, each in variants}


def _movable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that do not belong to the place."""
    return {name: value for name, value in settings.items() if name not in PLACE}


def read(path: Path) -> Record:
    """The record in a file.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    return parse(read_text(path), str(path))


def parse(content: str, shown: str) -> Record:
    """The record in a file's content; ``shown`` names the file.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{shown} is damaged ({error!r}); move it away, or give another --out") from error
    if not isinstance(record, dict) or not set(_PARTS) <= set(record):
        raise ValueError(f"{shown} is no record of a sweep, or of another version; run 'rds-fast sweep' elsewhere")
    return record


def _fresh(plan: Plan, settings: EvaluationSettings) -> Record:
    recipe, selection = plan.recipe, plan.recipe.selection
    training = {**recipe.training, **plan.changes}
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "source": recipe.source,
        "rule": rule(selection.measure, selection.margin, plan.baseline),
        "command": "",
        "training": {
            name: plain(as_meant(name, value))
            for name, value in training.items()
            if name in PATHS or name not in PLACE  # where the data lie, for the demonstration
        },
        "variants": {
            name: {"title": recipe.variants[name].title, "settings": plain(recipe.variants[name].settings)}
            for name in plan.variants
        },
        "selection": {"baseline": plan.baseline, "measure": selection.measure, "margin": selection.margin},
        "evaluation": settings.to_settings(),
        "split": "validation",
        "device": resolve_device(plan.trials[0].config.device).type,
        "versions": runs.versions(),
        "trials": [],
        "seeds": list(plan.seeds),
        "points": _points(plan),
        "choices": {},
    }


def _points(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    return {variant: [settings for settings, _ in plan.points(variant)] for variant in plan.variants}


def write(path: Path, record: Record) -> None:
    """Write a record, at once or not at all."""
    write_atomically(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
