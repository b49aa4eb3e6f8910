"""Pooling with a double backward that moves no more than it must.

A pooling is linear in its input once the places of the maxima are fixed, so its double backward is the pooling itself
applied to v, the cotangent of gx: averages of v, or v at the places of the maxima. PyTorch's formula adds a tensor of
zeros of the input's size, the "gradient" of the backward with respect to the input, and a pass that sums it up. The
backward reads no value of the input, so nothing is kept of that.

Derivatives of all orders exist.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import runs_plainly
from .function import Function
from .registration import derivative

Size = int | tuple[int, ...] | list[int]

aten = torch.ops.aten


class Layout(NamedTuple):
    """All that the backward of a pooling reads of its input."""

    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        return cls(x.shape, x.stride())

    def empty(self, g: Tensor) -> Tensor:
        """A tensor of this layout, and any values, of the dtype and on the device of the cotangent."""
        return g.new_empty_strided(self.shape, self.strides)


class AveragePool(Function):
    """``operations`` are aten's pooling and its backward, which takes x for its shape alone."""

    @staticmethod
    def forward(x: Tensor, operations: tuple[Any, Any], arguments: tuple[Any, ...]) -> Tensor:
        return operations[0](x, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.operations, ctx.arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.layout = Layout.of(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None, None
        return derivative(AveragePoolBackward, g, ctx.layout, ctx.operations, ctx.arguments), None, None


class AveragePoolBackward(Function):
    """gx, which does not depend on the values of x."""

    @staticmethod
    def forward(g: Tensor, layout: Layout, operations: tuple[Any, Any], arguments: tuple[Any, ...]) -> Tensor:
        x = layout.empty(g)
        # the adaptive pools' backward needs no sizes besides those of its tensors
        return operations[1](g, x) if len(arguments) == 1 else operations[1](g, x, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operations, ctx.arguments = inputs[2:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        dg = None if v is None else derivative(AveragePool, v, ctx.operations, ctx.arguments)
        return dg, None, None, None


class MaxPool(Function):
    """x to its maxima and their places, counted within the spatial dimensions, of which there are ``rank``."""

    @staticmethod
    def forward(x: Tensor, operations: tuple[Any, Any], arguments: tuple[Any, ...], rank: int) -> tuple[Tensor, Tensor]:
        return operations[0](x, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.layout = Layout.of(x)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> Any:
        gx = None if g is None else derivative(MaxPoolBackward, g, ctx.layout, *ctx.saved_tensors, *ctx.options)
        return gx, None, None, None


class MaxPoolBackward(Function):
    """gx, which depends on x through the places of the maxima alone."""

    @staticmethod
    def forward(
        g: Tensor, layout: Layout, places: Tensor, operations: tuple[Any, Any], arguments: tuple[Any, ...], rank: int
    ) -> Tensor:
        x = layout.empty(g)
        # the adaptive pools' backward needs no sizes besides those of its tensors
        return operations[1](g, x, *(() if len(arguments) == 1 else arguments), places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rank = inputs[5]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return (None,) * 6
        (places,) = ctx.saved_tensors
        spatial = places.shape[-ctx.rank :]
        # with the spatial dimensions in the order of memory a result of gather is in that order, too
        channels_last = places.stride(-ctx.rank - 1) == 1 and not places.is_contiguous()
        v, places = _in_one_dimension(v, ctx.rank), _in_one_dimension(places, ctx.rank)
        if not channels_last:
            at_maxima = v.gather(-1, places)
            return at_maxima.reshape(*at_maxima.shape[:-1], *spatial), *(None,) * 5
        at_maxima = v.transpose(-1, -2).gather(-2, places.transpose(-1, -2))
        # before they are put back: a view of a batch of one would else get a stride that no channels-last tensor has
        at_maxima = at_maxima.reshape(*at_maxima.shape[:-2], *spatial, at_maxima.shape[-1])
        return at_maxima.movedim(-1, -ctx.rank - 1), *(None,) * 5


def _in_one_dimension(x: Tensor, rank: int) -> Tensor:
    """The spatial dimensions as one. Not by ``flatten``, for which ``is_grads_batched`` has no batching rule."""
    return x.reshape(*x.shape[:-rank], x.shape[-rank:].numel())


_AVERAGE_POOLS: dict[Any, Any] = {
    torch._C._nn.avg_pool2d: (aten.avg_pool2d.default, aten.avg_pool2d_backward.default),
    torch._C._nn.avg_pool3d: (aten.avg_pool3d.default, aten.avg_pool3d_backward.default),
    torch._C._nn.adaptive_avg_pool2d: (aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d_backward.default),
    torch._C._nn.adaptive_avg_pool3d: (aten._adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d_backward.default),
}

_max_pool2d = aten.max_pool2d_with_indices.default, aten.max_pool2d_with_indices_backward.default
_max_pool3d = aten.max_pool3d_with_indices.default, aten.max_pool3d_with_indices_backward.default

# aten's operations, and the number of spatial dimensions.
_MAX_POOLS: dict[Any, Any] = {
    torch.max_pool2d: (_max_pool2d, 2),
    torch._C._nn.max_pool2d_with_indices: (_max_pool2d, 2),
    torch.max_pool3d: (_max_pool3d, 3),
    torch._C._nn.max_pool3d_with_indices: (_max_pool3d, 3),
    torch._C._nn.adaptive_max_pool2d: (
        (aten.adaptive_max_pool2d.default, aten.adaptive_max_pool2d_backward.default),
        2,
    ),
    torch._C._nn.adaptive_max_pool3d: (
        (aten.adaptive_max_pool3d.default, aten.adaptive_max_pool3d_backward.default),
        3,
    ),
}


def _can_run(input: Tensor) -> bool:
    return torch.is_grad_enabled() and input.requires_grad and not runs_plainly(input)


def _plain(size: Size) -> int | tuple[int, ...]:
    """Python's numbers in the place of NumPy's, which PyTorch's functions allow and its raw operations do not."""
    return operator.index(size) if isinstance(size, Integral) else tuple(map(operator.index, size))  # type: ignore[arg-type]


def _sizes(output_size: Size, rank: int) -> tuple[int, ...]:
    sizes = _plain(output_size)
    return (sizes,) * rank if isinstance(sizes, int) else sizes


def average_pool(
    plain: Callable[..., Tensor],
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``plain(input, ...)``, which is ``torch.nn.functional.avg_pool2d`` or ``avg_pool3d``."""
    windows = (_plain(kernel_size), () if stride is None else _plain(stride), _plain(padding))
    arguments = (*windows, ceil_mode, count_include_pad, divisor_override)
    if not _can_run(input):
        return plain(input, *arguments)
    return AveragePool.apply(input, _AVERAGE_POOLS[plain], arguments)


def adaptive_average_pool(plain: Callable[..., Tensor], input: Tensor, output_size: Size) -> Tensor:
    """``plain(input, output_size)``, which is the builtin under ``adaptive_avg_pool2d`` or ``adaptive_avg_pool3d``."""
    sizes = _sizes(output_size, 3 if plain is torch._C._nn.adaptive_avg_pool3d else 2)
    if set(sizes) == {1} or not _can_run(input):  # a mean, which PyTorch differentiates without a pass over zeros
        return plain(input, output_size)
    return AveragePool.apply(input, _AVERAGE_POOLS[plain], (sizes,))


def max_pool(
    plain: Callable[..., Any],
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> Any:
    """``plain(input, ...)``: ``torch.max_pool2d``, ``max_pool3d``, or the builtins that return the places as well."""
    windows = (_plain(kernel_size), () if stride is None else _plain(stride), _plain(padding), _plain(dilation))
    arguments = (*windows, ceil_mode)
    if not _can_run(input):
        return plain(input, *arguments)
    results = MaxPool.apply(input, _MAX_POOLS[plain][0], arguments, _MAX_POOLS[plain][1])
    return results[0] if plain in (torch.max_pool2d, torch.max_pool3d) else results


def adaptive_max_pool(plain: Callable[..., Any], input: Tensor, output_size: Size) -> Any:
    """``plain(input, output_size)``: the builtin under ``adaptive_max_pool2d`` or ``adaptive_max_pool3d``."""
    if not _can_run(input):
        return plain(input, output_size)
    operations, rank = _MAX_POOLS[plain]
    return MaxPool.apply(input, operations, (_sizes(output_size, rank),), rank)


# PyTorch's functions, and those here that take their place, which get them as first argument.
REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    **{p: adaptive_average_pool if "adaptive" in p.__name__ else average_pool for p in _AVERAGE_POOLS},
    **{p: adaptive_max_pool if "adaptive" in p.__name__ else max_pool for p in _MAX_POOLS},
}
