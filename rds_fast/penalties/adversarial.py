"""Adversarial training: the cross-entropy at the worst point of a ball around each sample (Madry et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ..attacks.pgd import ascend, check_attack, detached
from ..backends import implementation
from ..compilation import uncompiled
from .checks import check_input, check_pair
from .loss import LossTerms
from .losses import check_label_smoothing, check_sample_weight, cross_entropies_of, mean_of_counted
from .model_state import frozen_statistics
from .shared import logits_of


@dataclass(frozen=True)
class AdversarialLoss:
    """``loss(model, x, y)``: the mean over samples of max CE(f(x'), y) over ‖x' − x‖ ≤ ε.

    The maximum is approached by projected gradient ascent (``rds_fast.evaluation.pgd``): steps along the gradient's
    sign (L∞) or along the normalised gradient (L2) from a uniformly random point of the ball, the last iterate. x' is
    then a constant, as Danskin's theorem allows.

    The model stays in its mode. In train mode the attack normalises by the batch statistics of its own points, as the
    training forward at x' does; that forward alone updates running statistics, once. Parameters' gradients are taken
    once, at x'; ``x.grad`` is left alone. In units of F, the model's forward, a step costs (3 + 2 · steps) F, for plain
    training's 3 F.

    Source: Madry, Makelov, Schmidt, Tsipras and Vladu (2018); on CIFAR-10, 7 steps of 2/255 in a ball of 8/255.

    Args:
        epsilon: radius of the ball, in the units of x; at 0 this is plain training.
        norm: ``"linf"`` or ``"l2"``.
        steps: gradient steps, at least 1.
        step_size: length of a step in the chosen norm; default ``2.5 * epsilon / steps``.
        random_start: False begins at x.
        bounds: smallest and largest value of an input; infinite ones are no bounds.
        generator: the source of the random start, on x's device; default: PyTorch's own.
        label_smoothing: ε in [0, 1] of the cross-entropy that is trained, and so of the one that is maximised.
        fast: False runs the cross-entropy on plain PyTorch.

    Raises:
        TypeError: a number is none.
        ValueError: an argument is out of range, or there is no such norm.
    """

    epsilon: float
    _: KW_ONLY
    norm: str = "linf"
    steps: int = 7
    step_size: float | None = None
    random_start: bool = True
    bounds: tuple[float, float] = (0.0, 1.0)
    generator: torch.Generator | None = None
    label_smoothing: float = 0.0
    fast: bool = True

    def __post_init__(self) -> None:
        check_attack(self.epsilon, self.norm, self.steps, self.step_size, self.bounds)
        check_label_smoothing(self.label_smoothing)

    @uncompiled
    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        step: int | None = None,
        sample_weight: Tensor | None = None,
    ) -> LossTerms:
        """The loss of one batch; ``terms.total.backward()`` trains.

        Args:
            model: maps x to logits (N, C).
            x: (N, ...), floating point, within the bounds.
            y: class indices (N,), rows of −100 left out of the loss and its mean; or probabilities (N, C).
            step: not used; training loops pass it to every loss.
            sample_weight: (N,), floating point: the mean is weighted, as in ``rds_fast.PenalizedLoss``.

        Returns:
            ``LossTerms(total, cross_entropy, penalty, logits)``: the mean cross-entropy at x' twice, 0, and the logits
            (N, C) at x'.

        Raises:
            TypeError, ValueError, IndexError, RuntimeError: as ``rds_fast.evaluation.pgd`` and
            ``cross_entropy_with_logsumexp``; on CUDA, values out of range fail as PyTorch's do.
        """
        check_input(x)
        check_pair(x, y)
        check_sample_weight(sample_weight, x)
        with implementation(self.fast):
            moved = self._worst(model, x, y)
            logits = logits_of(model, moved)
            loss = mean_of_counted(cross_entropies_of(logits, y, self.label_smoothing), y, sample_weight)
        return LossTerms(loss, loss, torch.zeros_like(loss), logits)

    def _worst(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        with frozen_statistics(model):
            frozen = detached(model)
            return ascend(
                lambda moved: cross_entropies_of(logits_of(frozen, moved), y, self.label_smoothing),
                x,
                self.epsilon,
                norm=self.norm,
                steps=self.steps,
                step_size=self.step_size,
                random_start=self.random_start,
                bounds=self.bounds,
                generator=self.generator,
            )
