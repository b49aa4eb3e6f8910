"""Robust attribution regularisation: integrated gradients from x to the worst point of an L∞ ball around it are small.

With IG(x, x') the integrated gradients of the cross-entropy from x to x', s a size and ‖x' − x‖_∞ ≤ ε,

    IG-NORM        CE(x) + λ max s(IG(x, x'))                PenalizedLoss(AttributionPenalty(ε), λ)
    IG-SUM-NORM    max {CE(x') + β s(IG(x, x'))}             RobustAttributionLoss(β, ε)

The maximum is approached by an attack whose path has fewer points than the loss's. For the signed sum as s completeness
gives s(IG) = ℓ(x') − ℓ(x): IG-NORM with λ = 1 is adversarial training (Madry et al. 2018), and so is IG-SUM-NORM with
β = 0.

Source: Chen, Wu, Rastogi, Liang and Jha, NeurIPS 2019. Their code sums over the batch; here the mean is taken, so that
neither weight nor learning rate depends on its size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attacks.pgd import ascend, check_attack, detached
from ..backends import implementation
from ..compilation import uncompiled
from ..ops.gradient_norm import gradient_norm
from ..ops.inputs import check_count
from .checks import check_autograd, check_choice, check_input, check_pair, refuse_compiled
from .integrated_gradients import find_layer, path_terms
from .loss import LossTerms
from .losses import check_label_smoothing, check_sample_weight, cross_entropies_of, mean_of_counted, weighted_mean
from .model_state import frozen_statistics, samples_interact
from .schedules import Schedule, check_weight, is_zero, weight_at
from .shared import Penalty, SharedForward, logits_of

SIZES = ("l1", "l2", "sum")


@dataclass(frozen=True, kw_only=True)
class _Regularisation:
    """What both forms share: the settings of the path, of the attack and of the size."""

    path_steps: int = 50
    attack_steps: int = 7
    attack_step_size: float | None = None
    attack_path_steps: int | None = None
    size: str = "l1"
    layer: str | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    generator: torch.Generator | None = None
    fast: bool = True

    def _check(self, epsilon: float) -> None:
        check_attack(epsilon, "linf", self.attack_steps, self.attack_step_size, self.bounds, "attack_")
        check_count("path_steps", self.path_steps)
        if self.attack_path_steps is not None:
            check_count("attack_path_steps", self.attack_path_steps)
        check_choice("size", self.size, SIZES)
        if self.layer is not None and not isinstance(self.layer, str):
            raise TypeError(
                f"layer is a {type(self.layer).__name__}; it must be a module's name, or None for the input"
            )

    def _check_call(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> nn.Module | None:
        """What holds of the arguments of a call; and the layer."""
        check_input(x)
        check_autograd()
        check_pair(x, y)
        refuse_compiled(model)
        return find_layer(model, self.layer)

    def _worst(self, objective: Callable[[Tensor], Tensor], model: Any, x: Tensor, epsilon: float) -> Tensor:
        """x' of an objective of the model; statistics rest, that none may change between a forward and its backward."""
        with frozen_statistics(model):
            return ascend(
                objective,
                x,
                epsilon,
                steps=self.attack_steps,
                step_size=self.attack_step_size,
                bounds=self.bounds,
                generator=self.generator,
            )

    @property
    def _attack_path_steps(self) -> int:
        return max(self.path_steps // 5, 1) if self.attack_path_steps is None else self.attack_path_steps

    def _norm(self, attribution: Tensor) -> Tensor:
        return gradient_norm(attribution, 1.0 if self.size == "l1" else 2.0)


@dataclass(frozen=True)
class AttributionPenalty(_Regularisation, Penalty):
    """``penalty(model, x, y)``: the mean over samples of max s(IG(x, x')) over ‖x' − x‖_∞ ≤ ε, IG-NORM's term.

    IG(x, x') = (x' − x) ⊙ (1/m) Σₖ ∇ℓ(z_k), z_k = x + (k/m)(x' − x), k = 1..m, or the path integral through a layer
    (see ``rds_fast.integrated_gradients``); ℓ is the cross-entropy, or the loss that a ``PenalizedLoss`` was given. x'
    comes from projected gradient ascent of s(IG) itself: a start drawn uniformly from the ball, steps along the sign of
    the gradient, the last iterate. It is then a constant. The penalty is differentiable with respect to the parameters,
    and to x where that requires a gradient. An ignored row, index −100, has penalty 0 and counts in the mean.

    The model stays in its mode. In train mode batch norm normalises over all path points of the batch together, in the
    attack and in the penalty, and so couples them; neither moves running statistics or other buffers.

    Cost, in units of F, the model's forward of the N samples, with m path points, m' of the attack and its s steps: 6m
    for the penalty and its share of the training step's backward, 4m' for a step of the attack, where no parameter's
    gradient is computed. So 6m + 4s m', 580 F at the defaults; plain training costs 3 F. A layer adds a point to each
    path. ``size="sum"`` is ℓ(x') − ℓ(x), by completeness, without a path: exact, and 6 + 2s.

    Source: Chen et al., NeurIPS 2019, who sum over the batch where this is the mean.

    Args:
        epsilon: radius of the L∞ ball, in the units of x; at 0 the penalty is 0.
        path_steps: m, at least 1.
        attack_steps: s, gradient steps of the attack, at least 1.
        attack_step_size: default ``2.5 * epsilon / attack_steps``.
        attack_path_steps: m'; default ``path_steps // 5``, at least 1.
        size: ``"l1"``, ``"l2"`` or ``"sum"``, the signed sum.
        layer: the name of the module whose outputs' attribution is penalised; None: the input's.
        bounds: smallest and largest value of an input; infinite ones are no bounds.
        generator: the source of the attack's start, on x's device; default: PyTorch's own.
        fast: False runs the penalty's own operations and the model's layers on plain PyTorch; True runs what is
            differentiated twice under ``rds_fast.fast_double_backward``.

    Raises:
        TypeError: x is not a floating-point tensor, y is of the wrong type, the model is not callable, does not return
            one tensor, or is no module where a layer is given; a number is none.
        ValueError: an argument is out of range, a name is unknown, x leaves the bounds, or shapes do not fit.
        IndexError: on CPU, a class index is out of range; on CUDA a device assertion fails, as in PyTorch.
        RuntimeError: gradients are disabled, there is no gradient path from x to the logits, the layer does not run
            exactly once, the model is compiled, or the call is inside a transformation of ``torch.func``.
    """

    epsilon: float

    def __post_init__(self) -> None:
        self._check(self.epsilon)

    def per_sample(self, shared: SharedForward) -> Tensor:
        """The penalty of each sample, (N,). It takes nothing from the shared forward."""
        model, x, y = shared.model, shared.x, shared.targets
        layer = self._check_call(model, x, y)
        moved = self._attack(shared, layer)
        with frozen_statistics(model):
            if self.size == "sum":
                return shared.loss_of(logits_of(model, moved), y) - shared.loss_of(logits_of(model, x), y)
            terms = path_terms(model, moved, y, x, self.path_steps, layer, output_of=shared.loss_of)
            return self._norm(terms.attribution)

    def _attack(self, shared: SharedForward, layer: nn.Module | None) -> Tensor:
        x, y, frozen = shared.x.detach(), shared.targets, detached(shared.model)

        def objective(moved: Tensor) -> Tensor:
            if self.size == "sum":
                return shared.loss_of(logits_of(frozen, moved), y)  # less ℓ(x), a constant
            steps = self._attack_path_steps
            return self._norm(path_terms(frozen, moved, y, x, steps, layer, output_of=shared.loss_of).attribution)

        return self._worst(objective, shared.model, x, self.epsilon)


class _Terms(NamedTuple):
    """At a point x': CE(x') (N,), s(IG(x, x')) (N,) and the logits (N, C)."""

    cross_entropy: Tensor
    size: Tensor
    logits: Tensor


@dataclass(frozen=True)
class RobustAttributionLoss(_Regularisation):
    """``loss(model, x, y)``: the mean over samples of max {CE(x') + β s(IG(x, x'))} over ‖x' − x‖_∞ ≤ ε, IG-SUM-NORM.

    Everything is as in ``AttributionPenalty``, but that the attack climbs the whole sum. The cross-entropy at x' comes
    from the path's own forward, whose last point is x', unless samples interact: in train mode with batch norm (or
    other buffers) x' has a forward of its own, normalised by the batch of x' alone, and that forward alone updates
    running statistics.

    Cost, in the units there: 6m + 4s m', so 580 F at the defaults; 3 + 2s more where x' has a forward of its own. For
    ``size="sum"`` it is 6 + 3s. At weight 0 the attack is adversarial training's, 2 F a step.

    Source: Chen et al., NeurIPS 2019, who sum over the batch where this is the mean.

    Args:
        weight: β, a number that is not negative, or a schedule: a callable of the step. At 0 this is
            ``rds_fast.AdversarialLoss``.
        epsilon, path_steps, attack_steps, attack_step_size, attack_path_steps, size, layer, bounds, generator, fast: as
            for ``AttributionPenalty``.
        label_smoothing: ε in [0, 1] of CE(x'), in the loss and in the attack. The attribution's cross-entropy has none.

    Raises:
        As ``AttributionPenalty``.
    """

    weight: float | Schedule
    epsilon: float
    _: KW_ONLY
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        self._check(self.epsilon)
        if not callable(self.weight):
            check_weight(self.weight)
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
            y: class indices (N,), rows of −100 left out of the cross-entropy and its mean; or probabilities (N, C).
            step: the number of the training step, from 0; needed by a schedule.
            sample_weight: (N,), floating point: both means are weighted, as in ``rds_fast.PenalizedLoss``.

        Returns:
            ``LossTerms(total, cross_entropy, penalty, logits)``: CE(x') + β s(IG), CE(x') and s(IG), means over the
            samples, and the logits (N, C) at x'.

        Raises:
            ValueError: the weight is a schedule and step is missing, or the schedule's weight is out of range.
            TypeError, ValueError, IndexError, RuntimeError: as ``AttributionPenalty``.
        """
        weight = weight_at(self.weight, step)
        layer = self._check_call(model, x, y)
        check_sample_weight(sample_weight, x)
        shared = not samples_interact(model)
        with implementation(self.fast):
            moved = self._attack(model, x.detach(), y, layer, weight, shared)
            terms = self._terms(model, moved, x, y, self.path_steps, layer, shared)
        cross_entropy = mean_of_counted(terms.cross_entropy, y, sample_weight)
        size = weighted_mean(terms.size, sample_weight)
        total = cross_entropy if is_zero(weight) else cross_entropy + weight * size
        return LossTerms(total, cross_entropy, size, terms.logits)

    def _attack(
        self, model: Any, x: Tensor, y: Tensor, layer: nn.Module | None, weight: float | Tensor, shared: bool
    ) -> Tensor:
        frozen = detached(model)

        def objective(moved: Tensor) -> Tensor:
            if is_zero(weight):
                return cross_entropies_of(logits_of(frozen, moved), y, self.label_smoothing)
            terms = self._terms(frozen, moved, x, y, self._attack_path_steps, layer, shared)
            return terms.cross_entropy + weight * terms.size

        return self._worst(objective, model, x, self.epsilon)

    def _terms(
        self, model: Any, moved: Tensor, x: Tensor, y: Tensor, steps: int, layer: nn.Module | None, shared: bool
    ) -> _Terms:
        if self.size == "sum":
            logits = logits_of(model, moved)
            with frozen_statistics(model):
                size = cross_entropies_of(logits, y) - cross_entropies_of(logits_of(model, x), y)
        elif shared:
            attribution, logits = path_terms(model, moved, y, x, steps, layer)
            size = self._norm(attribution)
        else:
            logits = logits_of(model, moved)
            with frozen_statistics(model):
                size = self._norm(path_terms(model, moved, y, x, steps, layer).attribution)
        return _Terms(cross_entropies_of(logits, y, self.label_smoothing), size, logits)
