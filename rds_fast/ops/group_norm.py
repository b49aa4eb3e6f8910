"""Layer, group and instance norm, differentiable twice.

All three normalise rows of K values. For each row, with mean μ and variance σ² over it, r = (σ² + ε)^−½,
x̂ = (x − μ) r, w and b the weight and the bias of each value's channel, u the cotangent of the result y, u_w = w u, and
P(t) = t − mean(t) − x̂ mean(t x̂):

    forward            y = w x̂ + b
    backward           gx = r P(u_w),   gw = Σ u x̂,   gb = Σ u over each channel

and, with v, a and h the cotangents of gx, gw and gb, and the means over the row

    cᵤ = mean(u_w x̂),   cᵥ = mean(v x̂),   cᵤᵥ = mean(u_w v) − mean(u_w) mean(v) − cᵤ cᵥ:

    double backward    du = w r P(v) + a x̂ + h,
                       dw = Σ u r P(v) over each channel,
                       dx = −r² (cᵤᵥ x̂ + cᵥ P(u_w) + cᵤ P(v)) + r P(a u)

The raw operations work on (N, C, S) tensors whose rows are the C/G channels of each of G groups: a layer norm is
S = G = 1, an instance norm G = C.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import reference
from ..backends import select_for_layer
from ..reference import accumulation_dtype
from .batch_norm import memory_format
from .engine import is_wanted
from .function import Function
from .inputs import DTYPES
from .logsumexp import autocast_enabled
from .registration import derivative, register, third_derivative


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0] * groups, dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


def _backward_fake(
    u: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_cotangent: Tensor | None,
    groups: int,
    affine_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gweight = mean.new_empty(x.shape[1] if affine_gradient else 0)
    return x.new_empty(x.shape), gweight, torch.empty_like(gweight)


def _double_backward_fake(
    v: Tensor | None,
    vweight: Tensor | None,
    vbias: Tensor | None,
    u: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    weight_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), mean.new_empty(x.shape[1] if weight_gradient else 0)


# x, and u, v and x_cotangent of its shape and dtype: (N, C, S), contiguous. weight, bias and their cotangents: (C,),
# contiguous, of the accumulation dtype. mean, rstd: (N·G,), of the accumulation dtype. Results: y as x, mean, rstd.
_forward = register(
    "group_norm",
    "group_norm(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward_fake,
    row_wise=False,
)

# x_cotangent is added to gx. Results: gx as x, gweight and gbias (C,), or (0,) without affine_gradient.
_backward = register(
    "group_norm",
    "group_norm_backward(Tensor u, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor? x_cotangent, "
    "int groups, bool affine_gradient, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    row_wise=False,
)

# v, vweight, vbias: the cotangents of gx, gweight and gbias; an absent one is zero. Results: du and dx as x, dweight
# (C,), or (0,) without weight_gradient.
_double_backward = register(
    "group_norm",
    "group_norm_double_backward(Tensor? v, Tensor? vweight, Tensor? vbias, Tensor u, Tensor x, Tensor? weight, "
    "Tensor mean, Tensor rstd, int groups, bool weight_gradient, str backend) -> (Tensor, Tensor, Tensor)",
    _double_backward_fake,
    row_wise=False,
)


class GroupNorm(Function):
    """x to y, and to x itself, mean and rstd.

    The backward reads x as this node's second result, so that the double backward's dx comes back to this node, and the
    backward's kernel adds it to gx.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, backend: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, mean, rstd = _forward(x, weight, bias, groups, eps, backend)
        return y, x.detach(), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, weight, _, ctx.groups, _, ctx.backend = inputs
        _, x, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, x_cotangent: Tensor | None, *_: Any) -> Any:
        if u is None:
            return x_cotangent, None, None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        wants_weight = weight is not None and is_wanted(ctx, 1)
        # The engine counts tensors alone: without a weight the bias is not the argument that is asked about.
        wants_bias = ctx.needs_input_grad[2] and (weight is None or is_wanted(ctx, 2))
        affine = wants_weight or wants_bias
        gx, gweight, gbias = derivative(
            GroupNormBackward, u, x, weight, mean, rstd, x_cotangent, ctx.groups, affine, ctx.backend
        )
        return gx, gweight if wants_weight else None, gbias if wants_bias else None, None, None, None


class GroupNormBackward(Function):
    """gx = r P(u_w) + x_cotangent, gw = Σ u x̂, gb = Σ u. The double backward's dx is the total derivative."""

    @staticmethod
    def forward(u: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, mean, rstd, x_cotangent, groups, affine, backend = arguments
        if x_cotangent is not None:
            x_cotangent = x_cotangent.contiguous()
        return _backward(u.contiguous(), x, weight, mean, rstd, x_cotangent, groups, affine, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        u, x, weight, mean, rstd, _, ctx.groups, _, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, vweight: Tensor | None, vbias: Tensor | None) -> Any:
        if v is None and vweight is None and vbias is None:
            return (None,) * 9
        u, x, weight, mean, rstd = ctx.saved_tensors
        wants_weight = v is not None and weight is not None and is_wanted(ctx, 2)
        du, dx, dweight = derivative(
            GroupNormDoubleBackward,
            *(v, vweight, vbias, u, x, weight, mean, rstd, ctx.groups, wants_weight, ctx.backend),
        )
        x_gradient = v if ctx.needs_input_grad[5] else None
        return du, dx, dweight if wants_weight else None, None, None, x_gradient, None, None, None


class GroupNormDoubleBackward(Function):
    """du, dx and dw as above: the last derivative."""

    @staticmethod
    def forward(v: Tensor | None, vweight: Tensor | None, vbias: Tensor | None, u: Tensor, *arguments: Any) -> Any:
        v, vweight, vbias = (None if t is None else t.contiguous() for t in (v, vweight, vbias))
        return _double_backward(v, vweight, vbias, u.contiguous(), *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise third_derivative("a layer, group or instance norm")


def layer_norm(
    input: Tensor,
    normalized_shape: list[int] | tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalisation over the last dimensions (Ba, Kiros & Hinton 2016).

    The contract is ``torch.nn.functional.layer_norm``'s, errors and autocast included. Differentiable twice in reverse
    mode (a third derivative raises); where no kernel runs, the plain formula does, which has all orders.

    Args:
        input: (..., *normalized_shape); float64, float32, bfloat16 or float16. Copied if it is not contiguous.
        normalized_shape: the sizes of the last dimensions, those to normalise over.
        weight: of shape ``normalized_shape``; default 1.
        bias: of shape ``normalized_shape``; default 0.
        eps: ε > 0, added to the variance.

    Returns:
        (input − mean) / sqrt(variance + ε) · weight + bias, as ``input``; float32 for a 16-bit input under CUDA's
        autocast. Sums are kept in float32 (float64 for float64).
    """
    input, weight, bias = _under_autocast("layer_norm", input, weight, bias)
    shape = tuple(normalized_shape) if isinstance(normalized_shape, tuple | list) else ()
    if not (shape and isinstance(input, Tensor) and input.shape[-len(shape) :] == shape) or not _is_covered(
        input, shape, weight, bias
    ):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    backend = select_for_layer(input)
    if backend == "reference":
        return reference.layer_norm(input.contiguous(), shape, weight, bias, eps)
    rows = input.contiguous().view(-1, math.prod(shape), 1)
    return _normalise(rows, weight, bias, 1, eps, backend)[0].view(input.shape)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalisation over groups of channels of each sample (Wu & He 2018).

    The contract is ``torch.nn.functional.group_norm``'s, errors and autocast included. Differentiable twice in reverse
    mode (a third derivative raises); where no kernel runs, the plain formula does, which has all orders.

    Args:
        input: (N, C, ...); float64, float32, bfloat16 or float16. Copied if it is not contiguous.
        num_groups: G, a divisor of C.
        weight: (C,); default 1.
        bias: (C,); default 0.
        eps: ε > 0, added to the variance.

    Returns:
        (input − mean) / sqrt(variance + ε) · weight + bias, with mean and variance over each group of C/G channels of
        a sample; as ``input``, in its memory format; float32 for a 16-bit input under CUDA's autocast.
    """
    input, weight, bias = _under_autocast("group_norm", input, weight, bias)
    covered = isinstance(input, Tensor) and input.dim() >= 2 and isinstance(num_groups, int) and num_groups > 0
    if covered:
        N, C, *spatial = input.shape
        # PyTorch refuses to normalise a single value a channel, by its own count of them.
        covered = C % num_groups == 0 and (N * C // num_groups) * math.prod(spatial) != 1
    if not (covered and _is_covered(input, (C,), weight, bias)):
        return functional.group_norm(input, num_groups, weight, bias, eps)
    backend = select_for_layer(input)
    if backend == "reference":
        x = input.contiguous(memory_format=memory_format(input))
        return reference.group_norm(x, num_groups, weight, bias, eps)
    y = _normalise(_channels(input), weight, bias, num_groups, eps, backend)[0]
    return y.view(input.shape).contiguous(memory_format=memory_format(input))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalisation of each channel of each sample (Ulyanov, Vedaldi & Lempitsky 2016).

    The contract is ``torch.nn.functional.instance_norm``'s, errors included. Differentiable twice in reverse mode (a
    third derivative raises); where no kernel runs, the plain formula does, which has all orders.

    Args:
        input: (N, C, ...); float64, float32, bfloat16 or float16. Copied if it is not contiguous.
        running_mean: (C,), updated in place by the mean over the batch of the samples' means.
        running_var: (C,), updated in place by the mean over the batch of the samples' unbiased variances.
        weight: (C,); default 1.
        bias: (C,); default 0.
        use_input_stats: normalise by the statistics of ``input``, else by the running ones.
        momentum: what the new statistics weigh in the update of the running ones.
        eps: ε > 0, added to the variance.

    Returns:
        (input − mean) / sqrt(variance + ε) · weight + bias, contiguous, in the dtype of ``input``.
    """
    arguments = (running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    # A single value a channel is an error, and one running statistic without the other too.
    if not (
        use_input_stats
        and (running_mean is None) == (running_var is None)
        and isinstance(input, Tensor)
        and input.dim() >= 3
        and math.prod(input.shape[2:]) != 1
        and _is_covered(input, input.shape[1:2], weight, bias, running_mean, running_var)
    ):
        return functional.instance_norm(input, *arguments)
    backend = select_for_layer(input)
    if backend == "reference":
        return reference.instance_norm(input.contiguous(), *arguments)
    C = input.shape[1]
    x = _channels(input)
    y, mean, rstd = _normalise(x, weight, bias, C, eps, backend)
    if running_mean is not None and running_var is not None:
        variance = (rstd.double().pow(-2) - eps).clamp(min=0) * (x.shape[2] / (x.shape[2] - 1))
        for running, statistic in ((running_mean, mean.double()), (running_var, variance)):
            batch_mean = statistic.view(-1, C).mean(0)
            running.detach().copy_(running.detach().double() * (1 - momentum) + batch_mean * momentum)
    return y.view(input.shape)


def _is_covered(input: Tensor, shape: tuple[int, ...], *parameters: Tensor | None) -> bool:
    """Whether the kernels and the plain formula cover these arguments; else PyTorch's own checks are to speak."""
    given = [parameter for parameter in parameters if parameter is not None]
    dtype = input.dtype
    return (
        dtype in DTYPES
        and input.layout == torch.strided
        and input.numel() > 0
        and all(isinstance(p, Tensor) and p.shape == shape and p.device == input.device for p in given)
        # Float32 parameters beside a 16-bit input: as PyTorch, on CPU alone.
        and (
            all(p.dtype == dtype for p in given)
            or (input.device.type == "cpu" and all(p.dtype == accumulation_dtype(dtype) for p in given))
        )
    )


@functools.cache
def _autocasts_to_float32(operation: str, device_type: str) -> bool:
    """Whether autocast runs an operation in float32 on a device, by PyTorch's own table."""
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operation}", key)


def _under_autocast(operation: str, input: Any, *parameters: Any) -> tuple[Any, ...]:
    """The arguments as autocast would give them to PyTorch's operation."""
    tensors = (input, *parameters)
    if not isinstance(input, Tensor) or not autocast_enabled(input.device):
        return tensors
    if not _autocasts_to_float32(operation, input.device.type):
        return tensors
    half = (torch.bfloat16, torch.float16)
    return tuple(t.float() if isinstance(t, Tensor) and t.dtype in half else t for t in tensors)


def _channels(input: Tensor) -> Tensor:
    """(N, C, ...) as a contiguous (N, C, S)."""
    return input.contiguous().view(input.shape[0], input.shape[1], -1)


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd of a contiguous (N, C, S)."""
    accumulated = accumulation_dtype(x.dtype)
    # The view is never a leaf of the graph, of which the engine cannot say whether it is wanted.
    weight, bias = (None if p is None else p.to(accumulated).contiguous().view(-1) for p in (weight, bias))
    y, _, mean, rstd = GroupNorm.apply(x, weight, bias, groups, eps, backend)
    return y, mean, rstd
