"""Piecewise linear activations, differentiable to any order.

With f'(x) a mask times a constant, g the cotangent of y = f(x) and v the cotangent of the backward's result:

    backward           gx = g f'(x)
    double backward    dg = v f'(x),   dx = 0

Each is one of PyTorch's own operations, which pass over each tensor once. PyTorch's derivation writes the zeros of dx
into memory and adds them to the gradient of x, and ends at hardsigmoid's backward. Here dx does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..backends import in_transformation, runs_plainly
from .function import Function
from .inputs import DTYPES
from .registration import derivative

_aten = torch.ops.aten

# (g, kept) to g f'; kept is the result or the input.
Slope = Callable[[Tensor, Tensor], Tensor]


def records_gradient(input: Tensor) -> bool:
    """Whether ``input`` may need a derivative of ours: of a dtype that we serve, where any is recorded or taken.

    In forward mode and inside a transformation of ``torch.func`` a tensor does not tell.
    """
    if not (isinstance(input, Tensor) and input.dtype in DTYPES):
        return False
    if forward_ad._current_level >= 0 or in_transformation():
        return True
    return input.requires_grad and torch.is_grad_enabled()


def can_overwrite(input: Tensor) -> bool:
    """Whether an autograd Function may work in place on ``input``, which needs a derivative.

    Not on a leaf: PyTorch's own function raises its error before it writes. Not on a view, whose base must learn of it.
    """
    return not input.is_leaf and not input._is_view()


class PiecewiseLinear(Function):
    """y = f(x). The pieces are told apart by what PyTorch's own function keeps: x or, in place and for ReLU, y."""

    # The older form without setup_context: PyTorch's own functions run inside torch.func, and a copy of x is neither an
    # input nor an output.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], slope: Slope, inplace: bool, keeps_input: bool
    ) -> Tensor:
        kept = x.clone() if inplace and keeps_input else x
        y = function(x)
        if inplace:
            ctx.mark_dirty(x)
        ctx.slope = slope
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept if keeps_input else y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None, None, None, None
        (kept,) = ctx.saved_tensors
        return derivative(PiecewiseLinearBackward, g, kept.detach(), ctx.slope), None, None, None, None


class PiecewiseLinearBackward(Function):
    """gx = g f'. Linear in g, so it is its own derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, kept: Tensor, slope: Slope) -> Tensor:
        return slope(g, kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, kept, ctx.slope = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return None, None, None
        return derivative(PiecewiseLinearBackward, v, *ctx.saved_tensors, ctx.slope), None, None


def _runs_plainly(input: Tensor, inplace: bool) -> bool:
    """Whether PyTorch's own function runs."""
    if not records_gradient(input) or (inplace and not can_overwrite(input)):
        return True
    return runs_plainly(input)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``max(input, 0)``, as ``torch.nn.functional.relu``."""
    if _runs_plainly(input, inplace):
        return F.relu(input, inplace)
    function = _aten.relu_.default if inplace else _aten.relu.default
    return PiecewiseLinear.apply(input, function, _relu_slope, inplace, False)


def _relu_slope(g: Tensor, y: Tensor) -> Tensor:
    return _aten.threshold_backward.default(g, y, 0)


class Rectified(NamedTuple):
    """A ReLU without a norm, as what follows a product in a chain; see ``chain`` for its methods.

    What is kept is its result, which takes the place of the product's.
    """

    @property
    def reads_result_with_residual(self) -> bool:
        return False

    def forward(self, y: Tensor, weight: Any, bias: Any, residual: Any, running: Any) -> tuple[Any, ...]:
        z = torch.relu_(y)
        return z, z.detach(), None, None

    def again(self, y: Tensor, weight: Any, bias: Any, mean: Any, var: Any) -> Tensor:
        return y

    def backward(
        self, u: Tensor, y: Tensor, z: Any, weight: Any, bias: Any, mean: Any, var: Any, dy: Tensor | None
    ) -> tuple[Any, ...]:
        g = _relu_slope(u, y)
        return g if dy is None else g + dy, None, None, g

    def double_backward(
        self,
        cotangents: Sequence[Tensor | None],
        u: Tensor,
        y: Tensor,
        z: Any,
        weight: Any,
        bias: Any,
        mean: Any,
        var: Any,
        wants_g: bool,
    ) -> tuple[Any, ...]:
        v = cotangents[0]
        assert v is not None  # there is no other
        return _relu_slope(v, y), None, None, u


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``input`` where positive, ``negative_slope`` times it else, as ``torch.nn.functional.leaky_relu``.

    In place it is differentiable for ``negative_slope >= 0`` only, as PyTorch's.
    """
    signs_stay = negative_slope >= 0
    if _runs_plainly(input, inplace) or (inplace and not signs_stay):
        return F.leaky_relu(input, negative_slope, inplace)
    negative_slope = float(negative_slope)  # NumPy's, perhaps
    function = _aten.leaky_relu_.default if inplace else _aten.leaky_relu.default

    def slope(g: Tensor, kept: Tensor) -> Tensor:
        return _aten.leaky_relu_backward.default(g, kept, negative_slope, inplace)

    keeps_input = not inplace  # as PyTorch, so that what follows may overwrite the result
    return PiecewiseLinear.apply(input, lambda x: function(x, negative_slope), slope, inplace, keeps_input)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """``input`` clamped to ``[min_val, max_val]``, as ``torch.nn.functional.hardtanh``."""
    if _runs_plainly(input, inplace) or min_val > max_val:
        return F.hardtanh(input, min_val, max_val, inplace)
    min_val, max_val = float(min_val), float(max_val)
    function = _aten.hardtanh_.default if inplace else _aten.hardtanh.default

    def slope(g: Tensor, kept: Tensor) -> Tensor:
        return _aten.hardtanh_backward.default(g, kept, min_val, max_val)

    return PiecewiseLinear.apply(input, lambda x: function(x, min_val, max_val), slope, inplace, not inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """``input`` clamped to ``[0, 6]``, as ``torch.nn.functional.relu6``."""
    return hardtanh(input, 0.0, 6.0, inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``input/6 + 1/2`` clamped to ``[0, 1]``, as ``torch.nn.functional.hardsigmoid``, which has one derivative only.

    The result does not tell the pieces apart: just below 3 it is rounded to 1.
    """
    if not records_gradient(input):
        return F.hardsigmoid(input, inplace)
    if _runs_plainly(input, inplace):
        return reference.hardsigmoid(input, inplace)
    function = _aten.hardsigmoid_.default if inplace else _aten.hardsigmoid.default
    return PiecewiseLinear.apply(input, function, _hardsigmoid_slope, inplace, True)


def _hardsigmoid_slope(g: Tensor, x: Tensor) -> Tensor:
    if x.dtype == torch.float64:  # PyTorch's operation multiplies by 1/6 rounded to float32
        return _aten.hardtanh_backward.default(g, x, -3.0, 3.0) / 6.0
    return _aten.hardsigmoid_backward.default(g, x)
