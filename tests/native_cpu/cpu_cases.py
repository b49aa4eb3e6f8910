"""What the tests of the CPU kernels, torch.ops.rds_fast_native.*, share: inputs, float64 formulas, the comparison.

The truth is the formula in float64 of the same (rounded) inputs; "theirs" is what PyTorch gives in the dtype itself.
"""

from __future__ import annotations

import functools
import math

import kernel_cases
import pytest
import torch
import torch.nn.functional as F
from criteria import assert_accurate as assert_rows_accurate
from kernel_cases import derivatives
from torch import Tensor

from rds_fast import backends, reference
from rds_fast.reference import accumulation_dtype

failure = backends.failure("native", "cpu")
needs_kernels = pytest.mark.skipif(failure is not None, reason=f"the native CPU kernels: {failure}")
native = torch.ops.rds_fast_native
run_logsumexp = functools.partial(kernel_cases.run_logsumexp, native)
run_cross_entropy = functools.partial(kernel_cases.run_cross_entropy, native)
run_gradient_norm = functools.partial(kernel_cases.run_gradient_norm, native)

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


def random_target(kind: str, x: Tensor) -> Tensor:
    if kind == "indices":
        target = torch.randint(x.shape[1], x.shape[:1], generator=torch.Generator().manual_seed(1))
        target[1::3] = -100  # ignored
        return target
    q = random_rows(tuple(x.shape), torch.float64).abs() / x.shape[1]  # need not sum to 1
    return q.to(x.dtype if kind == "probabilities" else accumulation_dtype(x.dtype))


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


def true_logsumexp(x: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    x, v, g = x.double(), v.double(), g.double()
    lse = torch.logsumexp(x, 1)
    s = x.softmax(1)  # its rows sum to 1, those of exp(x − lse) to 1 and half a unit in the last place of lse
    dg = (v * s).sum(1)
    return lse, g[:, None] * s, dg, g[:, None] * s * (v - dg[:, None])


def check_logsumexp(x: Tensor, v: Tensor, g: Tensor) -> None:
    ours = run_logsumexp(x, v, g)
    wide = x.to(accumulation_dtype(x.dtype)) if g.dtype != x.dtype else x
    theirs = derivatives(lambda x: torch.logsumexp(x, 1), wide, v.to(wide.dtype), g)
    truths = true_logsumexp(x, v, g)
    for our, their, truth in zip(ours, theirs, truths, strict=True):
        assert_accurate(our, their.to(our.dtype), truth, size_of_dot(v, truths[1], g))


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

    theirs = derivatives(eager, wide, v.to(wide.dtype), *g)
    truths = true_cross_entropy(x, v, g, target, smoothing)
    for our, their, truth in zip(run_cross_entropy(x, v, g, target, smoothing), theirs, truths, strict=True):
        assert_accurate(our, their.to(our.dtype), truth, size_of_dot(v, truths[2], g[0]))


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
    theirs = derivatives(lambda x: reference.gradient_norm(x, p, power), wide, v.to(wide.dtype), g)
    truths = true_gradient_norm(x, v, g, p, power)
    for our, their, truth in zip(run_gradient_norm(x, v, g, p, power), theirs, truths, strict=True):
        assert_accurate(our, their.to(our.dtype), truth, size_of_dot(v, truths[1], g))
