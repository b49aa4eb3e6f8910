"""What the settings of a run have to be. The messages name the setting, its value and what it may be."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import data as data_sets
from . import models
from .names import check_name
from .objective_settings import ADAPTIVE, weights_of_classes

if TYPE_CHECKING:
    from .config import TrainingConfig

_COUNTS = (
    *("image_size", "classes", "train_size", "cutout", "epochs", "steps", "batch_size", "accumulate"),
    *("attack_steps", "path_steps", "attack_path_steps", "penalty_every"),
    *("threads", "log_interval", "checkpoint_interval"),
)
_FROM_ZERO = ("workers", "projections")
_SEEDS = ("seed", "data_seed")
_POSITIVE = (
    *("lr", "power", "step_size", "lr_factor", "weight_factor"),
    *("epsilon", "attack_step_size", "weight_target", "group_step_size"),
)
_NOT_NEGATIVE = ("weight", "group_adjustment", "weight_decay", "weight_warmup_epochs", "lr_warmup_epochs")


def check_numbers(config: TrainingConfig) -> None:
    """Each number by itself.

    Raises:
        ValueError: one is out of range, or of the wrong type.
    """
    for names, least in ((_COUNTS, 1), (_FROM_ZERO, 0)):
        for name in names:
            value = getattr(config, name)
            if value is not None and not (_is_whole(value) and value >= least):
                raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more")
    for name in _SEEDS:
        value = getattr(config, name)
        if not (_is_whole(value) and 0 <= value < 2**63):
            raise ValueError(f"{name} is {value!r}; it must be a whole number from 0 to 2**63 - 1")
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not (_is_finite(value) and value > 0):
            raise ValueError(f"{name} is {value!r}; it must be above 0 and finite")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        if not (_is_finite(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}; it must be 0 or more and finite")
    _check_intervals(config)
    for name in ("lr_milestones", "weight_milestones"):
        epochs = getattr(config, name)
        if any(not _is_whole(epoch) or epoch < 1 for epoch in epochs) or list(epochs) != sorted(set(epochs)):
            raise ValueError(f"{name} is {epochs}; it must hold epochs, 1 or more, in rising order")


def _check_intervals(config: TrainingConfig) -> None:
    if not (_is_number(config.p) and config.p >= 1):
        raise ValueError(f"p is {config.p!r}; it must be from 1 to infinity")
    if not (_is_number(config.label_smoothing) and 0 <= config.label_smoothing <= 1):
        raise ValueError(f"label_smoothing is {config.label_smoothing!r}; it must be from 0 to 1")
    if not (_is_number(config.momentum) and 0 <= config.momentum < 1):
        raise ValueError(f"momentum is {config.momentum!r}; it must be at least 0 and below 1")
    if not (_is_number(config.penalty_share) and 0 < config.penalty_share <= 1):
        raise ValueError(f"penalty_share is {config.penalty_share!r}; it must be above 0 and at most 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_together(config: TrainingConfig) -> None:
    """What some values ask of others.

    Raises:
        ValueError: two values exclude each other, or one asks for another that is missing.
    """
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"batch_size is {config.batch_size} and accumulate is {config.accumulate}, which does not divide it; a "
            "step takes batch_size samples in accumulate micro-batches of one size"
        )
    if config.nesterov and config.momentum == 0:
        raise ValueError("nesterov is given and momentum is 0; it needs a momentum above 0")
    data_sets.check_root(config.data, config.data_root)
    _check_augmentation(config)
    if config.objective == "gradient-matching" and config.teacher is None:
        raise ValueError("objective is 'gradient-matching' and teacher is missing; give the folder of a finished run")
    if config.objective != "gradient-matching" and config.of == "log_density":
        raise ValueError(
            "of is 'log_density', which is for gradient-matching; its input gradient's norm is objective 'density'"
        )
    weights_of_classes(config.class_weights)
    if config.loss == "group-dro" and config.class_weights != "none":
        raise ValueError(
            f"loss is 'group-dro' and class_weights is {config.class_weights!r}; the groups have weights of their own, "
            "so leave one of the two out"
        )
    _check_schedules(config)


def _check_augmentation(config: TrainingConfig) -> None:
    known, augment = data_sets.DATA_SETS[config.data], config.augment
    if augment == "resized-crop-flip" and not known.from_files:
        raise ValueError(
            f"augment is {augment!r} and the images of {config.data} have one size; use 'crop' or 'crop-flip'"
        )
    if "flip" in augment and not known.mirrored:
        raise ValueError(
            f"augment is {augment!r}, which mirrors images, and a {config.data} image in a mirror is another sign or "
            f"none; use {augment.replace('-flip', '')!r}"
        )


def _check_schedules(config: TrainingConfig) -> None:
    for value in ("lr", "weight"):
        if getattr(config, f"{value}_schedule") == "step" and not getattr(config, f"{value}_milestones"):
            raise ValueError(
                f"{value}_schedule is 'step' and {value}_milestones is empty; give the epochs of the steps"
            )
    if (config.weight_schedule in ("linear", "cosine")) != (config.weight_warmup_epochs > 0):
        raise ValueError(
            f"weight_schedule is {config.weight_schedule!r} and weight_warmup_epochs is {config.weight_warmup_epochs}; "
            "'linear' and 'cosine' need the epochs they take, and nothing else does"
        )
    adapts = config.weight_schedule in ADAPTIVE
    if adapts != (config.weight_target is not None):
        raise ValueError(
            f"weight_schedule is {config.weight_schedule!r} and weight_target is {config.weight_target}; "
            "'penalty-ratio' and 'accuracy-budget' need the target they hold, and nothing else does"
        )
    if config.weight_schedule == "accuracy-budget" and not 0 < (config.weight_target or 0) < 1:
        raise ValueError(f"weight_target is {config.weight_target}; an accuracy to hold is above 0 and below 1")
    if adapts and config.weight == 0:
        raise ValueError(
            f"weight is 0 and weight_schedule is {config.weight_schedule!r}, which adapts it by factors; begin above 0"
        )


def check_model(model: nn.Module, config: TrainingConfig, device: torch.device) -> None:
    """Whether a model takes the images, and has the layer, of its settings; it is in eval mode afterwards.

    Raises:
        ValueError: it does not, which the first step would find, when the run's folder is made.
    """
    if config.attribution_layer is not None and config.without_effect("attribution_layer") is None:
        check_name("attribution_layer", config.attribution_layer, [name for name, _ in model.named_modules() if name])
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *config.image_shape, device=device))
    except RuntimeError as error:
        shape = "x".join(map(str, config.image_shape))
        raise ValueError(
            f"the model {config.model} cannot take images of {shape} ({error}); use larger ones, or another model"
        ) from error


def check_batch_norm(config: TrainingConfig, samples: int, classes: int) -> None:
    """Whether batch norm, in train mode, has two values a channel at least in every forward of a run.

    The fewest are those of the smallest forward, where a layer's input is the smallest: one sample of a single pixel
    has no variance. The model is built on the meta device, which computes nothing.

    Raises:
        ValueError: it has not, which a step would find, perhaps the last of an epoch.
    """
    if _fewest(config, samples) > 1:
        return
    single: list[str] = []

    def note(name: str) -> Any:
        return lambda layer, inputs: single.append(name) if inputs[0].numel() == inputs[0].shape[1] else None

    with torch.device("meta"), torch.no_grad():
        model = models.build(config.model, config.image_shape, classes).eval()
        for name, layer in model.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.register_forward_pre_hook(note(name))
        model(torch.zeros(1, *config.image_shape))
    if not single:
        return
    larger = range(config.batch_size, 3 * config.batch_size + 10, config.accumulate)
    sizes = (size for size in larger if _fewest(dataclasses.replace(config, batch_size=size), samples) > 1)
    found = next(sizes, None)
    remedy = f"A batch_size of {found} has none such" if found else "Give another batch_size or penalty_share"
    share = f", of which penalty_share draws {config.penalty_share:g}" if config.penalty_share < 1 else ""
    raise ValueError(
        f"some step would run the model {config.model} on one sample, from {samples} samples in batches of "
        f"{config.batch_size} and micro-batches of {config.micro_batch_size}{share}. The batch norm {single[0]!r} "
        f"would have one value a channel there, which has no variance. {remedy}; larger images do as well"
    )


def _fewest(config: TrainingConfig, samples: int) -> int:
    """The samples of the smallest forward in train mode, of those that the steps of a run reach."""
    full, rest = divmod(samples, config.batch_size)
    batches = [config.batch_size] * bool(full)
    if rest and config.total_steps(full + 1) > full:
        batches.append(rest)
    micro = config.micro_batch_size
    sizes = {min(size, micro) for size in batches} | {size % micro for size in batches} - {0}
    if config.without_effect("penalty_share") is None:
        sizes |= {max(1, round(config.penalty_share * size)) for size in sizes}
    return min(sizes)
