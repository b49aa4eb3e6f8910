"""Per-sample p-norm of a gradient, raised to a power, differentiable twice.

For each row x, n = ‖x‖ₚ, k the power, u = ∇n, g the cotangent of n^k and v the cotangent of the backward's result:

    forward            n^k
    backward           gx = g k n^(k−1) u,   u = sign(x) (|x|/n)^(p−1)
    double backward    dg = k n^(k−1) Σ u v,
                       dx = g k n^(k−2) ((p−1) w v + (k−p) u Σ u v),   w = (|x|/n)^(p−2)

For p = ∞, u is sign(x) at the largest magnitudes, shared evenly among ties; there and for p = 1 the norm is piecewise
linear and dx = g k (k−1) n^(k−2) u Σ u v. At a zero row both derivatives are 0, the subgradient of least norm, except
that Σ x² (p = 2, k = 2) is smooth: dx = 2 g v. For 1 < p < 2 a zero coordinate has w = 0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..backends import select
from .function import Function
from .inputs import check_number, check_rows
from .logsumexp import at_full_precision, full_precision, with_unit_column_stride
from .registration import derivative, register, third_derivative


def _forward_fake(x: Tensor, p: float, power: float, full_precision: bool, backend: str) -> tuple[Tensor, Tensor]:
    accumulated = reference.accumulation_dtype(x.dtype)
    dtype = accumulated if full_precision else x.dtype
    columns = 2 if p == float("inf") else 0 if power == 1 and dtype == accumulated else 1
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty((x.shape[0], columns), dtype=accumulated)


# x: (N, D) of unit column stride. Result: (N,), of x's dtype or, if full_precision, the accumulation dtype. saved, in
# the accumulation dtype: (N, 1), the norm; for p = inf (N, 2), the norm and the number of coordinates that attain it;
# (N, 0) where the result is all that: the backwards then take it, as (N, 1).
_forward = register(
    "gradient_norm",
    "gradient_norm(Tensor x, float p, float power, bool full_precision, str backend) -> (Tensor, Tensor)",
    _forward_fake,
)
_backward = register(
    "gradient_norm",
    "gradient_norm_backward(Tensor g, Tensor x, Tensor saved, float p, float power, str backend) -> Tensor",
    lambda g, x, *_: x.new_empty(x.shape),
)
_double_backward = register(
    "gradient_norm",
    "gradient_norm_double_backward(Tensor v, Tensor g, Tensor x, Tensor saved, float p, float power, str backend) "
    "-> (Tensor, Tensor)",
    lambda v, g, x, *_: (g.new_empty(g.shape), x.new_empty(x.shape)),
)


class GradientNorm(Function):
    """(N, D) rows to n^k (N,)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, p: float, power: float, full_precision: bool, backend: str) -> tuple[Tensor, Tensor]:
        return _forward(x, p, power, full_precision, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.p, ctx.power, _, ctx.backend = inputs
        result, saved = output
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, saved if saved.shape[-1] else result)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> Any:
        if g is None:
            return None, None, None, None, None
        x, saved = ctx.saved_tensors
        saved = saved if saved.dim() == 2 else saved.detach().unsqueeze(1)
        gradient = derivative(GradientNormBackward, g, x, saved, ctx.p, ctx.power, ctx.backend)
        return gradient, None, None, None, None


class GradientNormBackward(Function):
    """gx = g k n^(k−1) u. n comes without a graph: the double backward's dx is the total derivative, through n too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, saved: Tensor, p: float, power: float, backend: str) -> Tensor:
        return _backward(g, x, saved, p, power, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.p, ctx.power, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return (None,) * 6
        dg, dx = derivative(GradientNormDoubleBackward, v, *ctx.saved_tensors, ctx.p, ctx.power, ctx.backend)
        return dg, dx, None, None, None, None


class GradientNormDoubleBackward(Function):
    """dg and dx as above: the last derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return _double_backward(with_unit_column_stride(v), *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise third_derivative("rds_fast.gradient_norm")


def gradient_norm(gradient: Tensor, p: float = 2.0, *, power: float = 1) -> Tensor:
    """The p-norm of each sample's gradient, raised to a power.

    Scaled by each row's largest magnitude, so that nothing overflows or underflows where the result is representable.
    Differentiable twice in reverse mode (a third derivative raises); in forward mode, and in any mix that holds it, the
    plain formula runs. At a zero gradient both derivatives are 0, never NaN (but Σ x², p = 2 and power = 2, keeps its
    second derivative 2); for p = ∞ the gradient is shared evenly among ties, as in ``torch.linalg.vector_norm``.

    Args:
        gradient: (N, ...); float64, float32, bfloat16 or float16. The norm is over all dimensions but the first.
        p: the order, in [1, ∞].
        power: any positive number; 1 is the norm, 2 its square.

    Returns:
        ``‖gradient‖ₚ^power``, (N,), in the dtype of ``gradient``; float32 for a 16-bit gradient under autocast.

    Raises:
        TypeError: ``gradient`` is not a dense tensor of these dtypes, or ``p`` or ``power`` is not a number (Python's
            or NumPy's).
        ValueError: it has no dimension, ``p`` is outside [1, ∞], or ``power`` is not positive and finite.
    """
    check_rows("gradient", gradient, "gradient_norm")
    if gradient.dim() == 0:
        raise ValueError("gradient has no dimension; gradient_norm needs shape (N, ...), one sample a row")
    p, power = check_norm(p, power)
    backend = select(gradient)
    if backend == "reference" or gradient.numel() == 0:
        return reference.gradient_norm(at_full_precision(gradient), p, power)
    # A norm does not depend on the order of the elements, so a channels-last gradient need not be copied into rows.
    rows = gradient.reshape(gradient.shape[0], -1) if gradient.is_contiguous() else _rows(gradient)
    return derivative(GradientNorm, rows, p, power, full_precision(gradient), backend)[0]


def check_norm(p: float, power: float) -> tuple[float, float]:
    """p and power as Python floats, if p is a number in [1, ∞] and power a positive, finite one."""
    p, power = check_number("p", p, " (for the maximum norm math.inf)"), check_number("power", power)
    if not p >= 1:
        raise ValueError(f"p is {p:g}; the order of the norm must be in [1, inf]")
    if not 0 < power < float("inf"):
        raise ValueError(f"power is {power:g}; it must be positive and finite")
    return p, power


def _rows(gradient: Tensor) -> Tensor:
    """(N, D) rows of a non-contiguous gradient, as a view wherever each sample is dense in memory."""
    strides = gradient.stride()
    dims = sorted(range(1, gradient.dim()), key=lambda d: -strides[d])
    rows = gradient.permute(0, *dims)
    return with_unit_column_stride(rows.reshape(gradient.shape[0], -1))
