"""What an operation allocates: the forward its result alone, the double backward its two results alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import rds_fast

N, C = 64, 5000


def allocated_bytes(function: Callable[[], object]) -> int:
    """The sum of all allocations while ``function`` runs, those freed again included."""
    function()  # what is allocated once (threads, tables) is not the operation's
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = function()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    return sum(size for size in sizes if size > 0)


def aligned(*sizes: int) -> int:
    """The allocator rounds each allocation up to 64 bytes."""
    return sum(-(-size // 64) * 64 for size in sizes)


def test_the_measure_sees_temporaries() -> None:
    x = torch.randn(N, C)
    assert allocated_bytes(lambda: (x + 1).sum()) >= 4 * N * C


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logsumexp(fused_backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(N, C, dtype=dtype, requires_grad=True)
    g = torch.ones(N, dtype=dtype, requires_grad=True)
    size = dtype.itemsize
    saved = 0 if dtype == torch.float32 else 4 * N  # a 16-bit result keeps its float32 log-sum-exp beside it
    result = rds_fast.logsumexp(x, 1)
    assert allocated_bytes(lambda: rds_fast.logsumexp(x, 1)) == aligned(size * N, saved)
    (gx,) = torch.autograd.grad(result, x, g, create_graph=True)
    v = torch.randn_like(gx)
    double = allocated_bytes(lambda: torch.autograd.grad(gx, (g, x), v, retain_graph=True))
    assert double == aligned(size * N, size * N * C)


def test_cross_entropy(fused_backend: str) -> None:
    f = torch.randn(N, C, requires_grad=True)
    target = torch.randint(C, (N,))
    g_ce, g_lse = torch.ones(N, requires_grad=True), torch.ones(N, requires_grad=True)
    ce, lse = rds_fast.cross_entropy_with_logsumexp(f, target)
    (gx,) = torch.autograd.grad((ce, lse), f, (g_ce, g_lse), create_graph=True)
    v = torch.randn_like(gx)
    double = allocated_bytes(lambda: torch.autograd.grad(gx, (g_ce, g_lse, f), v, retain_graph=True))
    assert double == aligned(4 * N, 4 * N, 4 * N * C)


def test_gradient_norm(fused_backend: str) -> None:
    x = torch.randn(N, C, requires_grad=True)
    g = torch.ones(N, requires_grad=True)
    assert allocated_bytes(lambda: rds_fast.gradient_norm(x)) == aligned(4 * N, 0)
    norm = rds_fast.gradient_norm(x)
    (gx,) = torch.autograd.grad(norm, x, g, create_graph=True)
    v = torch.randn_like(gx)
    double = allocated_bytes(lambda: torch.autograd.grad(gx, (g, x), v, retain_graph=True))
    assert double == aligned(4 * N, 4 * N * C)
