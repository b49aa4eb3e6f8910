"""Triton kernels of the derivatives of smooth activations, element by element.

With f' and f'' the derivatives of y = f(x), g the cotangent of y and v the cotangent of the backward's result:

    backward           gx = g f'(x) + x_cotangent
    double backward    dg = v f'(x),   dx = v g f''(x)

The forward is PyTorch's. The tensors lie in one order in memory, whatever it is, so the kernels see a row of values.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import kernel
from .rows import accumulator, float_pair, tl_aligned, tl_float

# 8 elements a thread of 4 warps: 16-byte loads for 16-bit types.
_BLOCK = 1024

_element_kernel = kernel("count", "a_high", "a_low", "b_high", "b_low")


@triton.jit
def tl_sigmoids(w):
    """σ(w) and 1 − σ(w), neither by subtraction; nothing overflows."""
    small = tl.exp(-tl.abs(w))
    inverse = 1.0 / (1.0 + small)
    other = small * inverse
    return tl.where(w < 0, other, inverse), tl.where(w < 0, inverse, other)


@triton.jit
def tl_clamped(x):
    """x where exponentials have not underflowed yet: beyond, a power of x could overflow, and 0 · inf is NaN."""
    return tl.where(x > 40.0, 40.0, tl.where(x < -40.0, -40.0, x))


@triton.jit
def tl_gated(x, w, w1, w2):
    """f = x σ(w), with w, w' and w'' functions of x: f' = s + x s s̄ w', f'' = s s̄ (2w' + x (w'' + (s̄ − s) w'²))."""
    s, complement = tl_sigmoids(w)
    slope = s * complement
    return s + x * slope * w1, slope * (2.0 * w1 + tl_clamped(x) * (w2 + (complement - s) * w1 * w1))


@triton.jit
def tl_gelu(x):
    """f = x Φ(x), φ = Φ': f' = Φ + x φ, f'' = φ (2 − x²)."""
    bounded = tl_clamped(x)
    density = tl.exp(bounded * bounded * -0.5) * 0.3989422804014327
    distribution = 0.5 + 0.5 * tl.erf(bounded * 0.7071067811865476)
    return distribution + x * density, density * (2.0 - bounded * bounded)


@triton.jit
def tl_gelu_tanh(x):
    """(1 + tanh u)/2 = σ(2u), so w = 2u = 2 √(2/π) (x + 0.044715 x³)."""
    k: tl.constexpr = 1.5957691216057308
    cubic: tl.constexpr = 0.044715
    bounded = tl_clamped(x)
    square = bounded * bounded
    return tl_gated(
        x, k * (bounded + cubic * square * bounded), k * (1.0 + 3.0 * cubic * square), 6.0 * k * cubic * bounded
    )


@triton.jit
def tl_mish(x):
    """f = x t, t = tanh(log(1 + exp x)): t' = (1 − t²) s, f' = t + x t', f'' = t' (2 + x (s̄ − 2 t s)).

    With q = exp(−|x|), t = (1 + 2q)/(1 + 2q + 2q²) and 1 − t = 2q²/(…) for x ≥ 0, t = (q² + 2q)/(q² + 2q + 2) and
    1 − t = 2/(…) below.
    """
    q = tl.exp(-tl.abs(x))
    square = q * q
    part = tl.where(x < 0, square + 2.0 * q, 1.0 + 2.0 * q)
    rest = tl.where(x < 0, 2.0, 2.0 * square)
    t = part / (part + rest)
    s, complement = tl_sigmoids(x)
    slope = rest / (part + rest) * (1.0 + t) * s
    return t + x * slope, slope * (2.0 + tl_clamped(x) * (complement - 2.0 * t * s))


@triton.jit
def tl_exponential_linear(x, p, a, b):
    """f = a (exp(b x) − 1) for x ≤ 0, p x above."""
    slope = a * b * tl.exp(tl.where(x > 0, 0.0, x) * b)  # a NaN stays
    return tl.where(x > 0, tl.full(x.shape, p, x.dtype), slope), tl.where(x < 0, b * slope, 0.0)


# A number that no tensor meets in an operation, as in tl.where, would be of float32: tl.full says its type.
@triton.jit
def tl_slopes(x, a, b, KIND: tl.constexpr):
    """f' and f''. sigmoid and tanh are given their result in the place of x."""
    if KIND == "gelu":
        first, second = tl_gelu(x)
    elif KIND == "gelu_tanh":
        first, second = tl_gelu_tanh(x)
    elif KIND == "silu":
        first, second = tl_gated(x, x, 1.0, 0.0)
    elif KIND == "mish":
        first, second = tl_mish(x)
    elif KIND == "softplus":  # log(1 + exp(a x))/a, and x where a x > b
        s, complement = tl_sigmoids(x * a)
        first, second = tl.where(x * a > b, 1.0, s), tl.where(x * a < b, a * s * complement, 0.0)
    elif KIND == "hardswish":  # x (x + 3)/6 between 0 and x
        third = tl.full(x.shape, 1.0 / 3.0, x.dtype)
        middle = tl.where(x >= 3.0, 1.0, x * third + 0.5)
        first, second = tl.where(x <= -3.0, 0.0, middle), tl.where(tl.abs(x) < 3.0, third, 0.0)
    elif KIND == "elu":
        first, second = tl_exponential_linear(x, 1.0, a, b)
    elif KIND == "selu":
        first, second = tl_exponential_linear(x, 1.0507009873554805, 1.7580993408473768, 1.0)
    elif KIND == "sigmoid":
        first = x * (1.0 - x)
        second = first * (1.0 - 2.0 * x)
    else:
        tl.static_assert(KIND == "tanh")
        first = 1.0 - x * x
        second = -2.0 * x * first
    return first, second


@_element_kernel
def _backward_kernel(
    g_ptr, x_ptr, x_cotangent_ptr, gx_ptr, count, a_high, a_low, b_high, b_low,
    KIND: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < tl_aligned(count, ALIGN)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(ACC)
    gx = g * tl_slopes(x, tl_float(a_high, a_low, ACC), tl_float(b_high, b_low, ACC), KIND)[0]
    if ADD:
        gx += tl.load(x_cotangent_ptr + offsets, mask=mask, other=0.0).to(ACC)
    tl.store(gx_ptr + offsets, gx.to(gx_ptr.dtype.element_ty), mask=mask)


@_element_kernel
def _double_backward_kernel(
    v_ptr, g_ptr, x_ptr, dg_ptr, dx_ptr, count, a_high, a_low, b_high, b_low,
    KIND: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < tl_aligned(count, ALIGN)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(ACC)
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(ACC)
    first, second = tl_slopes(x, tl_float(a_high, a_low, ACC), tl_float(b_high, b_low, ACC), KIND)
    tl.store(dg_ptr + offsets, (v * first).to(dg_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + offsets, (v * g * second).to(dx_ptr.dtype.element_ty), mask=mask)


def activation_backward(g: Tensor, x: Tensor, x_cotangent: Tensor | None, kind: str, a: float, b: float) -> Tensor:
    """gx = g f'(x) + x_cotangent."""
    gx = torch.empty_like(x)
    if x.numel() == 0:
        return gx
    add = x_cotangent is not None
    with torch.cuda.device_of(x):
        _backward_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            g, x, x_cotangent if add else x, gx, x.numel(), *float_pair(a), *float_pair(b),
            KIND=kind, ADD=add, ACC=accumulator(x), ALIGN=math.gcd(16, x.numel()), BLOCK=_BLOCK,
        )  # fmt: skip
    return gx


def activation_double_backward(v: Tensor, g: Tensor, x: Tensor, kind: str, a: float, b: float) -> tuple[Tensor, Tensor]:
    """dg = v f'(x) and dx = v g f''(x)."""
    dg, dx = torch.empty_like(x), torch.empty_like(x)
    if x.numel() == 0:
        return dg, dx
    with torch.cuda.device_of(x):
        _double_backward_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            v, g, x, dg, dx, x.numel(), *float_pair(a), *float_pair(b),
            KIND=kind, ACC=accumulator(x), ALIGN=math.gcd(16, x.numel()), BLOCK=_BLOCK,
        )  # fmt: skip
    return dg, dx
