"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from . import checks, models
from . import data as data_sets  # a setting is called data
from .fields import absolute, setting
from .names import check_name
from .objective_settings import OBJECTIVES as OBJECTIVES
from .objective_settings import ObjectiveSettings

OPTIMIZERS = ("adam", "sgd")
LR_SCHEDULES = ("constant", "cosine", "step")
LR_SCALINGS = ("none", "linear")
DEVICES = ("auto", "cpu", "cuda")
AMP = ("none", "bf16", "fp16")


def _data_sets(which: Callable[[data_sets.DataSet], bool]) -> tuple[str, *tuple[str, ...]]:
    """The data sets with which a setting has an effect, for ``only``."""
    return ("data", *(name for name, known in data_sets.DATA_SETS.items() if which(known)))


@dataclasses.dataclass(frozen=True)
class TrainingConfig(ObjectiveSettings):
    """Everything that decides a run. The defaults train the density penalty on BlockMNIST in seconds.

    Paths are kept absolute: a relative one means the folder in which the configuration is made.

    Raises:
        ValueError: a value is unknown or out of range; the message names the setting and what it may be.
    """

    data: str = setting("block-mnist", "Data", "The data set.", names=data_sets.NAMES)
    data_root: str | None = setting(
        None,
        "Data",
        "Folder of the data's files; the digits and clothes have packaged ones besides.",
        only=_data_sets(lambda known: known.source is not None),
        path=True,
    )
    download: bool = setting(
        False,
        "Data",
        "Fetch what is missing into data-root.",
        only=_data_sets(lambda known: known.source is not None),
        place=True,
    )
    data_seed: int = setting(
        0,
        "Data",
        "Decides the splits, which block is on top, and synthetic images.",
        only=_data_sets(lambda known: known.seeded),
    )
    image_size: int = setting(
        224,
        "Data",
        "Height and width of the images, of data that come in any size.",
        only=_data_sets(lambda known: known.shape is None),
    )
    classes: int = setting(1000, "Data", "The number of classes of synthetic.", only=("data", "synthetic"))
    train_size: int = setting(
        4096, "Data", "Training images of synthetic; validation has an eighth of that.", only=("data", "synthetic")
    )

    augment: str = setting(
        "auto",
        "Data",
        "Random changes of training images: crops with 4 pixels more on each side, flips, a square painted over. auto: "
        "resized-crop-flip of photographs that are read from files, else none.",
        names=("auto", *data_sets.AUGMENTATIONS),
    )
    cutout: int = setting(
        16, "Data", "Side of that square in pixels.", only=("augment", "crop-cutout", "crop-flip-cutout")
    )
    normalize: bool = setting(
        False,
        "Data",
        "Subtract the training data's mean and divide by their deviation, of each channel, inside the model; attacks "
        "and penalties still see pixels in [0, 1].",
    )

    model: str = setting(
        "mlp",
        "Optimisation",
        "The classifier. The ResNets have a 3x3 stem below 64 pixels, and the usual one of 7x7 from there on.",
        names=models.NAMES,
    )
    fuse: bool = setting(
        False, "Optimisation", "Batch norm, addition and ReLU as single operations; its checkpoints fit both ways."
    )
    epochs: int = setting(12, "Optimisation", "Passes over the training data.")
    steps: int | None = setting(None, "Optimisation", "Steps of the optimiser in all, in the place of epochs.")
    batch_size: int = setting(100, "Optimisation", "Samples of a step of the optimiser.")
    accumulate: int = setting(
        1,
        "Optimisation",
        "Micro-batches of a step, batch-size / accumulate samples each: less memory, the same gradient, except that "
        "batch norm takes its statistics from each one.",
    )
    optimizer: str = setting("adam", "Optimisation", "The optimiser.", names=OPTIMIZERS)
    lr: float = setting(1e-3, "Optimisation", "The learning rate.")
    lr_scaling: str = setting(
        "none",
        "Optimisation",
        "linear: lr is for 256 samples a step, and multiplied by batch-size / 256.",
        names=LR_SCALINGS,
    )
    momentum: float = setting(0.9, "Optimisation", "Of sgd.", only=("optimizer", "sgd"))
    nesterov: bool = setting(False, "Optimisation", "Nesterov's momentum, of sgd.", only=("optimizer", "sgd"))
    weight_decay: float = setting(0.0, "Optimisation", "The optimiser's.")
    decay_norms: bool = setting(True, "Optimisation", "Weight decay for norms and biases too.")
    lr_schedule: str = setting("constant", "Optimisation", "The learning rate over time.", names=LR_SCHEDULES)
    lr_warmup_epochs: float = setting(0.0, "Optimisation", "The epochs in which it rises from 0.")
    lr_milestones: tuple[int, ...] = setting(
        (), "Optimisation", "Step: an epoch after which it changes; may be repeated.", only=("lr_schedule", "step")
    )
    lr_factor: float = setting(0.2, "Optimisation", "Step: by what it is multiplied.", only=("lr_schedule", "step"))
    seed: int = setting(0, "Optimisation", "Decides the first weights, the data's order and dropout.")

    device: str = setting("auto", "Running", "Where to compute.", names=DEVICES, place=True)
    amp: str = setting("none", "Running", "Mixed precision.", names=AMP)
    channels_last: bool = setting(False, "Running", "Weights and images in the memory format channels last.")
    threads: int | None = setting(None, "Running", "Threads of the CPU.", place=True)
    workers: int | None = setting(
        None,
        "Running",
        "Processes that decode images from files; 0: this one (default: one for each core).",
        only=_data_sets(lambda known: known.decoded),
        place=True,
    )
    log_interval: int = setting(50, "Running", "Steps between rows of metrics; on a GPU each costs a wait.", place=True)
    checkpoint_interval: int | None = setting(
        None, "Running", "Steps between checkpoints, besides each epoch's end.", place=True
    )

    def __post_init__(self) -> None:
        for name in ("lr_milestones", "weight_milestones"):  # a list, as JSON has it, is welcome
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in PATHS:
            object.__setattr__(self, name, as_meant(name, getattr(self, name)))
        checks.check_numbers(self)
        for name, field in FIELDS.items():
            if field.metadata["names"]:
                check_name(name, getattr(self, name), field.metadata["names"])
        checks.check_together(self)

    @property
    def micro_batch_size(self) -> int:
        """The samples of one forward and backward."""
        return self.batch_size // self.accumulate

    def total_steps(self, steps_per_epoch: int) -> int:
        """The steps of the optimiser in the whole run."""
        return self.epochs * steps_per_epoch if self.steps is None else self.steps

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
        """The settings in which two experiments differ: name -> (this one's value, the other's)."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in FIELDS if name not in PLACE}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @property
    def place(self) -> dict[str, Any]:
        """The settings that belong to the place, not to the experiment."""
        return {name: getattr(self, name) for name in PLACE}

    def without_effect(self, name: str) -> str | None:
        """The reason why a setting has no effect beside the others; None if it has one."""
        if name == "epochs" and self.steps is not None:
            return f"steps is {self.steps}, which decides the length (steps=none gives it back to epochs)"
        only = FIELDS[name].metadata["only"]
        if only is None:
            return None
        other, *values = only
        if getattr(self, other) in values:
            return self.without_effect(other)  # what belongs to a setting without effect has none either
        if other == "objective" and self.objective == "cross-entropy":
            return "the objective is cross-entropy, which has no penalty"
        return f"it belongs to {other} {' or '.join(values)}, and {other} is {getattr(self, other)}"

    def check_effects(self, given: Iterable[str]) -> None:
        """Raises ValueError if a setting that a user gave has no effect beside the others."""
        for name in given:
            reason = self.without_effect(name)
            if reason is not None:
                raise ValueError(f"--{name.replace('_', '-')} would have no effect: {reason}. Leave it out")


FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}

# What may differ where a run goes on, is evaluated or is compared; each field says of itself whether it belongs here.
PLACE = tuple(name for name, field in FIELDS.items() if field.metadata["place"])
PATHS = tuple(name for name, field in FIELDS.items() if field.metadata["path"])


def as_meant(name: str, value: Any) -> Any:
    """A setting's value as it is kept: a path is absolute.

    Raises:
        ValueError: a path is empty, which is mostly a variable of the shell that is not set.
    """
    if name in PATHS and value == "":
        raise ValueError(f"{name} is empty; give a folder (. is this one), or leave it out")
    return absolute(value) if name in PATHS and isinstance(value, str) else value
