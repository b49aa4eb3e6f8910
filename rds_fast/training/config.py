"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from . import data as data_sets  # a setting is called data
from . import models
from .names import check_name

OBJECTIVES = ("cross-entropy", "input-gradient", "density")
GRADIENTS_OF = ("target_logit", "cross_entropy")
METHODS = ("exact", "finite_difference")
WEIGHT_SCHEDULES = ("constant", "linear", "cosine", "step")
OPTIMIZERS = ("adam", "sgd")
LR_SCHEDULES = ("constant", "cosine", "step")
LR_SCALINGS = ("none", "linear")
DEVICES = ("auto", "cpu", "cuda")
AMP = ("none", "bf16", "fp16")

_COUNTS = (
    *("image_size", "classes", "train_size", "cutout", "epochs", "batch_size", "accumulate"),
    *("threads", "workers", "log_interval", "checkpoint_interval"),
)

# Where a run goes on, these may differ: they decide where and how it is watched, not what is computed.
RESUMABLE_CHANGES = ("device", "threads", "workers", "download", "log_interval", "checkpoint_interval")


def _setting(
    default: Any,
    group: str,
    help: str,
    *,
    names: tuple[str, ...] = (),
    only: tuple[str, *tuple[str, ...]] | None = None,
) -> Any:
    """A field, and what the command line says of it.

    ``names``: what it may be. ``only``: another setting, and the values of it with which this one has an effect.
    """
    return dataclasses.field(default=default, metadata={"group": group, "help": help, "names": names, "only": only})


def _data_sets(which: Callable[[data_sets.DataSet], bool]) -> tuple[str, *tuple[str, ...]]:
    """The data sets with which a setting has an effect, for ``only``."""
    return ("data", *(name for name, known in data_sets.DATA_SETS.items() if which(known)))


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides a run. The defaults train the density penalty on BlockMNIST in seconds.

    Raises:
        ValueError: a value is unknown or out of range; the message names the setting and what it may be.
    """

    data: str = _setting("block-mnist", "Data", "The data set.", names=data_sets.NAMES)
    data_root: str | None = _setting(
        None,
        "Data",
        "Folder of the data's files; the digits and clothes have packaged ones besides.",
        only=_data_sets(lambda known: known.source is not None),
    )
    download: bool = _setting(
        False, "Data", "Fetch what is missing into data-root.", only=_data_sets(lambda known: known.source is not None)
    )
    data_seed: int = _setting(
        0,
        "Data",
        "Decides the splits, which block is on top, and synthetic images.",
        only=_data_sets(lambda known: known.seeded),
    )
    image_size: int = _setting(
        224,
        "Data",
        "Height and width of the images, of data that come in any size.",
        only=_data_sets(lambda known: known.shape is None),
    )
    classes: int = _setting(1000, "Data", "The number of classes of synthetic.", only=("data", "synthetic"))
    train_size: int = _setting(
        4096, "Data", "Training images of synthetic; validation has an eighth of that.", only=("data", "synthetic")
    )

    augment: str = _setting(
        "auto",
        "Data",
        "Random changes of training images: crops with 4 pixels more on each side, flips, a square painted over. auto: "
        "resized-crop-flip of photographs that are read from files, else none.",
        names=("auto", *data_sets.AUGMENTATIONS),
    )
    cutout: int = _setting(
        16, "Data", "Side of that square in pixels.", only=("augment", "crop-cutout", "crop-flip-cutout")
    )
    normalize: bool = _setting(
        False,
        "Data",
        "Subtract the training data's mean and divide by their deviation, of each channel, inside the model; attacks "
        "and penalties still see pixels in [0, 1].",
    )

    objective: str = _setting("density", "Objective", "The penalty, if any.", names=OBJECTIVES)
    weight: float = _setting(0.5, "Objective", "The penalty's weight.")
    p: float = _setting(2.0, "Objective", "The norm, from 1 to inf.")
    power: float = _setting(
        1.0,
        "Objective",
        "The exponent of the norm, the same for both penalties; InputGradientPenalty's own default is 2.",
    )
    of: str = _setting(
        "target_logit", "Objective", "Whose input gradient.", names=GRADIENTS_OF, only=("objective", "input-gradient")
    )
    method: str = _setting("exact", "Objective", "How it is computed.", names=METHODS, only=("objective", "density"))
    step_size: float = _setting(1e-2, "Objective", "Of the finite difference.", only=("method", "finite_difference"))
    weight_schedule: str = _setting("constant", "Objective", "The weight over time.", names=WEIGHT_SCHEDULES)
    weight_warmup_epochs: float = _setting(
        0.0, "Objective", "Linear, cosine: the epochs in which the weight rises from 0."
    )
    weight_milestones: tuple[int, ...] = _setting(
        (), "Objective", "Step: an epoch after which it changes; may be repeated.", only=("weight_schedule", "step")
    )
    weight_factor: float = _setting(
        0.1, "Objective", "Step: by what it is multiplied.", only=("weight_schedule", "step")
    )
    label_smoothing: float = _setting(0.0, "Objective", "Of the cross-entropy's targets; no penalty changes by it.")
    fast: bool = _setting(True, "Objective", "The fused operations, or plain PyTorch.")

    model: str = _setting(
        "mlp",
        "Optimisation",
        "The classifier. The ResNets have a 3x3 stem below 64 pixels, and the usual one of 7x7 from there on.",
        names=models.NAMES,
    )
    fuse: bool = _setting(
        False, "Optimisation", "Batch norm, addition and ReLU as single operations; its checkpoints fit both ways."
    )
    epochs: int = _setting(12, "Optimisation", "Passes over the training data.")
    batch_size: int = _setting(100, "Optimisation", "Samples of a step of the optimiser.")
    accumulate: int = _setting(
        1,
        "Optimisation",
        "Micro-batches of a step, batch-size / accumulate samples each: less memory, the same gradient, except that "
        "batch norm takes its statistics from each one.",
    )
    optimizer: str = _setting("adam", "Optimisation", "The optimiser.", names=OPTIMIZERS)
    lr: float = _setting(1e-3, "Optimisation", "The learning rate.")
    lr_scaling: str = _setting(
        "none",
        "Optimisation",
        "linear: lr is for 256 samples a step, and multiplied by batch-size / 256.",
        names=LR_SCALINGS,
    )
    momentum: float = _setting(0.9, "Optimisation", "Of sgd.", only=("optimizer", "sgd"))
    nesterov: bool = _setting(False, "Optimisation", "Nesterov's momentum, of sgd.", only=("optimizer", "sgd"))
    weight_decay: float = _setting(0.0, "Optimisation", "The optimiser's.")
    decay_norms: bool = _setting(True, "Optimisation", "Weight decay for norms and biases too.")
    lr_schedule: str = _setting("constant", "Optimisation", "The learning rate over time.", names=LR_SCHEDULES)
    lr_warmup_epochs: float = _setting(0.0, "Optimisation", "The epochs in which it rises from 0.")
    lr_milestones: tuple[int, ...] = _setting(
        (), "Optimisation", "Step: an epoch after which it changes; may be repeated.", only=("lr_schedule", "step")
    )
    lr_factor: float = _setting(0.2, "Optimisation", "Step: by what it is multiplied.", only=("lr_schedule", "step"))
    seed: int = _setting(0, "Optimisation", "Decides the first weights, the data's order and dropout.")

    device: str = _setting("auto", "Running", "Where to compute.", names=DEVICES)
    amp: str = _setting("none", "Running", "Mixed precision.", names=AMP)
    channels_last: bool = _setting(False, "Running", "Weights and images in the memory format channels last.")
    threads: int | None = _setting(None, "Running", "Threads of the CPU.")
    workers: int | None = _setting(
        None,
        "Running",
        "Processes that decode images from files; 0: this one (default: one for each core).",
        only=_data_sets(lambda known: known.decoded),
    )
    log_interval: int = _setting(50, "Running", "Steps between rows of metrics; on a GPU each costs a wait.")
    checkpoint_interval: int | None = _setting(None, "Running", "Steps between checkpoints, besides each epoch's end.")

    def __post_init__(self) -> None:
        for setting in ("lr_milestones", "weight_milestones"):  # a list, as JSON has it, is welcome
            object.__setattr__(self, setting, tuple(getattr(self, setting)))
        self._check_names()
        self._check_numbers()
        self._check_together()

    @property
    def micro_batch_size(self) -> int:
        """The samples of one forward and backward."""
        return self.batch_size // self.accumulate

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        return data_sets.image_shape(self.data, self.image_size)

    @property
    def augmentation(self) -> data_sets.Augmentation:
        """How training images are changed."""
        usual = "resized-crop-flip" if data_sets.DATA_SETS[self.data].from_files else "none"
        return data_sets.named_augmentation(usual if self.augment == "auto" else self.augment, self.cutout)

    def load_data(self) -> data_sets.Splits:
        """The data that are named here; raises as ``data.load`` does."""
        return data_sets.load(
            self.data,
            self.data_root,
            self.data_seed,
            image_size=self.image_size,
            classes=self.classes,
            train_size=self.train_size,
            workers=self.workers,
            download=self.download,
        )

    def _check_together(self) -> None:
        """What some values ask of others."""
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size is {self.batch_size} and accumulate is {self.accumulate}, which does not divide it; a "
                "step takes batch_size samples in accumulate micro-batches of one size"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov is given and momentum is 0; it needs a momentum above 0")
        data_sets.check_root(self.data, self.data_root)
        self._check_augmentation()
        for value in ("lr", "weight"):
            if getattr(self, f"{value}_schedule") == "step" and not getattr(self, f"{value}_milestones"):
                raise ValueError(
                    f"{value}_schedule is 'step' and {value}_milestones is empty; give the epochs of the steps"
                )
        if (self.weight_schedule in ("linear", "cosine")) != (self.weight_warmup_epochs > 0):
            raise ValueError(
                f"weight_schedule is {self.weight_schedule!r} and weight_warmup_epochs is {self.weight_warmup_epochs}; "
                "'linear' and 'cosine' need the epochs they take, and nothing else does"
            )

    def _check_augmentation(self) -> None:
        known, augment = data_sets.DATA_SETS[self.data], self.augment
        if augment == "resized-crop-flip" and not known.from_files:
            raise ValueError(
                f"augment is {augment!r} and the images of {self.data} have one size; use 'crop' or 'crop-flip'"
            )
        if "flip" in augment and not known.mirrored:
            raise ValueError(
                f"augment is {augment!r}, which mirrors images, and a {self.data} image in a mirror is another sign or "
                f"none; use {augment.replace('-flip', '')!r}"
            )

    def _check_names(self) -> None:
        for name, field in FIELDS.items():
            if field.metadata["names"]:
                check_name(name, getattr(self, name), field.metadata["names"])

    def _check_numbers(self) -> None:
        for setting in _COUNTS:
            least = 0 if setting == "workers" else 1
            value = getattr(self, setting)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{setting} is {value!r}; it must be a whole number, {least} or more")
        for setting in ("seed", "data_seed"):
            value = getattr(self, setting)
            if not isinstance(value, int) or not 0 <= value < 2**63:
                raise ValueError(f"{setting} is {value!r}; it must be a whole number from 0 to 2**63 - 1")
        for setting in ("lr", "power", "step_size", "lr_factor", "weight_factor"):
            value = getattr(self, setting)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{setting} is {value!r}; it must be above 0 and finite")
        for setting in ("weight", "weight_decay", "weight_warmup_epochs", "lr_warmup_epochs"):
            value = getattr(self, setting)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{setting} is {value!r}; it must be 0 or more and finite")
        if not self.p >= 1:
            raise ValueError(f"p is {self.p!r}; it must be from 1 to infinity")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing!r}; it must be from 0 to 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum!r}; it must be at least 0 and below 1")
        for setting in ("lr_milestones", "weight_milestones"):
            epochs = getattr(self, setting)
            if any(not isinstance(epoch, int) or epoch < 1 for epoch in epochs) or list(epochs) != sorted(set(epochs)):
                raise ValueError(f"{setting} is {epochs}; it must hold epochs, 1 or more, in rising order")

    def to_json(self) -> str:
        """The settings as JSON. Infinity, as p may be, is written as the string "inf"."""
        settings = dataclasses.asdict(self)
        settings["p"] = "inf" if math.isinf(self.p) else self.p
        return json.dumps(settings, indent=2)

    @staticmethod
    def from_settings(settings: dict[str, Any]) -> TrainingConfig:
        """The configuration whose settings JSON holds, as ``to_json`` writes them.

        Raises:
            ValueError: a setting is unknown here, so the run was made by another version.
        """
        for name in settings:
            check_name("a setting", name, FIELDS)
        return TrainingConfig(**{**settings, "p": float(settings.get("p", 2.0))})

    def differences(self, other: TrainingConfig) -> dict[str, tuple[Any, Any]]:
        """The settings in which two runs compute different numbers: name -> (this one's value, the other's)."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in FIELDS if name not in RESUMABLE_CHANGES}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def without_effect(self, name: str) -> str | None:
        """The reason why a setting has no effect beside the others; None if it has one."""
        field = FIELDS[name]
        of_penalty = field.metadata["group"] == "Objective" and name not in ("objective", "label_smoothing", "fast")
        if of_penalty and self.objective == "cross-entropy":
            return "the objective is cross-entropy, which has no penalty"
        only = field.metadata["only"]
        if only is not None and getattr(self, only[0]) not in only[1:]:
            return f"it belongs to {only[0]} {' or '.join(only[1:])}, and {only[0]} is {getattr(self, only[0])}"
        return None


FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}
