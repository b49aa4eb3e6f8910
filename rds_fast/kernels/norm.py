"""The arithmetic of the p-norm in a Triton kernel; the mathematics and the names are ``gradient_norm``'s.

``P`` and ``POWER`` say which code is compiled: "one", "two", "inf" for those orders and powers, else "general", which
takes p and the power k as numbers.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

import triton
import triton.language as tl

from .rows import tl_float


@triton.jit
def tl_pow(base, exponent):
    """base ** exponent for base >= 0."""
    return tl.exp2(exponent * tl.log2(base))


@triton.jit
def tl_row_pow(n, exponent_high, exponent_low, ADD: tl.constexpr):
    """n ** (exponent + ADD) of a value a row, in float64: n may be 1e±30, whose logarithm costs float32 digits."""
    exponent = tl_float(exponent_high, exponent_low, tl.float64) + ADD
    return tl_pow(n.to(tl.float64), exponent).to(n.dtype)


@triton.jit
def tl_scale(m, P: tl.constexpr):
    """What the coordinates are divided by before powers are taken: m, or 1 where that is not a positive number."""
    if P == "one" or P == "inf":
        return tl.zeros_like(m) + 1.0
    else:
        return tl.where((m == 0.0) | (m == float("inf")), 1.0, m)


@triton.jit
def tl_merge(t, m, new_m, p, P: tl.constexpr):
    """t, once m has become new_m."""
    if P == "one":
        return t
    elif P == "inf":
        return t * tl.where(m == new_m, 1.0, 0.0)  # a product, so that NaN stays
    else:
        ratio = m / tl_scale(new_m, P)
        return t * (ratio * ratio if P == "two" else tl_pow(ratio, p))


@triton.jit
def tl_terms(magnitude, mask, m, p, P: tl.constexpr):
    """The terms of t in a tile."""
    if P == "one":
        return magnitude
    elif P == "inf":
        is_nan = magnitude != magnitude
        return tl.where(is_nan, magnitude, tl.where(mask & (magnitude == m), 1.0, 0.0))
    else:
        ratio = magnitude / tl_scale(m, P)
        return ratio * ratio if P == "two" else tl_pow(ratio, p)


@triton.jit
def tl_store_forward(
    result_ptr, saved_ptr, rows, row_mask, m, t, p, power_high, power_low,
    P: tl.constexpr, POWER: tl.constexpr, SAVED_COLUMNS: tl.constexpr,
):  # fmt: skip
    """n from (m, t), r = n^k, and what the backwards need."""
    if P == "one":
        n = t
    elif P == "inf":
        n = tl.where(t == t, m, t)
    else:
        n = tl_scale(m, P) * (tl.sqrt(t) if P == "two" else tl_pow(t, 1.0 / p))
    if POWER == "one":
        result = n
    elif POWER == "two":
        result = n * n
    else:
        result = tl_row_pow(n, power_high, power_low, 0.0)
    tl.store(result_ptr + rows, result.to(result_ptr.dtype.element_ty), mask=row_mask)
    if SAVED_COLUMNS > 0:
        tl.store(saved_ptr + rows * SAVED_COLUMNS, n, mask=row_mask)
    if P == "inf":
        tl.store(saved_ptr + rows * SAVED_COLUMNS + 1, t, mask=row_mask)


@triton.jit
def tl_load_saved(saved_ptr, rows, row_mask, P: tl.constexpr):
    """n, n with 1 in place of 0, and the number of ties."""
    columns: tl.constexpr = 2 if P == "inf" else 1
    n = tl.load(saved_ptr + rows * columns, mask=row_mask, other=1.0)
    ties = tl.load(saved_ptr + rows * columns + columns - 1, mask=row_mask, other=1.0) if P == "inf" else n
    return n, tl.where(n == 0.0, 1.0, n)[:, None], ties[:, None]


@triton.jit
def tl_slope(n, k, power_high, power_low, POWER: tl.constexpr):
    """k n^(k−1); 0 at n = 0, where it may be infinite but is multiplied by u = 0."""
    if POWER == "one":
        return tl.zeros_like(n) + 1.0
    elif POWER == "two":
        return 2.0 * n
    else:
        return tl.where(n == 0.0, 0.0, k * tl_row_pow(n, power_high, power_low, -1.0))


@triton.jit
def tl_direction(x, divisor, ties, p, P: tl.constexpr):
    """u, 0 for a row of zeros. A NaN in x stays NaN."""
    sign = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))
    if P == "one":
        return sign
    elif P == "inf":
        return tl.where(tl.abs(x) == divisor, sign, 0.0) / ties
    elif P == "two":
        return x / divisor
    else:
        return sign * tl_pow(tl.abs(x) / divisor, p - 1.0)


@triton.jit
def tl_dx(x, v, g, n, divisor, ties, slope, uv, p, k, P: tl.constexpr, POWER: tl.constexpr):
    """A tile of dx. ``g``, ``n``, ``slope`` and ``uv`` = u·v have a value a row."""
    if P == "two" and POWER == "two":
        return 2.0 * g[:, None] * v
    else:
        u = tl_direction(x, divisor, ties, p, P)
        if P == "two":
            bracket = v + ((k - 2.0) * uv)[:, None] * u
        elif P == "general":
            ratio = tl.abs(x) / divisor
            w = tl.where(ratio == 0.0, 0.0, tl.abs(u) / ratio)
            bracket = (p - 1.0) * w * v + ((k - p) * uv)[:, None] * u
        else:
            bracket = ((k - 1.0) * uv)[:, None] * u
        return tl.where((n == 0.0)[:, None], 0.0, (g * slope)[:, None] * bracket / divisor)
