"""Activations, element by element: the smooth ones, differentiable twice, and the names of the piecewise linear ones.

With g the cotangent of y = f(x) and v the cotangent of the backward's result:

    backward           gx = g f'(x)
    double backward    dg = v f'(x),   dx = v g f''(x)

each one pass over its tensors. The forward is PyTorch's own operation, which is one pass too. f' and f'' of each
function stand beside its code in csrc/cpu/activation.cpp.

Each function has PyTorch's signature, dtypes (a 16-bit result is rounded once) and memory formats. In place, PyTorch
keeps a copy of x, and so do we.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import select_for_layer
from .function import Function
from .logsumexp import full_precision
from .piecewise_linear import can_overwrite, hardsigmoid, hardtanh, leaky_relu, records_gradient, relu, relu6
from .registration import derivative, register, third_derivative

__all__ = [
    "celu",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "mish",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "tanh",
]

_aten = torch.ops.aten
_is_dense = _aten.is_non_overlapping_and_dense.default

# kind: the name of f in the kernels; a, b: its parameters. x: dense, of any strides; for sigmoid and tanh it is y.
# g, x_cotangent: of x's dtype and order in memory. Result: g f'(x) + x_cotangent, as x.
_backward = register(
    "activation",
    "activation_backward(Tensor g, Tensor x, Tensor? x_cotangent, str kind, float a, float b, str backend) -> Tensor",
    lambda g, x, x_cotangent, kind, a, b, backend: torch.empty_like(x),
)

# v, g: of x's dtype and order in memory. Results: v f'(x), v g f''(x), as x.
_double_backward = register(
    "activation",
    "activation_double_backward(Tensor v, Tensor g, Tensor x, str kind, float a, float b, str backend) "
    "-> (Tensor, Tensor)",
    lambda v, g, x, kind, a, b, backend: (torch.empty_like(x), torch.empty_like(x)),
)


class Kind(NamedTuple):
    """f as its derivatives' kernels are told of it."""

    name: str
    a: float = 0.0
    b: float = 0.0


# Their derivatives are polynomials of y, which a following layer keeps anyway.
_FROM_RESULT = ("sigmoid", "tanh")


def in_order_of(x: Tensor, t: Tensor) -> Tensor:
    """``t`` with its values in memory in the order of those of ``x``, which is dense; copied if they are not."""
    if t.stride() == x.stride():
        return t
    order = sorted(range(x.dim()), key=lambda d: x.stride(d), reverse=True)
    inverse = sorted(range(x.dim()), key=order.__getitem__)
    return t.permute(order).contiguous().permute(inverse)


class Activation(Function):
    """y = f(x), and an alias of what the derivatives are computed from: x, or y for sigmoid and tanh.

    The alias is this node's own output. So dx of the double backward comes to this node as the alias's cotangent,
    together with the cotangent of y, and one kernel adds it. The cotangent of the alias is by definition one of x, even
    where the alias is y. The public functions drop the alias.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], kind: Kind, backend: str, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        from_result = kind.name in _FROM_RESULT
        kept = x.clone() if inplace and not from_result else x.detach()
        y = function(x)
        if from_result:
            kept = y.detach()
        if inplace:
            ctx.mark_dirty(x)
        ctx.kind, ctx.backend = kind, backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept)
        return y, kept

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, x_cotangent: Tensor | None) -> Any:
        if g is None:
            return x_cotangent, None, None, None, None
        gx = derivative(ActivationBackward, g, *ctx.saved_tensors, x_cotangent, ctx.kind, ctx.backend)
        return gx, None, None, None, None


class ActivationBackward(Function):
    """gx = g f'(x) + x_cotangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, x_cotangent: Tensor | None, kind: Kind, backend: str) -> Tensor:
        if x_cotangent is not None:
            x_cotangent = in_order_of(x, x_cotangent)
        return _backward(in_order_of(x, g), x, x_cotangent, *kind, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, x, _, ctx.kind, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return None, None, None, None, None
        dg, dx = derivative(ActivationDoubleBackward, v, *ctx.saved_tensors, ctx.kind, ctx.backend)
        return dg, dx, v if ctx.needs_input_grad[2] else None, None, None


class ActivationDoubleBackward(Function):
    """dg = v f'(x), dx = v g f''(x): the last derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, g: Tensor, x: Tensor, kind: Kind, backend: str) -> tuple[Tensor, Tensor]:
        return _double_backward(in_order_of(x, v), in_order_of(x, g), x, *kind, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.activation = inputs[3].name

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise third_derivative(f"the activation {ctx.activation}")


def _activate(
    input: Tensor,
    kind: Kind,
    function: Callable[[Tensor], Tensor],
    inplace: bool = False,
    plain: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """f(input) with our derivatives, or with PyTorch's where they are as good or ours do not serve.

    ``function`` is PyTorch's operation, and ``plain`` the specification, if it is another; either overwrites its
    argument if ``inplace``.
    """
    if not records_gradient(input):
        return function(input)
    # 0-d tensors have no rows for the batching rule.
    backend = select_for_layer(input) if input.dim() and input.numel() else "reference"
    if backend == "reference" or (inplace and not can_overwrite(input)):
        return (plain or function)(input)
    if not _is_dense(input):
        if inplace:
            return function(input)
        input = input.clone()  # dense, in the order of the input's strides, as PyTorch's result
    return Activation.apply(input, function, kind, backend, inplace)[0]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``input`` times the normal distribution's Φ(input), exact or by tanh, as ``torch.nn.functional.gelu``.

    Hendrycks & Gimpel 2016, arXiv 1606.08415.
    """
    kind = Kind("gelu_tanh" if approximate == "tanh" else "gelu")
    return _activate(input, kind, lambda x: F.gelu(x, approximate=approximate))


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``input`` times its sigmoid, as ``torch.nn.functional.silu``."""
    return _activate(input, Kind("silu"), _aten.silu_.default if inplace else _aten.silu.default, inplace)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """``input · tanh(softplus(input))``, as ``torch.nn.functional.mish``. Misra 2019, arXiv 1908.08681."""
    return _activate(input, Kind("mish"), _aten.mish_.default if inplace else _aten.mish.default, inplace)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """``log(1 + exp(beta · input))/beta``, and ``input`` where ``beta · input > threshold``, as
    ``torch.nn.functional.softplus``.
    """
    if isinstance(input, Tensor) and input.is_cuda and full_precision(input):
        input = input.float()  # as PyTorch under CUDA's autocast
    return _activate(input, Kind("softplus", float(beta), float(threshold)), lambda x: F.softplus(x, beta, threshold))


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """``input · relu6(input + 3)/6``, as ``torch.nn.functional.hardswish``. Howard et al. 2019, arXiv 1905.02244."""
    function = _aten.hardswish_.default if inplace else _aten.hardswish.default
    return _activate(input, Kind("hardswish"), function, inplace)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``input`` where positive, ``alpha · (exp(input) − 1)`` else, as ``torch.nn.functional.elu``.

    Clevert et al. 2016, arXiv 1511.07289.
    """
    return _activate(input, Kind("elu", float(alpha), 1.0), lambda x: F.elu(x, alpha, inplace), inplace)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """``elu`` with alpha 1.6733, times 1.0507, as ``torch.nn.functional.selu``.

    Klambauer et al. 2017, arXiv 1706.02515.
    """
    return _activate(input, Kind("selu"), lambda x: F.selu(x, inplace), inplace)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``input`` where positive, ``alpha · (exp(input/alpha) − 1)`` else, as ``torch.nn.functional.celu``.

    Barron 2017, arXiv 1704.07483.
    """
    if alpha == 0:
        return F.celu(input, alpha, inplace)  # PyTorch's error
    return _activate(
        input,
        Kind("elu", float(alpha), 1.0 / float(alpha)),
        lambda x: F.celu(x, alpha, inplace),
        inplace,
        lambda x: reference.celu(x, float(alpha), inplace),
    )


def sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``1/(1 + exp(−input))``, as ``torch.sigmoid``, or as ``torch.sigmoid_`` if ``inplace``."""
    return _activate(input, Kind("sigmoid"), torch.sigmoid_ if inplace else torch.sigmoid, inplace)


def tanh(input: Tensor, inplace: bool = False) -> Tensor:
    """The hyperbolic tangent, as ``torch.tanh``, or as ``torch.tanh_`` if ``inplace``."""
    return _activate(input, Kind("tanh"), torch.tanh_ if inplace else torch.tanh, inplace)


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functools.partial(function, inplace=True)


# PyTorch's functions and builtins, and those here that take their place.
REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    **{getattr(F, ours.__name__): ours for ours in (relu, leaky_relu, hardtanh, relu6, hardsigmoid, silu, mish)},
    **{getattr(F, ours.__name__): ours for ours in (hardswish, elu, selu, celu, gelu, softplus)},
    **{getattr(torch, ours.__name__): ours for ours in (relu, selu, celu, sigmoid, tanh)},
    **{getattr(torch, f"{ours.__name__}_"): _in_place(ours) for ours in (relu, selu, celu, sigmoid, tanh)},
    **{getattr(torch.Tensor, ours.__name__): ours for ours in (relu, sigmoid, tanh)},
    **{getattr(torch.Tensor, f"{ours.__name__}_"): _in_place(ours) for ours in (relu, sigmoid, tanh)},
    **{getattr(F, f"{ours.__name__}_"): _in_place(ours) for ours in (leaky_relu, hardtanh)},
    F.elu_: lambda input, alpha=1.0: elu(input, alpha, inplace=True),
    torch.special.expit: sigmoid,
}
