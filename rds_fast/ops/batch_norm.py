"""Batch norm, with a sum and a ReLU after it if wanted, differentiable twice.

For a channel with M values, means over the channel, r = (var + ε)^−½, x̂ = (x − mean) r and

    z = γ x̂ + β + residual,   y = z, or y = m z with the mask m = [z > 0] where a ReLU follows;

u the cotangent of y, u' = m u, and P(t) = t − mean(t) − x̂ mean(t x̂):

    backward           gx = γ r P(u'),   gγ = Σ u' x̂,   gβ = Σ u',   gresidual = u'
    double backward    for v, the cotangent of gx, cᵤ = mean(u' x̂), cᵥ = mean(v x̂),
                       cᵤᵥ = mean(u' v) − mean(u') mean(v) − cᵤ cᵥ:
                       du = m γ r P(v),   dγ = r M cᵤᵥ,   dx = −γ r² (cᵤᵥ x̂ + cᵥ P(u') + cᵤ P(v))
                       for a, b and c, the cotangents of gγ, gβ and gresidual:
                       du += m (a x̂ + b + c),   dx += a r P(u')

In eval mode mean and r are constants: P drops out, dγ = r Σ u' v and dx = a r u' alone.

The mask is not stored: it is recomputed from x or, where a residual was added, read off y.

The kernels also do sums that autograd's engine would else do in passes of its own. The forward returns an alias of x,
which the backward works on: so dx, from the double backward, comes back to the forward's own node together with the
cotangent of y, and is added there. And where a residual block's result goes two ways, into the next block and past it,
the two get different aliases of y, and the two cotangents meet in the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import reference
from ..backends import in_transformation, select_for_layer
from ..reference import accumulation_dtype
from . import deferral
from .aliases import offer_alias, take_alias
from .function import Function
from .recompute import attach
from .registration import derivative, register, third_derivative


def _statistics_like(x: Tensor, parameter: Tensor | None = None) -> Tensor:
    """(C,), in the dtype of a parameter if there is one, else in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype) if parameter is None else parameter.dtype
    return x.new_empty(x.shape[1], dtype=dtype)


# x: (N, C, ...), contiguous or channels-last; every other argument of its shape has its dtype and strides, and so have
# such results. All that is (C,) is contiguous; parameters and running statistics are of any floating dtype, and their
# gradients of the same; mean and var are of the accumulation dtype where the operation computes them.
_forward = register(
    "batch_norm",
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps, bool relu, str backend) "
    "-> (Tensor y, Tensor mean, Tensor var)",
    lambda x, *_: (torch.empty_like(x), _statistics_like(x), _statistics_like(x)),
    row_wise=False,
)

_inference = register(
    "batch_norm",
    "batch_norm_inference(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, "
    "float eps, bool relu, str backend) -> Tensor",
    lambda x, *_: torch.empty_like(x),
    row_wise=False,
)


def _backward_fake(
    u: Tensor, other_u: Any, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    gresidual = x.new_empty(0) if y is None else torch.empty_like(x)
    sums = x.new_empty((2, x.shape[1]), dtype=accumulation_dtype(x.dtype))
    return torch.empty_like(x), _statistics_like(x, weight), _statistics_like(x, bias), gresidual, sums


# y is given where a residual was added before the ReLU; then the cotangent of y may come in two parts, u and other_u.
# gresidual has no elements where y is not given. sums, (2, C) in the accumulation dtype: Σ u' and Σ u' x̂.
_backward = register(
    "batch_norm",
    "batch_norm_backward(Tensor u, Tensor? other_u, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, Tensor? x_cotangent, bool training, float eps, bool relu, str backend) "
    "-> (Tensor gx, Tensor gweight, Tensor gbias, Tensor gresidual, Tensor sums)",
    _backward_fake,
    row_wise=False,
)


def _double_backward_fake(
    v: Tensor | None, vweight: Tensor | None, vbias: Any, vresidual: Any, u: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    weight, training = rest[1], rest[5]
    dx = torch.empty_like(x) if training or vweight is not None else x.new_empty(0)
    gx = torch.empty_like(x) if rest[-2] else x.new_empty(0)
    return torch.empty_like(x), dx, _statistics_like(x, weight), gx


# u is gresidual where y is given. dx has no elements in eval mode without vweight; gx, the backward's without
# x_cotangent, has none unless input_gradient.
_double_backward = register(
    "batch_norm",
    "batch_norm_double_backward(Tensor? v, Tensor? vweight, Tensor? vbias, Tensor? vresidual, Tensor u, Tensor x, "
    "Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, bool training, float eps, bool relu, "
    "bool input_gradient, str backend) -> (Tensor du, Tensor dx, Tensor dweight, Tensor gx)",
    _double_backward_fake,
    row_wise=False,
)


# gx again, in one pass, from the sums that the backward found. relu: u is to be masked, by x.
_input_gradient = register(
    "batch_norm",
    "batch_norm_input_gradient(Tensor u, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "Tensor sums, bool training, float eps, bool relu, str backend) -> Tensor gx",
    lambda u, x, *_: torch.empty_like(x),
    row_wise=False,
)


class BatchNorm(Function):
    """x (N, C, ...) to y, an alias of y, and what the backward needs: an alias of x, mean (C,) and var (C,)."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        relu: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        if training:
            # .data: as in PyTorch, no version counter tells of the update. Graphs that PyTorch's own batch norm made
            # before hold these tensors, unread, and would raise.
            running = [None if t is None else t.data for t in (running_mean, running_var)]
            y, mean, var = _forward(x, weight, bias, residual, *running, momentum, eps, relu, backend)
        else:
            assert running_mean is not None  # the public function saw to it
            assert running_var is not None
            y = _inference(x, running_mean, running_var, weight, bias, residual, eps, relu, backend)
            mean, var = running_mean.clone(), running_var.clone()  # a later step in train mode may update them
        return y, y.detach(), x.detach(), mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weight, bias, residual = inputs[1:4]
        y, _, x, mean, var = output
        *_, ctx.training, _, ctx.eps, ctx.relu, ctx.backend = inputs
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        mask_source = y if ctx.relu and residual is not None else None
        ctx.save_for_backward(x, mask_source, weight, bias, mean, var)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, other_u: Tensor | None, x_cotangent: Tensor | None, *_: Any) -> Any:
        rest = (None,) * 7
        if u is None:
            u, other_u = other_u, None
        if u is None:
            return x_cotangent, None, None, None, *rest
        x, y, weight, bias, mean, var = ctx.saved_tensors
        if other_u is not None and y is None:
            u, other_u = u + other_u, None
        u = laid_out_like(u, x)
        if other_u is not None:
            other_u = laid_out_like(other_u, x)
        if x_cotangent is not None:
            x_cotangent = laid_out_like(x_cotangent, x)
        gx, gweight, gbias, gresidual, sums = derivative(
            BatchNormBackward,
            *(u, other_u, x, y, weight, bias, mean, var, x_cotangent, ctx.training, ctx.eps, ctx.relu, ctx.backend),
        )
        if torch.is_grad_enabled() and x_cotangent is None:
            # gresidual is masked already; u is not, where there is a ReLU
            kept_u, mask = (u, ctx.relu) if y is None else (gresidual, False)
            options = (ctx.training, ctx.eps, mask, ctx.backend)
            attach(gx, lambda *kept: _input_gradient(*kept, *options), kept_u, x, weight, bias, mean, var, sums, like=1)
        needs = ctx.needs_input_grad
        return (
            gx,
            gweight if needs[1] else None,
            gbias if needs[2] else None,
            (u if y is None else gresidual) if needs[3] else None,
            *rest,
        )


class BatchNormBackward(Function):
    """gx, gγ, gβ, and gresidual if y is given; mean and var are functions of x, and dx the total derivative."""

    @staticmethod
    def forward(
        u: Tensor,
        other_u: Tensor | None,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        x_cotangent: Tensor | None,
        training: bool,
        eps: float,
        relu: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return _backward(u, other_u, x, y, weight, bias, mean, var, x_cotangent, training, eps, relu, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        u, other_u, x, y, weight, bias, mean, var, _, *ctx.options = inputs
        gresidual, sums = output[3:]
        deferral.write_for(ctx, 1 if other_u is None else 2)
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u if y is None else gresidual, x, y, weight, bias, mean, var)

    @staticmethod
    def backward(
        ctx: Any, v: Tensor | None, vweight: Tensor | None, vbias: Tensor | None, vresidual: Tensor | None, _: Any
    ) -> Any:
        rest = (None,) * 4
        awaited = deferral.is_awaited(ctx)
        if not awaited and all(cotangent is None for cotangent in (v, vweight, vbias, vresidual)):
            return *(None,) * 9, *rest
        saved = ctx.saved_tensors
        v, vresidual = (None if t is None else laid_out_like(t, saved[1]) for t in (v, vresidual))
        vweight, vbias = (None if t is None else t.contiguous() for t in (vweight, vbias))  # expanded, for a sum
        *options, backend = ctx.options
        du, dx, dweight, gx = derivative(
            BatchNormDoubleBackward, v, vweight, vbias, vresidual, *saved, *options, awaited, backend
        )
        if awaited:
            deferral.deliver(ctx, gx)
        needs = ctx.needs_input_grad
        return (
            du,
            du if needs[1] else None,
            dx if dx.numel() else None,
            None,
            dweight if needs[4] else None,
            None,
            None,
            None,
            v if needs[8] else None,
            *rest,
        )


class BatchNormDoubleBackward(Function):
    """du, dx, dγ, and gx again if asked for: the last derivative."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _double_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise third_derivative("batch norm")


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of the kernels that is nearest to x: channels-last if x is dense in it alone, else contiguous.

    Inside a transformation of ``torch.func`` it is contiguous: vmap cannot tell of another.
    """
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is None or x.is_contiguous() or in_transformation():
        return torch.contiguous_format
    if not x.is_contiguous(memory_format=channels_last):
        return torch.contiguous_format
    return channels_last


def laid_out_like(t: Tensor, x: Tensor) -> Tensor:
    """t in the dtype and memory format of x; t itself where it is that already."""
    if t.dtype == x.dtype and t.stride() == x.stride():  # nearly always
        return t
    return t.to(x.dtype).contiguous(memory_format=memory_format(x))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    recomputable: bool = False,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` and, in the same pass, ``+ residual`` and ReLU.

    Differentiable twice in reverse mode; a third derivative raises. Where the fused operation does not apply (no kernel
    for the device, transformations of ``torch.func``, forward mode) the plain formula runs, which has all orders.

    Args:
        input: (N, C, ...); float64, float32, bfloat16 or float16. Statistics and sums are kept in float32 (float64 for
            float64).
        running_mean, running_var: (C,), updated in place in train mode, or None.
        weight, bias: γ and β, (C,), or None.
        training: normalise by the batch's own statistics.
        momentum: the share of the batch in the running statistics.
        eps: ε, added to the variance.
        residual: of input's shape; added after β.
        relu: whether a ReLU comes last.
        recomputable: leave a recipe for the result, where no residual was added; it waits for permission, see
            ``recompute``.

    Returns:
        Of input's shape and dtype.

    Raises:
        As ``torch.nn.functional.batch_norm``. ValueError: the residual is not of input's shape, dtype and device.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function(tensors):  # function modes see one call, not each attribute that is looked at below
        given = [t for t in tensors if t is not None]
        plain = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        options: dict[str, Any] = {"residual": residual, "relu": relu, "recomputable": recomputable}
        fused: Tensor = handle_torch_function(batch_norm, given, *plain, **options)
        return fused
    if residual is not None and (
        residual.shape != input.shape or residual.dtype != input.dtype or residual.device != input.device
    ):
        raise ValueError(
            f"residual is {tuple(residual.shape)} of {residual.dtype} on {residual.device}; it must be as the input, "
            f"{tuple(input.shape)} of {input.dtype} on {input.device}"
        )
    backend = select_for_layer(input)
    if backend == "reference" or not _has_kernel(input, running_mean, running_var, weight, bias, training, eps):
        x = input.contiguous(memory_format=memory_format(input))
        y = reference.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        y = y if residual is None else y + residual
        return torch.relu(y) if relu else y
    x = input.contiguous(memory_format=memory_format(input))
    # Such a tensor is contiguous but for tricks; the kernels must be able to write the running statistics.
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    if residual is not None:
        residual = laid_out_like(take_alias(residual), x)
    y, y_alias, x_alias, mean, var = BatchNorm.apply(
        x, weight, bias, residual, running_mean, running_var, training, momentum, eps, relu, backend
    )
    if y.requires_grad and residual is not None and relu:
        offer_alias(y, y_alias)
    if y.requires_grad and residual is None and recomputable:

        def again(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
            return _inference(x, mean, var, weight, bias, None, eps, relu, backend)

        attach(y, again, x_alias, mean, var, weight, bias, like=0, permitted=False)
    return y


def _has_kernel(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> bool:
    """Whether the arguments are such as the kernels take; PyTorch's function sees to the errors of all others."""
    if not (input.dim() >= 2 and input.numel() > 0 and input.is_floating_point() and input.dim() <= 5):
        return False
    channels = (input.shape[1],)
    given = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if not all(t.is_floating_point() and t.shape == channels and t.device == input.device for t in given):
        return False
    if (running_mean is None) != (running_var is None):
        return False
    statistics = [t for t in (running_mean, running_var) if t is not None]
    if not all(t.is_contiguous() and not t.requires_grad for t in statistics):
        return False
    return (input.numel() > channels[0] and eps > 0) if training else (running_mean is not None and eps >= 0)
