"""The demonstration: cross-entropy and three penalties on BlockMNIST, measured on the test split."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluation.evaluate import evaluate_run
from ..evaluation.results import Evaluation
from ..evaluation.settings import EvaluationSettings
from ..training import data, runs
from ..training.config import TrainingConfig
from ..training.devices import cpu_threads, resolve_device
from ..training.loop import train
from ..training.processes import alone
from . import sweep as sweeps
from .sweep import SWEEP

BASELINE = "cross-entropy"
SHOWN = (BASELINE, "target-logit", "input-gradient", "density")  # variants of the recipe block-mnist
WEIGHTS_FILE = "demo_weights.json"


class Trained(NamedTuple):
    """One model of the demonstration and its figures on the test split."""

    config: TrainingConfig
    run_dir: Path
    evaluation: Evaluation
    seconds: float  # that training took


def label(record: Mapping[str, Any], name: str) -> str:
    """What a table calls the models of a variant."""
    title, settings = record["variants"][name]["title"], record["choices"][name]["settings"]
    return f"{title}, λ = {settings['weight']:g}" if "weight" in settings else str(title)


def chosen_weights(path: Path | None = None) -> dict[str, Any]:
    """The record of the sweep that chose the weights; default: the one that ships with the package.

    ``rds-fast sweep`` wrote it, on the validation split; its ``command`` is the command line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the record of a finished sweep over the demonstration's variants.
    """
    if path is not None and path.is_dir():
        path = path / SWEEP
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"there is no {path}; expected the {SWEEP} that 'rds-fast sweep' writes")
    shown = str(path or WEIGHTS_FILE)
    record = sweeps.read(path) if path else sweeps.parse(_shipped(), shown)
    missing = [name for name in SHOWN if name not in record["choices"]]
    if missing:
        raise ValueError(
            f"{shown} holds nothing for {', '.join(missing)}; let 'rds-fast sweep' finish with all variants"
        )
    return record


def _shipped() -> str:
    return resources.files(__package__).joinpath(WEIGHTS_FILE).read_text(encoding="utf-8")


def demo(
    out: str | Path,
    record: Mapping[str, Any],
    settings: EvaluationSettings,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, list[Trained]]:
    """Train the models with the chosen weights, replacing those of an earlier demonstration, and measure them.

    Args:
        out: a folder; one run a model goes below it.
        record: of the sweep: its settings and weights are used.
        settings: of the evaluation, on the test split.
        seeds: of weights and data order; each objective is trained once with each.
        epochs: default: as in the sweep.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: default: torch's own number.
        report: is told of each model as it is done.

    Returns:
        The models, one a seed, by the names of ``SHOWN``.
    """
    changes = {"device": device, "threads": threads} | ({} if epochs is None else {"epochs": epochs})
    configs = {name: _config(record, name, changes) for name in SHOWN}
    base = configs[BASELINE]
    resolve_device(base.device)  # what is wrong is to fail before anything is loaded or replaced
    if not base.data.startswith("block-"):
        raise ValueError(
            f"the weights are for {base.data}; the demonstration needs data with a null block, block-mnist"
        )
    splits = base.load_data()
    models: dict[str, list[Trained]] = {}
    with alone(Path(out), "another demonstration"):
        for name, seed in itertools.product(SHOWN, seeds):
            started = time.perf_counter()
            config = dataclasses.replace(configs[name], seed=seed)
            trained = _train(Path(out) / f"{name}-seed{seed}", config, settings, splits)
            models.setdefault(name, []).append(trained)
            spent = time.perf_counter() - started
            report(
                f"{label(record, name)}, seed {seed}: {trained.seconds:.1f} s of training, "
                f"{spent - trained.seconds:.1f} s of validation, checkpoints and evaluation"
            )
    return models


def _config(record: Mapping[str, Any], name: str, changes: Mapping[str, Any]) -> TrainingConfig:
    """The settings with which the sweep trained what it chose for a variant."""
    chosen = {**record["variants"][name]["settings"], **record["choices"][name]["settings"]}
    return TrainingConfig.from_settings({**record["training"], **chosen, **changes})


def _train(run_dir: Path, config: TrainingConfig, settings: EvaluationSettings, splits: data.Splits) -> Trained:
    result = train(config, run_dir, overwrite=(run_dir / runs.CONFIG).exists(), quiet=True, splits=splits)
    with cpu_threads(config.threads):
        evaluation = evaluate_run(run_dir, settings, device=config.device, splits=splits)
    return Trained(config, run_dir, evaluation, result.seconds)
