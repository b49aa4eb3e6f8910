"""The CPU kernels themselves, torch.ops.rds_fast_native.*, against float64 formulas.

The truth is the formula in float64 of the same (rounded) inputs; "theirs" is what PyTorch gives in the dtype itself.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from criteria import assert_accurate as assert_rows_accurate
from torch import Tensor

from rds_fast import backends, reference
from rds_fast.reference import accumulation_dtype

failure = backends.failure("native", "cpu")
pytestmark = pytest.mark.skipif(failure is not None, reason=f"the native CPU kernels: {failure}")
native = torch.ops.rds_fast_native

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (
    (1, 1),  # one class: softmax is 1, every second derivative 0
    (3, 2),
    (259, 10),  # many short rows: shared among threads, the last tile not full
    (37, 64),  # the longest row that is treated as short
    (5, 65),  # the shortest that is not: whole vectors and a remainder
    (6, 127),  # one less than the group of vectors that share a maximum (AVX-512)
    (6, 128),
    (3, 1000),
    (2, 16385),  # one chunk and one value
    (1, 40_003),  # one row over several threads
)
TARGETS = ("indices", "probabilities", "accumulated probabilities")


def random_rows(size: tuple[int, int], dtype: torch.dtype, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(
        size[0] * 1_000_003 + size[1] + int(1000 * scale)
    )  # of its own for each scale
    return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)


def random_values(count: int, dtype: torch.dtype) -> Tensor:
    return random_rows((count, 7), dtype, 1.0)[:, 3]


def assert_accurate(ours: Tensor, theirs: Tensor, truth: Tensor, scale: float = 0.0) -> None:
    """One value a row is compared by the largest of all rows, or by ``scale``: sums cancel."""
    if truth.dim() == 1:
        ours, theirs, truth = ours[None], theirs[None], truth[None]
        if ours.dtype in (torch.float32, torch.float64):
            ours, theirs, truth = (F.pad(t, (0, 1), value=scale) for t in (ours, theirs, truth))
            truth[0, -1] = ours[0, -1]
    largest = torch.finfo(ours.dtype).max
    truth = truth.where(truth.abs() <= largest, truth * math.inf)  # what the dtype cannot hold is infinite
    theirs = theirs.where(
        theirs.isfinite(), truth.to(theirs.dtype)
    )  # PyTorch's own overflow in 16 bits excuses nothing
    assert_rows_accurate(ours, theirs, truth)


def size_of_dot(v: Tensor, gx: Tensor, g: Tensor) -> float:
    """The size of Σ v ∂gx/∂g, if its terms had random signs."""
    direction = gx / g.double()[:, None]
    return float((v.double().norm(dim=1) * direction.norm(dim=1)).max() / math.sqrt(v.shape[1]))


def eager_derivatives(function, x: Tensor, v: Tensor, *cotangents: Tensor) -> tuple[Tensor, ...]:
    """PyTorch's own: the results, the gradient of x, the gradients of each cotangent and of x by a cotangent v."""
    x = x.detach().requires_grad_()
    cotangents = tuple(g.detach().clone().requires_grad_() for g in cotangents)
    results = function(x)
    results = results if isinstance(results, tuple) else (results,)
    (gx,) = torch.autograd.grad(results, x, cotangents, create_graph=True)
    second = torch.autograd.grad(gx, (*cotangents, x), v, allow_unused=True)
    second = [torch.zeros_like(t) if s is None else s for s, t in zip(second, (*cotangents, x), strict=True)]
    return (*(r.detach() for r in results), gx.detach(), *second)


# ---- log-sum-exp -----------------------------------------------------------------------------------------------------


def run_logsumexp(x: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    full = g.dtype != x.dtype
    result, saved = native.logsumexp(x, full)
    lse = saved.flatten() if saved.shape[1] else result
    return result, native.logsumexp_backward(g, x, lse), *native.logsumexp_double_backward(v, g, x, lse)


def true_logsumexp(x: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    x, v, g = x.double(), v.double(), g.double()
    lse = torch.logsumexp(x, 1)
    s = x.softmax(1)  # its rows sum to 1, those of exp(x − lse) to 1 and half a unit in the last place of lse
    dg = (v * s).sum(1)
    return lse, g[:, None] * s, dg, g[:, None] * s * (v - dg[:, None])


def check_logsumexp(x: Tensor, v: Tensor, g: Tensor) -> None:
    ours = run_logsumexp(x, v, g)
    wide = x.to(accumulation_dtype(x.dtype)) if g.dtype != x.dtype else x
    theirs = eager_derivatives(lambda x: torch.logsumexp(x, 1), wide, v.to(wide.dtype), g)
    truths = true_logsumexp(x, v, g)
    for our, their, truth in zip(ours, theirs, truths, strict=True):
        assert_accurate(our, their.to(our.dtype), truth, size_of_dot(v, truths[1], g))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logsumexp(size: tuple[int, int], dtype: torch.dtype) -> None:
    check_logsumexp(
        random_rows(size, dtype), random_rows((size[0], size[1]), dtype, 1.0), random_values(size[0], dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("size", [(65, 10), (3, 1000)], ids=str)
def test_logsumexp_full_precision(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = random_rows(size, dtype)
    result, saved = native.logsumexp(x, True)
    assert result.dtype == torch.float32
    assert saved.shape == (size[0], 0)
    result, saved = native.logsumexp(x, False)
    assert result.dtype == dtype
    assert saved.shape == (size[0], 1)
    assert saved.dtype == torch.float32
    check_logsumexp(x, random_rows(size, dtype, 1.0), random_values(size[0], torch.float32))
    if size[1] >= 1000:  # the rounding of few values would not average out
        softmax = native.logsumexp_backward(torch.ones(size[0]), x, saved.flatten())
        assert (softmax.double().sum(1) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 10, 50, 20_000])
def test_logsumexp_infinities(columns: int, dtype: torch.dtype) -> None:
    x = random_rows((8, columns), dtype)
    x[0] = -math.inf
    x[1, 1] = math.inf
    x[2, 0] = math.nan
    x[3, 1:] = -math.inf
    x[4, :-1] = -math.inf
    x[5, 0], x[5, 1] = math.inf, math.nan
    x[6, 0], x[6, 1] = math.inf, -math.inf
    v, g = random_rows((8, columns), dtype, 1.0), random_values(8, dtype)
    theirs = eager_derivatives(lambda x: torch.logsumexp(x, 1), x.double(), v.double(), g.double())
    for our, truth in zip(run_logsumexp(x, v, g), theirs, strict=True):
        assert_accurate(our, truth.to(dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("columns", [5, 1000])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_logsumexp_magnitudes(scale: float, columns: int, dtype: torch.dtype) -> None:
    check_logsumexp(
        random_rows((4, columns), dtype) * scale, random_rows((4, columns), dtype, 1.0), random_values(4, dtype)
    )


@pytest.mark.parametrize("columns", [5, 1000])
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logsumexp_of_large_logits_does_not_cancel(offset: float, columns: int) -> None:
    """Half a unit in the last place of l is 5e-4 here: s has that relative error, but Σ v s and v − Σ v s must not."""
    x, v, g = (
        random_rows((4, columns), torch.float32) + offset,
        random_rows((4, columns), torch.float32, 1.0),
        torch.ones(4),
    )
    result, gx, dg, dx = run_logsumexp(x, v, g)
    true_result, true_gx, true_dg, true_dx = true_logsumexp(x, v, g)
    assert (result - true_result).abs().max() <= 2.0**-11
    torch.testing.assert_close(gx.double(), true_gx, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(dg.double(), true_dg, rtol=1e-5, atol=1e-6)
    assert (dx.double() / gx.double() - true_dx / true_gx).abs().max() < 1e-5


def strided(x: Tensor, kind: str) -> Tensor:
    """The same values by other strides."""
    if kind == "row stride":
        wide = x.new_full((x.shape[0], x.shape[1] + 5), math.nan)
        wide[:, 2 : 2 + x.shape[1]] = x
        return wide[:, 2 : 2 + x.shape[1]]
    if kind == "expanded rows":
        return x[:1].expand_as(x)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(33, 10), (5, 70), (2, 16_400)], ids=str)
@pytest.mark.parametrize("kind", ["row stride", "expanded rows", "expanded g", "strided g"])
def test_strides(kind: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    x = strided(random_rows(size, dtype, 3.0), kind)
    v = strided(random_rows(size, dtype, 1.0) + 1, kind)  # so that Σ v s does not cancel
    g = random_values(size[0], dtype)
    if kind == "expanded g":
        g = g[:1].expand(size[0])
    elif kind == "strided g":
        g = torch.stack((g, g + 1), 1)[:, 0]
    check_logsumexp(x, v, g)
    check_cross_entropy(x, v, (g, g), torch.arange(size[0]) % size[1], 0.1)
    check_cross_entropy(x, v, (g, g), strided(random_rows(size, dtype).float().softmax(1).to(dtype), kind), 0.0)
    for p in (1.0, 2.0, 3.0, math.inf):
        check_gradient_norm(x, v, g, p, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_column_of_any_stride(dtype: torch.dtype) -> None:
    x = random_rows((9, 4), dtype)[:, 1:2]
    check_logsumexp(x, x, random_values(9, dtype))
    check_gradient_norm(x, x, random_values(9, dtype), 2.0, 1.0)


def test_no_rows() -> None:
    x, g, target = torch.zeros(0, 5), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert [tuple(r.shape) for r in native.logsumexp(x, False)] == [(0,), (0, 0)]
    assert native.logsumexp_backward(g, x, g).shape == (0, 5)
    assert [tuple(r.shape) for r in native.logsumexp_double_backward(x, g, x, g)] == [(0,), (0, 5)]
    assert [tuple(r.shape) for r in native.cross_entropy(x, target, 0.0, -100, False)] == [(0,), (0,), (0, 0)]
    assert native.cross_entropy_backward(g, g, x, target, g, 0.0, -100).shape == (0, 5)
    assert [tuple(r.shape) for r in native.gradient_norm(x, 2.0, 1.0, False)] == [(0,), (0, 1)]
    assert native.gradient_norm_backward(g, x, g[:, None], 2.0, 1.0).shape == (0, 5)


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


def run_cross_entropy(
    x: Tensor, v: Tensor, g: tuple[Tensor, Tensor], target: Tensor, smoothing: float
) -> tuple[Tensor, ...]:
    ce, lse, saved = native.cross_entropy(x, target, smoothing, -100, g[0].dtype != x.dtype)
    kept = saved.flatten() if saved.shape[1] else lse
    gx = native.cross_entropy_backward(*g, x, target, kept, smoothing, -100)
    return ce, lse, gx, *native.cross_entropy_double_backward(v, *g, x, target, kept, smoothing, -100)


def true_cross_entropy(
    x: Tensor, v: Tensor, g: tuple[Tensor, Tensor], target: Tensor, smoothing: float
) -> tuple[Tensor, ...]:
    x, v, g_ce, g_lse = x.double(), v.double(), g[0].double()[:, None], g[1].double()[:, None]
    lse = torch.logsumexp(x, 1, keepdim=True)
    if target.is_floating_point():
        q = (1 - smoothing) * target.double() + smoothing / x.shape[1]
    else:
        q = (1 - smoothing) * F.one_hot(target.clamp(min=0), x.shape[1]).double() + smoothing / x.shape[1]
        q = q * (target != -100)[:, None]
    total = q.sum(1, keepdim=True)
    s = x.softmax(1)
    ce = torch.where(q == 0, 0.0, q * (lse - x)).sum(1)
    a = g_ce * total + g_lse
    dg_lse, dg_ce = (v * s).sum(1, keepdim=True), (v * (total * s - q)).sum(1)
    return ce, lse[:, 0], a * s - g_ce * q, dg_ce, dg_lse[:, 0], a * s * (v - dg_lse)


def check_cross_entropy(x: Tensor, v: Tensor, g: tuple[Tensor, Tensor], target: Tensor, smoothing: float) -> None:
    wide = x.to(accumulation_dtype(x.dtype)) if g[0].dtype != x.dtype else x

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        q = target.to(x.dtype) if target.is_floating_point() else target
        return F.cross_entropy(x, q, reduction="none", label_smoothing=smoothing), torch.logsumexp(x, 1)

    theirs = eager_derivatives(eager, wide, v.to(wide.dtype), *g)
    truths = true_cross_entropy(x, v, g, target, smoothing)
    for our, their, truth in zip(run_cross_entropy(x, v, g, target, smoothing), theirs, truths, strict=True):
        assert_accurate(our, their.to(our.dtype), truth, size_of_dot(v, truths[2], g[0]))


def random_target(kind: str, x: Tensor) -> Tensor:
    if kind == "indices":
        target = torch.randint(x.shape[1], x.shape[:1], generator=torch.Generator().manual_seed(1))
        target[1::3] = -100  # ignored
        return target
    q = random_rows(tuple(x.shape), torch.float64).abs() / x.shape[1]  # need not sum to 1
    return q.to(x.dtype if kind == "probabilities" else accumulation_dtype(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", TARGETS)
def test_cross_entropy(kind: str, smoothing: float, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, v = random_rows(size, dtype), random_rows(size, dtype, 0.7)
    g = random_values(size[0], dtype), random_values(size[0], dtype).neg() * 0.5
    check_cross_entropy(x, v, g, random_target(kind, x), smoothing)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("columns", [10, 1000])
def test_cross_entropy_full_precision(columns: int, kind: str) -> None:
    x = random_rows((5, columns), torch.bfloat16)
    g = random_values(5, torch.float32), random_values(5, torch.float32) * 2
    ce, lse, saved = native.cross_entropy(x, random_target(kind, x), 0.1, -100, True)
    assert (ce.dtype, lse.dtype, tuple(saved.shape)) == (torch.float32, torch.float32, (5, 0))
    check_cross_entropy(x, random_rows((5, columns), torch.bfloat16, 0.5), g, random_target(kind, x), 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("columns", [4, 50])
def test_cross_entropy_infinities(columns: int, kind: str, smoothing: float, dtype: torch.dtype) -> None:
    """PyTorch's values: of the forward in every case, of the backward where the row has a finite log-sum-exp."""
    x = random_rows((7, columns), dtype)
    x[0] = -math.inf
    x[1, 1] = math.inf
    x[2, 0] = math.nan
    x[3, 2:] = -math.inf
    x[4, 0] = -math.inf
    x[5, 0] = math.inf
    target = torch.tensor([1, 1, 1, 1, 0, 1, -100])
    if kind == "probabilities":
        target = torch.full((7, columns), 1.0 / columns, dtype=dtype)
        target[:, 2:] = 0
    ce, lse, saved = native.cross_entropy(x, target, smoothing, -100, False)
    truth = F.cross_entropy(
        x.double(), target.double() if kind == "probabilities" else target, reduction="none", label_smoothing=smoothing
    )
    assert_accurate(ce, truth.to(dtype), truth)
    assert_accurate(lse, lse, torch.logsumexp(x.double(), 1))
    kept = saved.flatten() if saved.shape[1] else lse
    g = random_values(7, dtype)
    gx = native.cross_entropy_backward(g, g, x, target, kept, smoothing, -100)
    formula = true_cross_entropy(x, x, (g, g), target, smoothing)[2]
    assert_accurate(gx[3:5], formula[3:5].to(dtype), formula[3:5])
    assert gx[0].isnan().all()
    assert gx[2].isnan().all()


@pytest.mark.parametrize("columns", [10, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_cross_entropy_of_large_logits_does_not_cancel(offset: float, smoothing: float, columns: int) -> None:
    x = random_rows((6, columns), torch.float32) + offset
    for kind in TARGETS:
        target = random_target(kind, x)
        ce = native.cross_entropy(x, target, smoothing, -100, False)[0]
        theirs = F.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)
        truth = F.cross_entropy(
            x.double(),
            target.double() if target.is_floating_point() else target,
            reduction="none",
            label_smoothing=smoothing,
        )
        assert_accurate(ce, theirs, truth)


# ---- gradient norm ---------------------------------------------------------------------------------------------------


def run_gradient_norm(x: Tensor, v: Tensor, g: Tensor, p: float, power: float) -> tuple[Tensor, ...]:
    result, saved = native.gradient_norm(x, p, power, g.dtype != x.dtype)
    gx = native.gradient_norm_backward(g, x, saved, p, power)
    return result, gx, *native.gradient_norm_double_backward(v, g, x, saved, p, power)


def true_gradient_norm(x: Tensor, v: Tensor, g: Tensor, p: float, k: float) -> tuple[Tensor, ...]:
    x, v, g = x.double(), v.double(), g.double()[:, None]
    largest = x.abs().amax(1, keepdim=True).clamp(min=1e-300)
    n = largest * torch.linalg.vector_norm(x / largest, p, 1, keepdim=True)  # exactly |x| if there is one coordinate
    w = torch.ones_like(x)
    if p == 1:
        u = x.sign()
    elif math.isinf(p):
        u = x.sign() * (x.abs() == n)
        u = u / (x.abs() == n).sum(1, keepdim=True)
    else:
        u = x.sign() * (x.abs() / n) ** (p - 1)
        w = torch.where((x == 0) & (p != 2), 0.0, (x.abs() / n) ** (p - 2))
    uv = (u * v).sum(1, keepdim=True)
    flat = p == 1 or math.isinf(p)
    bracket = (k - 1) * u * uv if flat else (p - 1) * w * v + (k - p) * u * uv
    gx, dg, dx = g * k * n ** (k - 1) * u, (k * n ** (k - 1) * uv)[:, 0], g * k * n ** (k - 2) * bracket
    zero = n == 0
    smooth = p == 2 and k == 2
    return (
        n[:, 0] ** k,
        gx.where(~zero, 0.0),
        dg.where(~zero[:, 0], 0.0),
        2 * g * v if smooth else dx.where(~zero, 0.0),
    )


def check_gradient_norm(x: Tensor, v: Tensor, g: Tensor, p: float, power: float) -> None:
    wide = x.to(accumulation_dtype(x.dtype)) if g.dtype != x.dtype else x
    theirs = eager_derivatives(lambda x: reference.gradient_norm(x, p, power), wide, v.to(wide.dtype), g)
    truths = true_gradient_norm(x, v, g, p, power)
    for our, their, truth in zip(run_gradient_norm(x, v, g, p, power), theirs, truths, strict=True):
        assert_accurate(our, their.to(our.dtype), truth, size_of_dot(v, truths[1], g))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "power"),
    [(size, power) for power in (1.0, 2.0) for size in SIZES] + [((259, 10), 0.5), ((5, 65), 3.0)],  # once a row
    ids=str,
)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_gradient_norm(power: float, p: float, size: tuple[int, int], dtype: torch.dtype) -> None:
    x = random_rows(size, dtype, 0.3)
    if math.isinf(p):
        x[:, -1] = -x.abs().amax(1)  # a tie
    check_gradient_norm(x, random_rows(size, dtype, 0.7), random_values(size[0], dtype), p, power)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 50, 20_000])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_gradient_norm_at_zeros(power: float, p: float, columns: int, dtype: torch.dtype) -> None:
    x = random_rows((4, columns), dtype)
    x[0] = 0
    x[1, 1:] = 0
    x[2, ::2] = 0
    v, g = random_rows((4, columns), dtype, 0.5), random_values(4, dtype)
    truths = true_gradient_norm(x, v, g, p, power)
    for our, truth in zip(run_gradient_norm(x, v, g, p, power), truths, strict=True):
        assert not our.isnan().any()
        assert_accurate(our, truth.to(dtype), truth)


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float32, 1e-42),
        (torch.float64, 1e300),
        (torch.float64, 1e-300),
        (torch.float64, 1e-315),
    ],
    ids=str,
)
@pytest.mark.parametrize("columns", [2, 50, 20_000])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 50.0, math.inf])
def test_gradient_norm_does_not_overflow_or_underflow(
    p: float, columns: int, dtype: torch.dtype, magnitude: float
) -> None:
    x = random_rows((3, columns), torch.float64, 1.0).clamp(-2, 2)
    tiny = (x * magnitude).to(dtype)
    v, g = random_rows((3, columns), dtype, 0.5), random_values(3, dtype)
    scaled = tiny.double() / magnitude  # the norm is homogeneous: the truth of an input of ordinary size
    scaled[2] = 0
    tiny[2] = 0
    n = torch.linalg.vector_norm(scaled, p, 1)
    result, gx = run_gradient_norm(tiny, v, g, p, 1.0)[:2]
    subnormal = dtype in (torch.float32, torch.float64) and magnitude < torch.finfo(dtype).smallest_normal
    tolerance = 1e-2 if subnormal else 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(result.double() / magnitude, n, rtol=tolerance, atol=0)
    truth = true_gradient_norm(scaled, v, g, p, 1.0)[1]
    torch.testing.assert_close(gx.double(), truth, rtol=tolerance, atol=tolerance * truth.abs().max().item())


@pytest.mark.parametrize("columns", [1, 10, 64, 1000])
def test_gradient_norm_of_rows_of_every_magnitude(columns: int) -> None:
    """Neighbouring rows on either side of the range where squares are summed without a scale, and zero rows."""
    exponents = torch.arange(-120, 121, 3, dtype=torch.float64)
    x = random_rows((len(exponents), columns), torch.float64)
    x = (x * torch.exp2(exponents)[:, None]).float()
    x[::7] = 0
    truth = x.double().norm(dim=1)
    result, saved = native.gradient_norm(x, 2.0, 1.0, False)
    assert torch.equal(result, saved[:, 0])
    torch.testing.assert_close(result.double(), truth, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 50, 20_000])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_gradient_norm_of_infinities(p: float, columns: int, dtype: torch.dtype) -> None:
    x = random_rows((5, columns), dtype)
    x[0, 1] = math.inf
    x[1, 0] = -math.inf
    x[2, 2] = math.nan
    x[3, 0], x[3, 1] = math.inf, math.nan
    x[4, 0], x[4, 1] = math.inf, math.inf
    result = native.gradient_norm(x, p, 1.0, False)[0]
    assert torch.equal(result[[0, 1, 4]], x.new_full((3,), math.inf))
    assert result[2:4].isnan().all()


# ---- the same bits, and every instruction set ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 300_001), (7, 50_000), (999, 10), (300, 700)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(size: tuple[int, int]) -> None:
    x, v, g = (
        random_rows(size, torch.float32),
        random_rows(size, torch.float32, 1.0),
        random_values(size[0], torch.float32),
    )
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append((*run_logsumexp(x, v, g), *(r for p in (2.0, 3.0) for r in run_gradient_norm(x, v, g, p, 1.0))))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_capability_is_the_one_requested() -> None:
    assert native.cpu_capability() in ("default", "avx2", "avx512")
    requested = os.environ.get("RDS_FAST_CPU_CAPABILITY")
    assert requested is None or native.cpu_capability() == requested


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_lower_capability(capability: str) -> None:
    """This file again in a process of its own: the capability is chosen once, when the library is first used."""
    order = ("default", "avx2", "avx512")
    if "RDS_FAST_CPU_CAPABILITY" in os.environ:
        pytest.skip("already in such a process")
    if order.index(native.cpu_capability()) <= order.index(capability):
        pytest.skip(f"this CPU's best capability is {native.cpu_capability()}: tested above")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = os.environ | {"RDS_FAST_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
