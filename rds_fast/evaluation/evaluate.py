"""The figures of a trained classifier on one split: accuracy, robustness, leakage, smoothness of its density."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import pgd
from ..ops.logsumexp import logsumexp
from ..training import data, runs
from ..training.checkpoints import write_atomically
from ..training.config import TrainingConfig
from ..training.devices import resolve_device
from ..training.names import check_name
from .leakage import feature_leakage, input_gradient

SPLITS = ("test", "validation")


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What decides the figures besides the model and the data.

    The radii are for images in [0, 1]. On BlockMNIST cross-entropy alone loses nearly all of its accuracy at either.
    """

    linf_epsilon: float = 0.1
    l2_epsilon: float = 1.0
    steps: int = 40
    seed: int = 0  # of the attacks' random starts, and of the choice of samples where limit is given
    limit: int | None = None  # this many samples, drawn at random, instead of the whole split
    batch_size: int = 500  # samples at a time; it decides the memory, and how the random starts are dealt out

    def __post_init__(self) -> None:
        for name in ("linf_epsilon", "l2_epsilon"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be 0 or more and finite")
        for name in ("steps", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")


@dataclasses.dataclass(frozen=True)
class Figures:
    """The results. Accuracies and the share are in [0, 1].

    Attributes:
        samples: how many were measured.
        accuracy: the share classified rightly.
        linf_accuracy: classified rightly both as they are and after PGD in the L∞ ball.
        l2_accuracy: the same in the L2 ball.
        leakage: mean L2 norm of ∇ₓ f_y on the null block; None where the data have no null block.
        share: mean of each sample's ratio of that to the L2 norm of the whole ∇ₓ f_y, over the samples that have a
            gradient; None where there is no null block or no sample has one.
        gradient_norm: mean ‖∇ₓ log p(x)‖₂.
    """

    samples: int
    accuracy: float
    linf_accuracy: float
    l2_accuracy: float
    leakage: float | None
    share: float | None
    gradient_norm: float


def mean_and_spread(figures: Sequence[Figures]) -> tuple[Figures, Figures | None]:
    """The mean of each figure over several models of one kind, and its standard deviation (None for one model)."""

    def over_models(statistic: Callable[[list[float]], float]) -> Figures:
        columns = {field.name: [getattr(each, field.name) for each in figures] for field in dataclasses.fields(Figures)}
        values = {name: None if None in column else statistic(column) for name, column in columns.items()}
        return Figures(**{**values, "samples": figures[0].samples})  # type: ignore[arg-type]

    return over_models(statistics.fmean), over_models(statistics.stdev) if len(figures) > 1 else None


def evaluate_model(model: nn.Module, images: data.Split, settings: EvaluationSettings) -> Figures:
    """The figures of a model on a split, both on one device. The model is measured in eval mode and its mode restored.

    Raises:
        ValueError: the split is empty, or does not fit the model.
    """
    if len(images) == 0:
        raise ValueError("there are no samples to evaluate")
    if settings.limit is not None and settings.limit < len(images):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))
        images = images.take(order[: settings.limit].sort().values.to(images.index_device))
    device = images.labels.device
    # One generator an attack, so that leaving one out would not move the other's starts.
    generators = {norm: torch.Generator(device).manual_seed(settings.seed) for norm in ("linf", "l2")}
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        batches = [
            _measure(model, images.take(indices), settings, generators)
            for indices in torch.arange(len(images), device=images.index_device).split(settings.batch_size)
        ]
    finally:
        for module, training in was_training.items():
            module.training = training
    return _summarise({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})


def _measure(
    model: nn.Module, images: data.Images, settings: EvaluationSettings, generators: dict[str, torch.Generator]
) -> dict[str, Tensor]:
    """Each figure of each sample of a batch."""
    x, y = data.in_unit_interval(images.images), images.labels
    right = _right(model, x, y)
    figures = {"accuracy": right, "gradient_norm": _density_gradient_norm(model, x)}
    for norm, epsilon in (("linf", settings.linf_epsilon), ("l2", settings.l2_epsilon)):
        moved = pgd(model, x, y, epsilon, norm=norm, steps=settings.steps, generator=generators[norm])
        figures[f"{norm}_accuracy"] = right & _right(model, moved, y)
    if images.signal_on_top is not None:
        figures["leakage"], figures["share"] = feature_leakage(input_gradient(model, x, y), images.null_mask)
    return figures


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) == y


def _density_gradient_norm(model: nn.Module, x: Tensor) -> Tensor:
    """‖∇ₓ log p(x)‖₂ (N,): log p is the log-sum-exp of the logits up to a constant."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(logsumexp(model(x), 1).sum(), x)
    return gradient.flatten(1).norm(dim=1)


def _summarise(figures: dict[str, Tensor]) -> Figures:
    means: dict[str, float | None] = {"leakage": None, "share": None}
    for name, values in figures.items():
        mean = values.double().nanmean() if name == "share" else values.double().mean()
        means[name] = None if name == "share" and mean.isnan() else float(mean)
    return Figures(samples=len(figures["accuracy"]), **means)  # type: ignore[arg-type]


def evaluate_run(
    run_dir: str | Path,
    settings: EvaluationSettings,
    *,
    split: str = "test",
    device: str = "auto",
    splits: data.Splits | None = None,
) -> Figures:
    """Evaluate the model of a finished run and write evaluation.json into its folder.

    Args:
        run_dir: the folder of the run.
        settings: what decides the figures.
        split: ``"test"``, or ``"validation"`` while anything is still to be chosen.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        splits: the run's data, where they are loaded already.

    Raises:
        FileNotFoundError: there is no finished run in the folder, or a data file is missing.
        ValueError: the split is unknown, or a file of the run is damaged.
    """
    check_name("split", split, SPLITS)
    resolved = resolve_device(device)
    model, config = runs.load_model(run_dir, resolved)
    splits = splits or config.load_data()
    samples: data.Split = getattr(splits, split)
    if len(samples) == 0:
        raise ValueError(f"the data in {config.data_root} have no {split} split; use --split validation, or add one")
    figures = evaluate_model(model, samples.to(resolved), settings)
    record = evaluation_record(config, figures, settings, split, resolved)
    write_atomically(Path(run_dir) / runs.EVALUATION, (json.dumps(record, indent=2) + "\n").encode())
    return figures


def evaluation_record(
    config: TrainingConfig, figures: Figures, settings: EvaluationSettings, split: str, device: torch.device
) -> dict[str, Any]:
    """What evaluation.json holds."""
    return {
        "split": split,
        "figures": dataclasses.asdict(figures),
        "settings": dataclasses.asdict(settings),
        "training": json.loads(config.to_json()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": runs.versions(),
    }
