"""The evaluation of a trained classifier on one split: every metric that was asked for, in one record."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..training import data, runs
from ..training.devices import resolve_device
from ..training.names import check_name
from . import record
from .metrics import chosen
from .results import Evaluation, Results, merged
from .samples import drawn
from .settings import EvaluationSettings

SPLITS = ("test", "validation")


def _silent(line: str) -> None:
    pass


def evaluate_model(
    model: nn.Module, split: data.Split, settings: EvaluationSettings, report: Callable[[str], None] = _silent
) -> Evaluation:
    """What the metrics find of a model on a split, both on one device.

    The model is measured in eval mode and its mode restored. Each metric seeds its own random draws, so its figures
    do not depend on which others are measured.

    Args:
        model: the classifier.
        split: the samples; ``settings.limit`` of them are measured.
        settings: which metrics, and what decides their figures.
        report: is told of each metric as it is done.

    Raises:
        ValueError: the split is empty or does not fit the model, or a metric that was named does not fit the data.
    """
    if len(split) == 0:
        raise ValueError("there are no samples to evaluate")
    split = drawn(split, settings.limit, settings.seed)
    metrics, notes = chosen(split, settings)
    parts, seconds = [], {}
    with _eval_mode(model):
        for name, metric in metrics.items():
            started = time.perf_counter()
            parts.append(metric.measure(model, split, settings))
            seconds[name] = time.perf_counter() - started
            report(f"{name}: {seconds[name]:.1f} s")
    results = merged([*parts, Results(notes=notes)])
    return Evaluation(**vars(results), samples=len(split), seconds=seconds)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def measurable(splits: data.Splits, split: str, settings: EvaluationSettings, root: str | None) -> data.Split:
    """The split that is to be measured; ``root``, where its data are, is for the message.

    Raises:
        ValueError: it has no samples, or a metric that was named does not fit them.
    """
    samples: data.Split = getattr(splits, split)
    if len(samples) == 0:
        raise ValueError(f"the data in {root} have no {split} split; measure another split, or add this one")
    chosen(samples, settings)
    return samples


def evaluate_run(
    run_dir: str | Path,
    settings: EvaluationSettings,
    *,
    split: str = "test",
    device: str = "auto",
    splits: data.Splits | None = None,
    place: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = _silent,
) -> Evaluation:
    """Evaluate the model of a finished run and write evaluation.json into its folder.

    Args:
        run_dir: the folder of the run.
        settings: what decides the figures.
        split: ``"test"``, or ``"validation"`` while anything is still to be chosen.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        splits: the run's data, where they are loaded already.
        place: settings of the training that belong to the place, such as ``data_root``, where they differ now.
        report: is told of each metric as it is done.

    Raises:
        FileNotFoundError: there is no finished run in the folder, or a data file is missing.
        PermissionError: the folder cannot be written into.
        ValueError: the split is unknown, a metric that was named does not fit the data, or a file is damaged.
    """
    check_name("split", split, SPLITS)
    resolved = resolve_device(device)
    model, config = runs.load_model(run_dir, resolved)
    if not os.access(run_dir, os.W_OK):  # said now, not when everything is measured
        raise PermissionError(
            f"the folder {run_dir} cannot be written into, and {runs.EVALUATION} belongs there; copy the run to where "
            "it can, or change the folder's permissions"
        )
    config = dataclasses.replace(config, **(place or {}))
    splits = splits or runs.load_data(run_dir, config)
    runs.check_same_classes(run_dir, getattr(splits, split))
    samples = drawn(measurable(splits, split, settings, config.data_root), settings.limit, settings.seed)
    evaluation = evaluate_model(model, samples.to(resolved), settings, report)
    written = record.Record(
        *(evaluation, settings, split, data.fingerprint(samples), config),
        *(record.name_of(resolved), runs.versions(), runs.read_identity(run_dir)),
    )
    record.write(run_dir, written)
    return evaluation
