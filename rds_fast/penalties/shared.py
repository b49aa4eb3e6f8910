"""The forward that a penalty and its loss share, and what a penalty is: one method over it.

    class Sensitivity(rds_fast.Penalty):
        def per_sample(self, shared):                       # -> (N,)
            return shared.gradient("target_logit").flatten(1).abs().sum(1)

Per-sample gradients come from one backward of the sum over samples, which is right only if samples do not interact.
Batch norm in train mode couples them: the gradient of sample n then holds what x_n does to the other samples' outputs
through the batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import implementation
from ..compilation import uncompiled
from ..double_backward import fast_double_backward
from ..ops.cross_entropy import cross_entropy_with_logsumexp
from ..ops.gradient_norm import gradient_norm
from ..ops.logsumexp import autocast_enabled, logsumexp, without_autocast
from .checks import (
    check_autograd,
    check_choice,
    check_given_logits,
    check_input,
    check_logits,
    check_model,
    no_path,
    refuse_compiled,
    refuse_compiled_logits,
    refuse_normalised,
    refuse_one_logit,
)
from .inputs import Inputs
from .losses import Loss, density_under, losses_of, target_logit
from .model_state import frozen_statistics

GRADIENTS_OF = ("cross_entropy", "target_logit", "log_density")

# The cotangent of the inner pass where it may run in float16. It lifts what lies below 6e-8, float16's least number,
# and leaves room below 65504 for gradients of up to 255. A power of two, so that undoing it in float32 is exact. It is
# no larger because an overflow here would last: the gradient scaler cannot lower it.
FLOAT16_COTANGENT = 2.0**8


def differentiable_input(x: Tensor, name: str = "x") -> Tensor:
    """An alias of x to differentiate with respect to.

    The inner pass leaves no trace on x: neither ``x.grad``, nor its hooks, nor ``requires_grad`` see it. If x itself
    requires a gradient the alias is a view, so that the penalty stays differentiable with respect to x.
    """
    check_input(x, name)
    check_autograd()
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def logits_of(model: Callable[..., Tensor], x: Any, samples: int | None = None, *, derivatives: int = 0) -> Tensor:
    """The model's logits, checked, that can be differentiated so many times with respect to the inputs.

    A tuple of inputs goes to ``model(*x)``, a dict to ``model(**x)``; then ``samples`` says of how many samples.
    """
    check_model(model)
    with fast_double_backward() if derivatives == 2 else nullcontext():
        logits = model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x)
    check_logits(logits, x, samples)
    if derivatives and not logits.requires_grad:
        raise no_path()
    return logits


class InputGradients(NamedTuple):
    """The gradients with respect to each input, times the cotangent that they were begun with."""

    scaled: tuple[Tensor, ...]
    cotangent: float

    def undone(self) -> tuple[Tensor, ...]:
        """Without the cotangent, in float32 if there was one."""
        return self.scaled if self.cotangent == 1.0 else tuple(g.float() / self.cotangent for g in self.scaled)


def input_gradients(
    output: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False, names: Sequence[str] = ("x",)
) -> InputGradients:
    """The inner pass: ∇ Σ output with respect to each of the inputs, outside autocast, which is for forwards.

    Without ``create_graph`` the graph of the output is kept for the training step's own backward, and none is added.
    """
    if not output.requires_grad:
        raise no_path()
    device = inputs[0].device
    in_float16 = torch.float16 in (output.dtype, *(x.dtype for x in inputs)) or (
        autocast_enabled(device) and torch.get_autocast_dtype(device.type) == torch.float16
    )
    cotangent = FLOAT16_COTANGENT if in_float16 else 1.0
    cotangents = torch.full((), cotangent, dtype=output.dtype, device=output.device).expand_as(output)
    with without_autocast(device):
        gradients = torch.autograd.grad(
            output, inputs, cotangents, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
    for gradient, name in zip(gradients, names, strict=True):
        if gradient is None:
            raise no_path(name)
    return InputGradients(gradients, cotangent)


class SharedForward:
    """One forward of a model at x, and what is made of it, each thing computed once, when it is first asked for.

    ``rds_fast.PenalizedLoss`` makes one for its penalty and takes the logits and the loss from the same. The forward
    runs when something of it is first asked for: what a penalty computes before that comes before it.

    Attributes:
        model: as it was given. A penalty that runs it again does so by ``logits_at``, which leaves its buffers alone.
        x: the inputs as they were given: a tensor, or a tuple or a dict of inputs.
        targets: the labels y; None where there are none.
        given: x, and which of it is differentiated: ``given.differentiated``, a tuple of tensors.
        inputs: x as the logits are computed from it, what is differentiated being an alias; as ``x`` otherwise.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        x: Any,
        y: Any = None,
        *,
        loss: Loss | None = None,
        label_smoothing: float = 0.0,
        trains: bool = False,
    ) -> None:
        """``x``: also ``Inputs``. ``trains``: the training loss is wanted too, with the label smoothing."""
        self.given = x if isinstance(x, Inputs) else Inputs.checked(x)
        self.model, self.x, self.targets = model, self.given.x, y
        self._loss, self._label_smoothing, self._trains = loss, label_smoothing, trains
        self.mask_is_used = False
        self._logits: Tensor | None = None
        self._aliases: tuple[Tensor, ...] = ()
        self._inner_passes: dict[str, InputGradients] = {}

    @staticmethod
    def of_logits(logits: Tensor, x: Tensor, y: Any = None) -> SharedForward:
        """The same of logits that were computed already from x, which required a gradient then."""
        check_given_logits(logits, x)

        def nothing(_: Any) -> Tensor:
            raise ValueError(
                "the penalty runs the model a second time, and the logits alone were given; give the model"
            )

        shared = SharedForward(nothing, x, y)
        shared._aliases = (x,)
        shared._logits = logits
        return shared

    def run(self, derivatives: int = 2) -> None:
        """The forward, for logits that can be differentiated so many times with respect to the inputs.

        Two are what ``gradient`` needs, and what there are unless a penalty asks for fewer before anything else.
        """
        if self.has_run:
            raise RuntimeError("the shared forward has run already; a penalty that needs its own kind must come first")
        x = self.x
        if derivatives:
            if derivatives == 2:
                refuse_compiled(self.model)
            self._aliases = tuple(map(differentiable_input, self.given.differentiated, self.given.names))
            x = self.given.with_differentiated(self._aliases)
        logits = logits_of(self.model, x, self.given.samples, derivatives=derivatives)
        if derivatives == 2:
            refuse_compiled_logits(logits)
        if self._trains and self._loss is None:
            refuse_one_logit(logits)
        self._logits = logits

    @property
    def has_run(self) -> bool:
        """Whether the logits are there."""
        return self._logits is not None

    @property
    def logits(self) -> Tensor:
        """(N, C)."""
        if self._logits is None:
            self.run()
        assert self._logits is not None
        return self._logits

    @property
    def inputs(self) -> Any:
        self.logits  # noqa: B018  # it makes them
        return self.given.with_differentiated(self._aliases) if self._aliases else self.x

    def logits_at(self, *inputs: Tensor) -> Tensor:
        """The logits with these for the inputs that are differentiated: another forward, which leaves buffers alone."""
        with frozen_statistics(self.model):
            return logits_of(self.model, self.given.with_differentiated(inputs), self.given.samples)

    @cached_property
    def loss(self) -> Tensor:
        """ℓ of each sample, (N,): the cross-entropy without label smoothing, or the loss that was given."""
        if self._trains and not self._label_smoothing:
            return self.training_loss
        return self.loss_of(self.logits)

    @cached_property
    def training_loss(self) -> Tensor:
        """The same with the label smoothing."""
        return self.loss_of(self.logits) if self._loss is not None else self._with_logsumexp[0]

    @cached_property
    def _with_logsumexp(self) -> tuple[Tensor, Tensor]:
        """The cross-entropy and the log-sum-exp from one read of the logits."""
        return cross_entropy_with_logsumexp(self.logits, self.targets, label_smoothing=self._label_smoothing)

    def loss_of(self, logits: Tensor, targets: Any = None) -> Tensor:
        """ℓ of other logits; default: of the same targets."""
        return losses_of(self._loss, logits, self.targets if targets is None else targets)

    @cached_property
    def log_density(self) -> Tensor:
        """log p(x) up to a constant, (N,): log Σ exp f, or what the loss that was given says it is."""
        if self._trains and self._loss is None:
            refuse_normalised(self.logits)
            return self._with_logsumexp[1]
        return self.log_density_of(self.logits)

    def log_density_of(self, logits: Tensor) -> Tensor:
        """The same of other logits."""
        if self._loss is not None:
            return density_under(self._loss, logits, self.targets)
        refuse_one_logit(logits)
        refuse_normalised(logits)
        return logsumexp(logits)

    def output(self, of: str, logits: Tensor | None = None) -> Tensor:
        """What is differentiated with respect to the inputs, (N,), one of ``GRADIENTS_OF``; perhaps of other logits."""
        if of == "cross_entropy":
            return self.loss if logits is None else self.loss_of(logits)
        if of == "log_density":
            return self.log_density if logits is None else self.log_density_of(logits)
        check_choice("of", of, GRADIENTS_OF)
        return target_logit(self.logits if logits is None else logits, self.targets)

    def gradient(self, of: str | Tensor) -> Any:
        """The gradient of each sample with respect to x, of x's shape, differentiable; 0 where the mask leaves it out.

        ``of``: ``"cross_entropy"`` (of ``loss``), ``"target_logit"``, ``"log_density"``, or a tensor (N,) computed from
        the logits. With a tuple or a dict as x, a dict of gradients, by the positions or names of the inputs.
        """
        gradients = self.masked(self._inner_pass(of).undone())
        keys = self.given.keys
        return gradients[0] if keys == (None,) else dict(zip(keys, gradients, strict=True))

    def gradients_without_graph(self, output: Tensor) -> tuple[Tensor, ...]:
        """The gradients of Σ output with respect to all inputs, as constants, and not masked."""
        return input_gradients(output, self._aliases, names=self.given.names).undone()

    def gradient_norm(
        self, of: str | Tensor, p: float = 2.0, power: float = 1, *, target: Sequence[Tensor] | None = None
    ) -> Tensor:
        """``‖∇ₓ‖ₚ^power`` of each sample, (N,): of ``gradient(of)``, over all inputs together that are differentiated.

        Given constant ``target`` gradients, ``‖∇ₓ − target‖ₚ^power``.
        """
        power = float(power)  # the negative of one of NumPy's unsigned numbers is not what it says
        gradients, cotangent = self._inner_pass(of)
        if cotangent != 1.0:
            gradients = tuple(gradient.float() for gradient in gradients)
        if target is not None:
            gradients = tuple(g - cotangent * constant for g, constant in zip(gradients, target, strict=True))
        norm = gradient_norm(self.rows(gradients), p, power=power)
        return norm if cotangent == 1.0 else norm * cotangent**-power

    def rows(self, gradients: Sequence[Tensor]) -> Tensor:
        """The gradients of all inputs, masked, as one tensor (N, ...) whose norm is theirs together."""
        gradients = self.masked(gradients)
        return gradients[0] if len(gradients) == 1 else torch.cat([g.flatten(1) for g in gradients], 1)

    def masked(self, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of all inputs, 0 where the mask leaves them out, or times its factors."""
        self.mask_is_used = True
        return self.given.masked(gradients)

    def _inner_pass(self, of: str | Tensor) -> InputGradients:
        """The gradients with their graph."""
        if isinstance(of, str) and of in self._inner_passes:
            return self._inner_passes[of]
        logits = self.logits  # before what is differentiated: it makes the aliases of the inputs
        output = self.output(of) if isinstance(of, str) else of
        if not isinstance(output, Tensor) or output.shape != logits.shape[:1]:
            given = f"has shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"is {output!r}"
            raise ValueError(
                f"what is to be differentiated {given}; it must be one of {', '.join(map(repr, GRADIENTS_OF))}, or "
                f"a tensor computed from shared.logits with a value of each sample, ({self.given.samples},)"
            )
        found = input_gradients(output, self._aliases, create_graph=True, names=self.given.names)
        if isinstance(of, str):
            self._inner_passes[of] = found
        return found


class Penalty:
    """What penalties have in common: ``penalty(model, x, y)``, the mean of ``per_sample(shared)``, which each defines.

    ``rds_fast.PenalizedLoss`` takes any object with that method, and any function of the shared forward alone. A
    penalty may be made of others, ``DensityPenalty().per_sample(shared) + ...``, from the same forward.
    """

    fast: bool = True

    def per_sample(self, shared: SharedForward) -> Tensor:
        """The penalty of each sample, (N,), differentiable with respect to the parameters."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no per_sample(shared), the penalty of each sample (N,)"
        )

    @uncompiled
    def __call__(
        self,
        model: Callable[..., Tensor],
        x: Any,
        y: Any = None,
        *,
        mask: Any = None,
        with_respect_to: str | int | Sequence[str | int] | None = None,
    ) -> Tensor:
        """The mean penalty of x (N, ...) with labels y, a scalar.

        ``mask`` and ``with_respect_to``, and x as a tuple or a dict of inputs, are as for ``rds_fast.PenalizedLoss``.
        """
        shared = SharedForward(model, Inputs.checked(x, with_respect_to, mask), y)
        with implementation(self.fast):
            return penalties_of(self, shared).mean()


def penalties_of(penalty: Any, shared: SharedForward) -> Tensor:
    """The penalty of each sample, (N,), checked."""
    penalties = getattr(penalty, "per_sample", penalty)(shared)
    if not isinstance(penalties, Tensor) or penalties.shape != (shared.given.samples,):
        is_tensor = isinstance(penalties, Tensor)
        given = f"a tensor of shape {tuple(penalties.shape)}" if is_tensor else type(penalties).__name__
        raise TypeError(
            f"the penalty returned {given}; it must return the penalty of each sample, ({shared.given.samples},)"
        )
    if shared.given.masks is not None and not shared.mask_is_used:
        raise ValueError(
            f"a mask is given, and {type(penalty).__name__} penalises no input gradient that it could confine; leave "
            "the mask out, or take the gradient from shared.gradient in a penalty of your own"
        )
    return penalties
