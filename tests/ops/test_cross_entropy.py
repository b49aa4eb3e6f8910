"""``rds_fast.cross_entropy_with_logsumexp``: both results and both derivatives against plain PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import rds_fast
from tests.criteria import assert_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [
    (1, 1),  # one class: cross-entropy 0
    (257, 10),  # many short rows
    (33, 1000),  # ImageNet's classes
    (3, 32_771),  # a vocabulary; a prime
]


def targets(kind: str, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    if kind == "indices":
        target = torch.randint(size[1], size[:1], generator=generator)
        target[::5] = -100
        return target
    return torch.rand(size, generator=generator).softmax(1).float()


def plain(f: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    if target.is_floating_point():
        target = target.to(f.dtype)
    ce = cross_entropy(f, target, reduction="none", label_smoothing=label_smoothing)
    return ce, torch.logsumexp(f, 1)


def derivatives(function, f: Tensor, g_ce: Tensor, g_lse: Tensor, v: Tensor) -> list[Tensor]:
    f, g_ce, g_lse = (t.detach().requires_grad_() for t in (f, g_ce, g_lse))
    results = function(f)
    (gx,) = torch.autograd.grad(results, f, (g_ce, g_lse), create_graph=True)
    double = torch.autograd.grad(gx, (f, g_ce, g_lse), v)
    return [t.detach() for t in (*results, gx, *double)]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_accurate_as_torch_at_every_order(
    fused_backend: str, size: tuple[int, int], dtype: torch.dtype, kind: str, label_smoothing: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    f, v = ((torch.randn(size, generator=generator) * 3).to(dtype) for _ in range(2))
    g_ce, g_lse = (torch.randn(size[0], generator=generator).to(dtype) for _ in range(2))
    target = targets(kind, size, generator)
    ours = derivatives(
        lambda t: rds_fast.cross_entropy_with_logsumexp(t, target, label_smoothing=label_smoothing), f, g_ce, g_lse, v
    )
    theirs = derivatives(lambda t: plain(t, target, label_smoothing), f, g_ce, g_lse, v)
    wide = [t.double() for t in (f, g_ce, g_lse, v)]
    truth = derivatives(lambda t: plain(t, target, label_smoothing), *wide)
    # The sizes of the terms: l − f, a s − g q', Q S − T, and a s (v − S), where a = g_ce + g_lse may cancel.
    wide_f, wide_g_ce, wide_g_lse, wide_v = wide
    s = wide_f.softmax(1)
    logits_size = wide_f.abs().amax(1)
    g_size = wide_g_ce.abs() + wide_g_lse.abs()
    v_size = wide_v.abs().amax(1)
    double_size = g_size * (s * (wide_v.abs() + (wide_v.abs() * s).sum(1, keepdim=True))).amax(1)
    scales = (logits_size, logits_size, g_size, double_size, v_size, v_size)
    for our, their, true, scale in zip(ours, theirs, truth, scales, strict=True):
        assert_accurate(our, their, true, scale)


@pytest.mark.parametrize("used", ["cross_entropy", "logsumexp", "both"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_gradcheck(backend: str, kind: str, used: str) -> None:
    f = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    target = targets(kind, (6, 5), torch.Generator().manual_seed(1))
    target = target.double() if target.is_floating_point() else target

    def function(f: Tensor):
        ce, lse = rds_fast.cross_entropy_with_logsumexp(f, target, label_smoothing=0.05)
        return {"cross_entropy": ce, "logsumexp": lse, "both": (ce, lse)}[used]

    assert torch.autograd.gradcheck(function, f)
    assert torch.autograd.gradgradcheck(function, f)


def test_one_fused_backward_when_both_are_used(fused_backend: str) -> None:
    f = torch.randn(6, 5, requires_grad=True)
    target = torch.arange(5).repeat(2)[:6]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ce, lse = rds_fast.cross_entropy_with_logsumexp(f, target)
        (ce.sum() + lse.sum()).backward()
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("rds_fast::")}
    assert counts == {"rds_fast::cross_entropy": 1, "rds_fast::cross_entropy_backward": 1}


def test_masked_logits(backend: str) -> None:
    f = torch.tensor([[1.0, -math.inf, 2.0], [-math.inf, 0.5, 0.25]], requires_grad=True)
    target = torch.tensor([0, 1])
    ce, _ = rds_fast.cross_entropy_with_logsumexp(f, target)
    torch.testing.assert_close(ce, cross_entropy(f, target, reduction="none"))
    (gx,) = torch.autograd.grad(ce.sum(), f)
    (expected,) = torch.autograd.grad(cross_entropy(f, target, reduction="sum"), f)
    torch.testing.assert_close(gx, expected)


@pytest.mark.parametrize(
    "row",
    [
        [math.inf, 1.0, 2.0],
        [1.0, math.inf, 2.0],
        [-math.inf, -math.inf, -math.inf],
        [-math.inf, 1.0, 2.0],
        [math.nan, 1.0, 2.0],
    ],
    ids=str,
)
@pytest.mark.parametrize("columns", [3, 40], ids=["short row", "several vectors"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_infinities_and_nan_as_torch(backend: str, row: list[float], columns: int, label_smoothing: float) -> None:
    f = torch.tensor([row + [0.5] * (columns - 3)], requires_grad=True)
    target = torch.tensor([0])
    ce, lse = rds_fast.cross_entropy_with_logsumexp(f, target, label_smoothing=label_smoothing)
    expected, expected_lse = plain(f, target, label_smoothing)
    torch.testing.assert_close(ce, expected, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)


def test_ignored_rows(backend: str) -> None:
    f = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([0, 7, 2, 7])
    ce, lse = rds_fast.cross_entropy_with_logsumexp(f, target, ignore_index=7)
    assert ce[[1, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(lse, torch.logsumexp(f, 1))
    (gx,) = torch.autograd.grad(ce.sum(), f)
    assert not gx[[1, 3]].any()
    assert gx[[0, 2]].any()


def test_probabilities_that_need_a_gradient_get_it(backend: str) -> None:
    f = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    q = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda f, q: rds_fast.cross_entropy_with_logsumexp(f, q)[0], (f, q))
    ours = torch.func.grad(lambda q: rds_fast.cross_entropy_with_logsumexp(f.detach(), q)[0].sum())(q.detach())
    (expected,) = torch.autograd.grad(cross_entropy(f, q, reduction="sum"), q)
    torch.testing.assert_close(ours, expected)


def test_empty_batch(backend: str) -> None:
    ce, lse = rds_fast.cross_entropy_with_logsumexp(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    assert ce.shape == lse.shape == (0,)


LOGITS = torch.zeros(4, 3)
INDICES = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "message"),
    [
        ([[1.0]], INDICES, {}, TypeError, "logits is a list"),
        (LOGITS, [0] * 4, {}, TypeError, "target is a list"),
        (LOGITS.long(), INDICES, {}, TypeError, "logits is torch.int64; .* needs a floating-point tensor"),
        (LOGITS, INDICES.int(), {}, TypeError, r"target is torch.int32.*target.long\(\)"),
        (LOGITS[0], INDICES, {}, ValueError, r"logits have shape \(3,\); they must be \(N, C\)"),
        (LOGITS, INDICES[:3], {}, ValueError, r"must have shape \(4,\)"),
        (LOGITS, torch.zeros(4, 2), {}, ValueError, r"must have shape \(4, 3\)"),
        (LOGITS, INDICES, {"label_smoothing": 1.5}, ValueError, r"label_smoothing is 1.5; it must be in \[0, 1\]"),
        (LOGITS, INDICES + 3, {}, IndexError, r"target\[0\] is 3; class indices must be in \[0, 3\)"),
        (LOGITS, INDICES - 1, {}, IndexError, r"target\[0\] is -1"),
    ],
)
def test_bad_input(logits, target, options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rds_fast.cross_entropy_with_logsumexp(logits, target, **options)
