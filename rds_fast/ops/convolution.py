"""Convolution whose double backward costs what a backward costs.

A convolution y = w∗x is bilinear. With g the cotangent of y:

    backward           gx = wᵀ∗g,   gw = W(x, g)    (W: the weight-gradient routine)
    double backward    for v, the cotangent of gx:   dg = w∗v,   dw = W(v, g)
                       for V, the cotangent of gw:   dg += V∗x,  dx = Vᵀ∗g

PyTorch's own formula computes dw as a convolution of v with g, whose kernel is then the whole feature map; the weight
gradient's routine does the same sums as every training step does. And while only gx is asked for, as in a penalty's
inner pass, gw is not computed here, which saves a third of that pass.

Every derivative is again one of these two Functions, so there are derivatives of all orders.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import runs_plainly
from .engine import is_wanted, queryable
from .function import Function
from .logsumexp import autocast_enabled
from .registration import derivative


class Geometry(NamedTuple):
    """The arguments of ``aten::convolution`` after the bias, one number for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def shape(self, x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of y, from those of x and of the weight."""
        return _shape(self, x, weight)

    def channels(self, weight: Sequence[int]) -> int:
        """The number of channels of y."""
        return weight[1] * self.groups if self.transposed else weight[0]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """w∗x + bias."""
        return torch.convolution(x, weight, bias, *self)

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], onto: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """gx, gw and the bias's gradient, each None where it is not wanted; ``onto`` is added to gx.

        Without gw only the shape of x matters, and without gx that of the weight.
        """
        gx = gw = gbias = None
        if wanted[0] and onto is not None and self._is_matrix_product(g, weight, onto):
            gx, onto = _matrix_product(g, weight, onto), None
            wanted = False, wanted[1], wanted[2]
        elif wanted == (True, False, False) and not self.transposed:
            # as a transposed convolution, for which x need not be there
            gx = torch.convolution(g, weight, None, *_transposed(self, g.shape, x.shape, weight.shape))
        if wanted[1] or wanted[2] or (wanted[0] and gx is None):
            channels = [g.shape[1]] if wanted[2] else None
            found = torch.ops.aten.convolution_backward.default(g, x, weight, channels, *self, wanted)
            gx = found[0] if wanted[0] else gx
            gw = found[1] if wanted[1] else None
            gbias = found[2] if wanted[2] else None
        return gx if gx is None or onto is None else gx.add_(onto), gw, gbias

    def _is_matrix_product(self, g: Tensor, weight: Tensor, onto: Tensor) -> bool:
        """Whether one matrix product does the convolution's backward and the addition, in one pass."""
        return (
            not self.transposed
            and self.groups == 1
            and set(weight.shape[2:]) == {1}
            and set(self.stride) == {1}
            and set(self.padding) == {0}
            and g.dtype == weight.dtype == onto.dtype
            and ((g.is_contiguous() and onto.is_contiguous()) or (_is_channels_last(g) and _is_channels_last(onto)))
        )


@functools.lru_cache(maxsize=4096)
def _shape(geometry: Geometry, x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...]:
    spatial = []
    for d, size in enumerate(x[2:]):
        reach = geometry.dilation[d] * (weight[d + 2] - 1)
        stride, padding, more = geometry.stride[d], geometry.padding[d], geometry.output_padding[d]
        if geometry.transposed:
            spatial.append((size - 1) * stride - 2 * padding + reach + more + 1)
        else:
            spatial.append((size + 2 * padding - reach - 1) // stride + 1)
    return x[0], geometry.channels(weight), *spatial


@functools.lru_cache(maxsize=4096)
def _transposed(geometry: Geometry, g: tuple[int, ...], x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[Any, ...]:
    """The transposed convolution that takes g to gx, from the shapes."""
    sizes = zip(x[2:], g[2:], weight[2:], geometry.stride, geometry.padding, geometry.dilation, strict=True)
    missing = [of_x - ((of_g - 1) * s - 2 * p + d * (size - 1) + 1) for of_x, of_g, size, s, p, d in sizes]
    return geometry._replace(transposed=True, output_padding=tuple(missing))


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _matrix_product(g: Tensor, weight: Tensor, onto: Tensor) -> Tensor:
    """``onto`` plus wᵀ∗g for a convolution of single values: the rows are those of memory."""
    weight = weight.flatten(1)
    if g.is_contiguous():
        rows = torch.baddbmm(onto.flatten(2), weight.t().expand(g.shape[0], -1, -1), g.flatten(2))
        return rows.view(onto.shape)
    of_g, of_onto = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (g, onto))
    N, C, H, W = onto.shape
    return torch.addmm(of_onto, of_g, weight).view(N, H, W, C).permute(0, 3, 1, 2)


class Convolution(Function):
    """x (N, C, ...), weight, bias or None to y. Leaves among them must have passed ``queryable``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        return geometry.forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.geometry = inputs
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None, None, None
        wanted = is_wanted(ctx, 0), is_wanted(ctx, 1), ctx.has_bias and is_wanted(ctx, 2)
        return *derivative(ConvolutionBackward, g, *ctx.saved_tensors, ctx.geometry, wanted), None


class ConvolutionBackward(Function):
    """gx, gw and the bias's gradient, each None where it is not wanted. Without gw, only the shape of x matters."""

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        return geometry.backward(g, x, weight, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        g, x, weight, ctx.geometry, ctx.wanted = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x if ctx.wanted[1] else None, weight)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, weight_v: Tensor | None, bias_v: Tensor | None) -> Any:
        g, x, weight = ctx.saved_tensors
        dg = dx = dw = None
        if is_wanted(ctx, 0):
            dg = _sum_of_convolutions([(v, weight), (x, weight_v)], bias_v, g, ctx.geometry)
        if weight_v is not None and is_wanted(ctx, 1):
            dx = derivative(ConvolutionBackward, g, x, weight_v, ctx.geometry, (True, False, False))[0]
        if v is not None and is_wanted(ctx, 2):
            dw = derivative(ConvolutionBackward, g, v, weight, ctx.geometry, (False, True, False))[1]
        return dg, dx, dw, None, None


def _sum_of_convolutions(
    pairs: list[tuple[Tensor | None, Tensor | None]], bias: Tensor | None, like: Tensor, geometry: Geometry
) -> Tensor | None:
    """Σ weight∗data over the pairs in which both are given, plus a bias a channel; of the shape of ``like``."""
    total = None
    for data, weight in pairs:
        if data is not None and weight is not None:
            term = derivative(Convolution, data, weight, None, geometry)
            total = term if total is None else total + term
    if bias is None:
        return total
    bias = bias.reshape(-1, *[1] * (like.dim() - 2))
    return bias.expand_as(like) if total is None else total + bias


def convolution(
    plain: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """``plain(input, weight, ...)`` with the cheap double backward; plain: ``torch.conv1d``, ``conv2d`` or ``conv3d``.

    Its contract is theirs, errors included.
    """
    if not _can_run(plain, input, weight, bias):
        return plain(input, weight, bias, stride, padding, dilation, groups)
    rank = weight.dim() - 2
    strides, dilations = _for_each(rank, stride), _for_each(rank, dilation)
    if isinstance(padding, str):
        input, paddings = _with_string_padding(plain, input, weight, padding, strides, dilations)
    else:
        paddings = _for_each(rank, padding)
    geometry = Geometry(strides, paddings, dilations, False, (0,) * rank, groups)
    return _apply(input, weight, bias, geometry)


def transposed_convolution(
    plain: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> Tensor:
    """As ``convolution``, for ``torch.conv_transpose1d``, ``conv_transpose2d`` or ``conv_transpose3d``."""
    if not _can_run(plain, input, weight, bias):
        return plain(input, weight, bias, stride, padding, output_padding, groups, dilation)
    rank = weight.dim() - 2
    numbers = (_for_each(rank, given) for given in (stride, padding, dilation, output_padding))
    strides, paddings, dilations, output_paddings = numbers
    return _apply(input, weight, bias, Geometry(strides, paddings, dilations, True, output_paddings, groups))


_RANKS: dict[Any, int] = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 2,
    torch.conv_transpose3d: 3,
}


def _can_run(plain: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there is a gradient to speed up, and nothing that PyTorch's function would refuse or treat specially."""
    requires_grad = False
    for tensor in (input, weight, bias):  # a loop, since all() and any() of generators call back for each element
        if tensor is None:
            continue
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            return False
        requires_grad = requires_grad or tensor.requires_grad
    rank = _RANKS[plain]
    return (
        requires_grad
        and torch.is_grad_enabled()
        and weight.dim() == rank + 2
        and input.dim() in (rank + 1, rank + 2)
        and not runs_plainly(input)
    )


def _for_each(rank: int, value: int | tuple[int, ...]) -> tuple[int, ...]:
    """One number for each spatial dimension. They may be NumPy's, as PyTorch's own functions allow."""
    single = not isinstance(value, tuple) and isinstance(value, Integral)  # a tuple is recognised sooner
    values = (value,) if single else value
    numbers = tuple(map(operator.index, values))  # type: ignore[arg-type]  # Integral includes int
    return numbers * rank if len(numbers) == 1 else numbers


def _with_string_padding(
    plain: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    padding: str,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the numbers that "valid" and "same" stand for.

    Where "same" needs an odd number of zeros, the one too many is put after the input, as PyTorch does.
    """
    rank = weight.dim() - 2
    if padding == "valid":
        return input, (0,) * rank
    if padding != "same" or any(s != 1 for s in stride):
        plain(input, weight, None, stride, padding, dilation)  # raises
    totals = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        after = [n for total in reversed(totals) for n in (0, total % 2)]
        input = torch.nn.functional.pad(input, after)
    return input, tuple(total // 2 for total in totals)


def _apply(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    if autocast_enabled(input.device):  # here, so that what is saved is what was convolved
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = _cast(input, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    input, weight, bias = queryable(input), queryable(weight), queryable(bias)
    if input.dim() == weight.dim():
        return Convolution.apply(input, weight, bias, geometry)
    return Convolution.apply(input.unsqueeze(0), weight, bias, geometry).squeeze(0)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an argument: it leaves float64 alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


# PyTorch's functions, and those here that take their place, which get them as first argument.
REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    plain: transposed_convolution if "transpose" in plain.__name__ else convolution for plain in _RANKS
}
