"""Schedules of a penalty's weight: plain callables of the training step, which counts from 0.

Any function from an int to a float will do for ``rds_fast.PenalizedLoss``; these are the usual ones. They hold no
counter, so training resumed at a step has the weight of that step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..ops.inputs import check_number

# The weight of a step: a number, or a tensor of no dimension, whose value stays on its device.
Schedule = Callable[[int], float | Tensor]


def check_weight(weight: float, name: str = "weight") -> float:
    """The weight as a Python float, if it is a finite number that is not negative."""
    number = check_number(name, weight)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {number}; it must be finite and not negative")
    return number


def weight_at(weight: float | Schedule, step: int | None) -> float | Tensor:
    """The weight of a training step: the number itself or the schedule's value, checked; a tensor's is not read."""
    if not callable(weight):
        return float(weight)
    if step is None:
        raise ValueError(
            f"weight is a schedule ({weight!r}) and step was not given; call loss(model, x, y, step=step) "
            "with the number of the training step"
        )
    value = weight(step)
    if not isinstance(value, Tensor):
        return check_weight(value, f"the weight at step {step}")
    if value.dim() or not value.is_floating_point():
        raise TypeError(
            f"the weight at step {step} is a tensor of shape {tuple(value.shape)} and {value.dtype}; it must be "
            "a number, or a floating-point tensor of shape ()"
        )
    return value.detach()


def is_zero(weight: float | Tensor) -> bool:
    """Whether a weight is the number 0, so that nothing need be computed for it; a tensor's value is not read."""
    return not isinstance(weight, Tensor) and weight == 0


def check_steps(steps: int, name: str = "steps") -> None:
    """Raise unless ``steps`` is an int of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"{name} is a {type(steps).__name__}; it must be an int")
    if steps < 1:
        raise ValueError(f"{name} is {steps}; it must be at least 1")


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step is {step}; steps count from 0")


@dataclass(frozen=True)
class Constant:
    """The same weight at every step."""

    weight: float

    def __post_init__(self) -> None:
        check_weight(self.weight)

    def __call__(self, step: int) -> float:
        _check_step(step)
        return float(self.weight)


@dataclass(frozen=True)
class LinearWarmup:
    """From 0 at step 0 linearly to ``weight`` at step ``steps``, and ``weight`` from there on.

    ``weight`` may be a schedule itself, whose value is then scaled by the same ramp: a warm-up before a cosine, say, or
    before an adaptive weight.
    """

    weight: float | Schedule
    steps: int

    def __post_init__(self) -> None:
        if not callable(self.weight):
            check_weight(self.weight)
        check_steps(self.steps)

    def __call__(self, step: int) -> float | Tensor:
        _check_step(step)
        weight = self.weight(step) if callable(self.weight) else self.weight
        return (weight if isinstance(weight, Tensor) else float(weight)) * min(1.0, step / self.steps)


@dataclass(frozen=True)
class Cosine:
    """From ``start`` at step 0 along half a cosine to ``end`` at step ``steps``, and ``end`` from there on."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        check_weight(self.start, "start")
        check_weight(self.end, "end")
        check_steps(self.steps)

    def __call__(self, step: int) -> float:
        _check_step(step)
        progress = min(1.0, step / self.steps)
        # The share of the way left, never outside [0, 1], so that the weight never leaves [start, end].
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
        return left * float(self.start) + (1.0 - left) * float(self.end)


@dataclass(frozen=True)
class Step:
    """``weight`` at first, multiplied by ``factor`` at each of the steps in ``milestones``, which must increase."""

    weight: float
    milestones: tuple[int, ...]
    factor: float = 0.1

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_weight(self.factor, "factor")
        object.__setattr__(self, "milestones", tuple(self.milestones))  # a list is welcome, and copied
        for milestone in self.milestones:
            check_steps(milestone, "a milestone")
        if any(later <= earlier for earlier, later in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"milestones are {self.milestones}; they must increase")

    def __call__(self, step: int) -> float:
        _check_step(step)
        passed = sum(step >= milestone for milestone in self.milestones)
        return float(self.weight) * float(self.factor) ** passed
