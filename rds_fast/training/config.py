"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from . import checks, models
from . import data as data_sets  # a setting is called data
from .names import check_name

OBJECTIVES = (
    *("cross-entropy", "input-gradient", "density", "adversarial"),
    *("attribution", "robust-attribution", "jacobian", "gradient-matching"),
)
NORMED = ("input-gradient", "density", "gradient-matching")  # the p-norm of a gradient
PENALIZED = ("input-gradient", "density", "attribution", "jacobian", "gradient-matching")  # cross-entropy + λ · penalty
ATTRIBUTION = ("attribution", "robust-attribution")
ATTACKED = ("adversarial", *ATTRIBUTION)  # the loss is of a point in the ball around each sample
GRADIENTS_OF = ("target_logit", "cross_entropy", "log_density")
METHODS = ("exact", "finite_difference")
WITH_PATH = ("l1", "l2")  # a sum is the difference of the losses at the path's ends
SIZES = (*WITH_PATH, "sum")
NORMS = ("linf", "l2")
ADAPTIVE = ("penalty-ratio", "accuracy-budget")
WEIGHT_SCHEDULES = ("constant", "linear", "cosine", "step", *ADAPTIVE)
OPTIMIZERS = ("adam", "sgd")
LR_SCHEDULES = ("constant", "cosine", "step")
LR_SCALINGS = ("none", "linear")
DEVICES = ("auto", "cpu", "cuda")
AMP = ("none", "bf16", "fp16")

# Where a run goes on, these may differ: they decide where and how it is watched, not what is computed.
RESUMABLE_CHANGES = ("device", "threads", "workers", "log_interval", "checkpoint_interval")


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
        "Folder of the four IDX files, instead of the packaged images; imagefolder: of train/CLASS and val/CLASS.",
        only=("data", *data_sets.FROM_DISK),
    )
    data_seed: int = _setting(
        0, "Data", "Decides the splits, which block is on top, and synthetic images.", only=("data", *data_sets.SEEDED)
    )
    image_size: int = _setting(
        224,
        "Data",
        "Height and width of the images of synthetic and imagefolder.",
        only=("data", "synthetic", "imagefolder"),
    )
    classes: int = _setting(1000, "Data", "The number of classes of synthetic.", only=("data", "synthetic"))
    train_size: int = _setting(
        4096, "Data", "Training images of synthetic; validation has an eighth of that.", only=("data", "synthetic")
    )

    objective: str = _setting("density", "Objective", "What is minimised.", names=OBJECTIVES)
    weight: float = _setting(
        0.5,
        "Objective",
        "The penalty's weight; where it adapts, its first value.",
        only=("objective", *PENALIZED, "robust-attribution"),
    )
    p: float = _setting(2.0, "Objective", "The norm, from 1 to inf.", only=("objective", *NORMED))
    power: float = _setting(
        1.0,
        "Objective",
        "The exponent of the norm, the same for all penalties; InputGradientPenalty's own default is 2.",
        only=("objective", *NORMED),
    )
    of: str = _setting(
        "target_logit",
        "Objective",
        "Whose input gradient; log_density is for gradient-matching.",
        names=GRADIENTS_OF,
        only=("objective", "input-gradient", "gradient-matching"),
    )
    method: str = _setting("exact", "Objective", "How it is computed.", names=METHODS, only=("objective", "density"))
    step_size: float = _setting(1e-2, "Objective", "Of the finite difference.", only=("method", "finite_difference"))
    epsilon: float = _setting(
        0.1, "Objective", "The radius of the attacks' ball; inputs are in [0, 1].", only=("objective", *ATTACKED)
    )
    attack_norm: str = _setting(
        "linf", "Objective", "The norm of the ball.", names=NORMS, only=("objective", "adversarial")
    )
    attack_steps: int = _setting(7, "Objective", "Steps of each attack.", only=("objective", *ATTACKED))
    attack_step_size: float | None = _setting(
        None, "Objective", "Their length (default: 2.5 epsilon / steps).", only=("objective", *ATTACKED)
    )
    attribution_size: str = _setting(
        "l1", "Objective", "The size of an attribution.", names=SIZES, only=("objective", *ATTRIBUTION)
    )
    path_steps: int = _setting(
        50, "Objective", "Points of an attribution's path.", only=("attribution_size", *WITH_PATH)
    )
    attack_path_steps: int | None = _setting(
        None,
        "Objective",
        "The same inside the attacks (default: a fifth of path-steps).",
        only=("attribution_size", *WITH_PATH),
    )
    attribution_layer: str | None = _setting(
        None,
        "Objective",
        "Attribute to this layer of the model, not to the input.",
        only=("attribution_size", *WITH_PATH),
    )
    projections: int = _setting(
        1, "Objective", "Random directions of the Jacobian; 0: all of it.", only=("objective", "jacobian")
    )
    teacher: str | None = _setting(
        None, "Objective", "Folder of the finished run to match.", only=("objective", "gradient-matching")
    )
    penalty_every: int = _setting(
        1,
        "Objective",
        "Apply the penalty every so many steps, as many times heavier.",
        only=("objective", *PENALIZED),
    )
    penalty_share: float = _setting(
        1.0, "Objective", "Apply it to this share of each batch, drawn at random.", only=("objective", *PENALIZED)
    )
    weight_schedule: str = _setting(
        "constant",
        "Objective",
        "The weight over time; the last two adapt it to weight-target.",
        names=WEIGHT_SCHEDULES,
        only=("objective", *PENALIZED, "robust-attribution"),
    )
    weight_warmup_epochs: float = _setting(
        0.0,
        "Objective",
        "Linear, cosine: the epochs in which the weight rises from 0.",
        only=("weight_schedule", "linear", "cosine"),
    )
    weight_milestones: tuple[int, ...] = _setting(
        (), "Objective", "Step: an epoch after which it changes; may be repeated.", only=("weight_schedule", "step")
    )
    weight_factor: float = _setting(
        0.1, "Objective", "Step: by what it is multiplied.", only=("weight_schedule", "step")
    )
    weight_target: float | None = _setting(
        None,
        "Objective",
        "penalty-ratio: the weighted penalty over the cross-entropy; accuracy-budget: the training accuracy to hold.",
        only=("weight_schedule", *ADAPTIVE),
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
    steps: int | None = _setting(None, "Optimisation", "Steps of the optimiser in all, in the place of epochs.")
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
        "Processes that decode the images of imagefolder; 0: this one (default: one for each core).",
        only=("data", "imagefolder"),
    )
    log_interval: int = _setting(50, "Running", "Steps between rows of metrics; on a GPU each costs a wait.")
    checkpoint_interval: int | None = _setting(None, "Running", "Steps between checkpoints, besides each epoch's end.")

    def __post_init__(self) -> None:
        for setting in ("lr_milestones", "weight_milestones"):  # a list, as JSON has it, is welcome
            object.__setattr__(self, setting, tuple(getattr(self, setting)))
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
        """The settings in which two runs compute different numbers: name -> (this one's value, the other's)."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in FIELDS if name not in RESUMABLE_CHANGES}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

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


FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}
