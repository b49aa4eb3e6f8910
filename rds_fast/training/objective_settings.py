"""The settings of what is minimised."""

from __future__ import annotations

import dataclasses
import math

from .fields import setting

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
LOSSES = ("mean", "group-dro")
WEIGHT_SCHEDULES = ("constant", "linear", "cosine", "step", *ADAPTIVE)


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """The part of ``TrainingConfig`` that decides the objective; ``objectives`` builds it."""

    objective: str = setting("density", "Objective", "What is minimised.", names=OBJECTIVES)
    loss: str = setting(
        "mean",
        "Objective",
        "Over a batch: the mean, or group DRO, which weights the groups of waterbirds or celeba-hair by their losses; "
        "the penalty's mean is weighted alike.",
        names=LOSSES,
    )
    group_step_size: float = setting(
        0.01, "Objective", "The step size of the groups' weights.", only=("loss", "group-dro")
    )
    group_adjustment: float = setting(
        0.0,
        "Objective",
        "C of the allowance C / sqrt(samples) for each group's generalisation.",
        only=("loss", "group-dro"),
    )
    class_weights: str = setting(
        "none",
        "Objective",
        "Weights of the samples by class, in the loss and in the penalty: none, balanced (the inverse of the class's "
        "share), or a number for each class, joined by commas (in a sweep by colons).",
        only=("loss", "mean"),
    )
    weight: float = setting(
        0.5,
        "Objective",
        "The penalty's weight; where it adapts, its first value.",
        only=("objective", *PENALIZED, "robust-attribution"),
    )
    p: float = setting(2.0, "Objective", "The norm, from 1 to inf.", only=("objective", *NORMED))
    power: float = setting(
        1.0,
        "Objective",
        "The exponent of the norm.",
        only=("objective", *NORMED),
    )
    of: str = setting(
        "target_logit",
        "Objective",
        "Whose input gradient; log_density is for gradient-matching.",
        names=GRADIENTS_OF,
        only=("objective", "input-gradient", "gradient-matching"),
    )
    method: str = setting("exact", "Objective", "How it is computed.", names=METHODS, only=("objective", "density"))
    step_size: float = setting(1e-2, "Objective", "Of the finite difference.", only=("method", "finite_difference"))
    epsilon: float = setting(
        0.1, "Objective", "The radius of the attacks' ball; inputs are in [0, 1].", only=("objective", *ATTACKED)
    )
    attack_norm: str = setting(
        "linf", "Objective", "The norm of the ball.", names=NORMS, only=("objective", "adversarial")
    )
    attack_steps: int = setting(7, "Objective", "Steps of each attack.", only=("objective", *ATTACKED))
    attack_step_size: float | None = setting(
        None, "Objective", "Their length (default: 2.5 epsilon / steps).", only=("objective", *ATTACKED)
    )
    attribution_size: str = setting(
        "l1", "Objective", "The size of an attribution.", names=SIZES, only=("objective", *ATTRIBUTION)
    )
    path_steps: int = setting(
        50, "Objective", "Points of an attribution's path.", only=("attribution_size", *WITH_PATH)
    )
    attack_path_steps: int | None = setting(
        None,
        "Objective",
        "The same inside the attacks (default: a fifth of path-steps).",
        only=("attribution_size", *WITH_PATH),
    )
    attribution_layer: str | None = setting(
        None,
        "Objective",
        "Attribute to this layer of the model, not to the input.",
        only=("attribution_size", *WITH_PATH),
    )
    projections: int = setting(
        1, "Objective", "Random directions of the Jacobian; 0: all of it.", only=("objective", "jacobian")
    )
    teacher: str | None = setting(
        None, "Objective", "Folder of the finished run to match.", only=("objective", "gradient-matching"), path=True
    )
    penalty_every: int = setting(
        1,
        "Objective",
        "Apply the penalty every so many steps, as many times heavier.",
        only=("objective", *PENALIZED),
    )
    penalty_share: float = setting(
        1.0, "Objective", "Apply it to this share of each batch, drawn at random.", only=("objective", *PENALIZED)
    )
    weight_schedule: str = setting(
        "constant",
        "Objective",
        "The weight over time; the last two adapt it to weight-target.",
        names=WEIGHT_SCHEDULES,
        only=("objective", *PENALIZED, "robust-attribution"),
    )
    weight_warmup_epochs: float = setting(
        0.0,
        "Objective",
        "Linear, cosine: the epochs in which the weight rises from 0.",
        only=("weight_schedule", "linear", "cosine"),
    )
    weight_milestones: tuple[int, ...] = setting(
        (), "Objective", "Step: an epoch after which it changes; may be repeated.", only=("weight_schedule", "step")
    )
    weight_factor: float = setting(
        0.1, "Objective", "Step: by what it is multiplied.", only=("weight_schedule", "step")
    )
    weight_target: float | None = setting(
        None,
        "Objective",
        "penalty-ratio: the weighted penalty over the cross-entropy; accuracy-budget: the training accuracy to hold.",
        only=("weight_schedule", *ADAPTIVE),
    )
    label_smoothing: float = setting(0.0, "Objective", "Of the cross-entropy's targets; no penalty changes by it.")
    fast: bool = setting(True, "Objective", "The fused operations, or plain PyTorch.")


def weights_of_classes(text: str) -> tuple[float, ...] | None:
    """The numbers that ``class_weights`` lists; None where it is none or balanced.

    Raises:
        ValueError: it is something else.
    """
    if text in ("none", "balanced"):
        return None
    try:
        weights = tuple(float(part) for part in text.replace(":", ",").split(","))
        if all(0 < weight < math.inf for weight in weights):
            return weights
    except (ValueError, AttributeError):
        pass
    raise ValueError(
        f"class_weights is {text!r}; it must be none, balanced, or a positive number for each class, joined by commas, "
        "such as 1,2.5 (in a sweep, where commas divide candidates, by colons)"
    )
