"""Choosing the penalties' weights: as many candidates for each objective, one rule, the validation split alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..training import data, runs
from ..training.checkpoints import write_atomically
from ..training.config import RESUMABLE_CHANGES, TrainingConfig
from ..training.devices import cpu_threads, resolve_device
from ..training.loop import train
from ..training.names import check_name
from .evaluate import evaluate_run
from .settings import EvaluationSettings

SWEEP = "sweep.json"
BASELINE = "cross-entropy"
MARGIN = 0.02
RULE = (
    "highest accuracy under L-inf PGD among the weights whose accuracy is at most 2 points below that of cross-entropy "
    "alone (if there is none: the weight of the highest accuracy); means over the seeds, on the validation split"
)

# The candidates of every penalty, from one that changes little to one that costs accuracy. A choice that is the first
# or the last of them is flagged.
WEIGHTS = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0)


class Objective(NamedTuple):
    """What the settings call an objective, and what it is called before readers."""

    title: str
    settings: dict[str, Any]


# Every penalty is the plain 2-norm of a gradient (p = 2, power = 1), so that nothing but the gradient differs.
OBJECTIVES = {
    BASELINE: Objective("cross-entropy", {"objective": "cross-entropy"}),
    "target-logit": Objective("target logit ‖∇ f_y‖", {"objective": "input-gradient", "of": "target_logit"}),
    "input-gradient": Objective("input gradient ‖∇ CE‖", {"objective": "input-gradient", "of": "cross_entropy"}),
    "density": Objective("density ‖∇ log p‖", {"objective": "density", "method": "exact"}),
    "density-fd": Objective("density, Taylor", {"objective": "density", "method": "finite_difference"}),
}
PENALTIES = tuple(name for name in OBJECTIVES if name != BASELINE)


class Candidate(NamedTuple):
    """One weight of one objective, its figures being means over the seeds."""

    objective: str
    weight: float
    accuracy: float
    linf_accuracy: float


class Choice(NamedTuple):
    """The weight chosen for an objective.

    Attributes:
        within_margin: it is at most 2 points less accurate than cross-entropy alone; else no candidate is.
        at_edge: it is the smallest or the largest candidate, so a better one may lie beyond.
    """

    weight: float
    within_margin: bool
    at_edge: bool


def choose(candidates: Sequence[Candidate], baseline_accuracy: float) -> Choice:
    """Apply the rule to the candidates of one objective.

    Equal figures are resolved for the more accurate candidate, then for the smaller weight, which changes less.

    Raises:
        ValueError: there are no candidates.
    """
    if not candidates:
        raise ValueError("there are no candidates to choose from")
    # Accuracies are ratios of whole numbers; without the slack 0.91 would not be within 0.02 of 0.93.
    eligible = [c for c in candidates if c.accuracy >= baseline_accuracy - MARGIN - 1e-9]
    if eligible:
        best = min(eligible, key=lambda c: (-c.linf_accuracy, -c.accuracy, c.weight))
    else:
        best = min(candidates, key=lambda c: (-c.accuracy, -c.linf_accuracy, c.weight))
    weights = [c.weight for c in candidates]
    return Choice(best.weight, bool(eligible), best.weight in (min(weights), max(weights)))


def sweep(
    out: str | Path,
    base: TrainingConfig,
    settings: EvaluationSettings,
    *,
    objectives: Iterable[str] = PENALTIES,
    weights: Sequence[float] = WEIGHTS,
    seeds: Sequence[int] = (0,),
    command: str = "",
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and evaluate every candidate that is not done yet, and choose; the record is ``out/sweep.json``.

    Args:
        out: a folder; one run a candidate and seed goes below it. A sweep that was stopped goes on from there.
        base: the settings that all candidates share.
        settings: of the evaluation, on the validation split.
        objectives: names of ``PENALTIES``.
        weights: the candidates, the same for every objective.
        seeds: each candidate is trained once with each.
        command: the command line, for the record.
        report: is told of each candidate as it is done.

    Returns:
        The record: ``trials`` (one a run), ``choices`` (one an objective), and all that decided them.

    Raises:
        ValueError: a name or number is wrong, or ``out`` holds a sweep made with other settings.
    """
    objectives, weights = _checked(objectives, weights, seeds)
    out = Path(out)
    record = _open_record(out / SWEEP, base, settings)
    done = {(trial["objective"], trial["weight"], trial["seed"]) for trial in record["trials"]}
    wanted = [(BASELINE, 0.0, seed) for seed in seeds]  # cross-entropy has no weight
    wanted += [(name, weight, seed) for name in objectives for weight in weights for seed in seeds]
    missing = [trial for trial in wanted if trial not in done]
    splits = base.load_data() if missing else None
    for number, (name, weight, seed) in enumerate(missing, 1):
        run_dir = out / f"{name}-{weight:g}-seed{seed}"
        figures = _try(run_dir, candidate_config(base, name, weight, seed), settings, splits)
        record["trials"].append({"objective": name, "weight": weight, "seed": seed, "figures": figures})
        _write(out / SWEEP, record)
        report(
            f"[{number}/{len(missing)}] {name} weight {weight:g} seed {seed}: "
            f"accuracy {100 * figures['accuracy']:.1f}%, under L∞ PGD {100 * figures['linf_accuracy']:.1f}%"
        )
    record |= {"command": command, "seeds": list(seeds), "weights": list(weights)}
    record["choices"] = choices(record["trials"], objectives, weights, seeds)
    _write(out / SWEEP, record)
    return record


def choices(
    trials: list[dict[str, Any]], objectives: Sequence[str], weights: Sequence[float], seeds: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """The choice for each objective, from the trials of these weights and seeds."""
    baseline = average(trials, BASELINE, 0.0, seeds)
    return {
        name: choose([average(trials, name, weight, seeds) for weight in weights], baseline.accuracy)._asdict()
        for name in objectives
    }


def average(trials: list[dict[str, Any]], objective: str, weight: float, seeds: Sequence[int]) -> Candidate:
    """A candidate's figures, averaged over the seeds."""
    figures = [
        trial["figures"]
        for trial in trials
        if (trial["objective"], trial["weight"]) == (objective, weight) and trial["seed"] in seeds
    ]
    means = (sum(each[name] for each in figures) / len(figures) for name in ("accuracy", "linf_accuracy"))
    return Candidate(objective, weight, *means)


def _checked(
    objectives: Iterable[str], weights: Sequence[float], seeds: Sequence[int]
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    objectives = tuple(dict.fromkeys(objectives))
    for name in objectives:
        check_name("an objective of the sweep", name, PENALTIES)
    weights = tuple(sorted({float(weight) for weight in weights}))
    if not objectives or not weights or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError("a sweep needs at least one objective, one weight and one seed, and each seed once")
    if weights[0] <= 0:
        raise ValueError(
            f"a weight of {weights[0]:g} is given; candidates are above 0 (0 is cross-entropy, always run)"
        )
    return objectives, weights


def candidate_config(base: TrainingConfig, objective: str, weight: float | None, seed: int) -> TrainingConfig:
    """The settings of one run; the weight of cross-entropy is unused, and left as it is in ``base``."""
    changes: dict[str, Any] = {**OBJECTIVES[objective].settings, "p": 2.0, "power": 1.0, "seed": seed}
    if objective != BASELINE:
        changes["weight"] = weight
    return dataclasses.replace(base, **changes)


def _try(
    run_dir: Path, config: TrainingConfig, settings: EvaluationSettings, splits: data.Splits | None
) -> dict[str, Any]:
    begun = (run_dir / runs.CONFIG).exists()
    train(config, run_dir, resume=begun, quiet=True, splits=splits)
    with cpu_threads(config.threads):
        evaluation = evaluate_run(run_dir, settings, split="validation", device=config.device, splits=splits)
    return {"samples": evaluation.samples, **evaluation.scalars}


def _open_record(path: Path, base: TrainingConfig, settings: EvaluationSettings) -> dict[str, Any]:
    """The record of a new sweep, or of the one to go on with."""
    shared = {
        name: value
        for name, value in json.loads(base.to_json()).items()
        if name not in {"objective", "weight", "of", "method", "p", "power", "seed", *RESUMABLE_CHANGES}
    }
    fresh = {
        "rule": RULE,
        "command": "",
        "training": shared,
        "evaluation": settings.to_settings(),
        "split": "validation",
        "versions": runs.versions(),
        "device": resolve_device(base.device).type,
        "trials": [],
    }
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return fresh
    try:
        record = json.loads(path.read_text())
        differing = [part for part in ("training", "evaluation", "device") if record[part] != fresh[part]]
        _ = record["trials"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); move it away, or give another --out") from error
    if differing:
        raise ValueError(f"{path} is of a sweep with other settings ({', '.join(differing)}); give another --out")
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
