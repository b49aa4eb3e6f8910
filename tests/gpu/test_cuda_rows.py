"""All CUDA kernels: strides, which of them run and how often, the same bits, streams, more than 2³¹ elements."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cuda_cases import (
    DEVICE,
    DTYPES,
    check_cross_entropy,
    check_gradient_norm,
    check_logsumexp,
    native,
    random_column,
    random_rows,
    run_cross_entropy,
    run_gradient_norm,
    run_logsumexp,
    targets,
)
from kernel_cases import with_row_stride
from torch import Tensor

import rds_fast

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native_cuda")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(33, 10), (5, 70), (33, 1000), (3, 4096), (3, 20_000)], ids=str)
@pytest.mark.parametrize("kind", ["one tensor misaligned", "all misaligned", "expanded rows", "strided g"])
def test_strides(kind: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, v, g = random_rows(size, dtype, 1), random_rows(size, dtype, 2), random_column(size[0], dtype, 3)
    if kind == "one tensor misaligned":
        x = with_row_stride(x, 1, 4)
    elif kind == "all misaligned":
        x, v = with_row_stride(x, 3, 2), with_row_stride(v, 1, 1)
    elif kind == "expanded rows":
        x, v, g = x[:1].expand_as(x), v[:1].expand_as(v), g[:1].expand_as(g)
    else:
        g = torch.stack((g, g + 1), 1)[:, 0]
    check_logsumexp(x, v, g)
    for target in targets(x):
        check_cross_entropy(x, v, (g, g), target, 0.1)
    check_gradient_norm(x, v, g, 2.0, 1.0)


def test_no_rows() -> None:
    x, g = torch.zeros(0, 5, device=DEVICE), torch.zeros(0, device=DEVICE)
    target = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert [tuple(r.shape) for r in run_logsumexp(x, x, g)] == [(0,), (0, 5), (0,), (0, 5)]
    assert [tuple(r.shape) for r in run_cross_entropy(x, x, (g, g), target, 0.0)][:3] == [(0,), (0,), (0, 5)]
    assert [tuple(r.shape) for r in run_gradient_norm(x, x, g, 2.0, 1.0)] == [(0,), (0, 5), (0,), (0, 5)]


def launched(function: Callable[[], object]) -> list[str]:
    """The names of the kernels that a function launches."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memset", "Memcpy"))]


@pytest.mark.parametrize(
    ("size", "forward", "backward", "double_backward"),
    [
        ((4096, 10), ["small_rows"], ["small_rows"], ["small_rows"]),
        ((4096, 1000), ["reduce_rows"], ["map_rows"], ["reduce_map_held"]),
        ((512, 16_384), ["reduce_rows"], ["map_rows"], ["reduce_map_stashed"]),
        ((1, 1_000_000), ["reduce_rows", "finish_rows"], ["map_rows"], ["reduce_rows", "map_rows"]),
    ],
    ids=str,
)
def test_which_kernels_run(
    size: tuple[int, int], forward: list[str], backward: list[str], double_backward: list[str]
) -> None:
    x, v = random_rows(size, torch.float32, 1), random_rows(size, torch.float32, 2)
    g = random_column(size[0], torch.float32, 3)
    target = torch.zeros(size[0], dtype=torch.int64, device=DEVICE)
    lse, norm = native.logsumexp(x, False)[0], native.gradient_norm(x, 2.0, 1.0, False)[1]
    calls = [
        (forward, lambda: native.logsumexp(x, False)),
        (backward, lambda: native.logsumexp_backward(g, x, lse)),
        (double_backward, lambda: native.logsumexp_double_backward(v, g, x, lse)),
        (forward, lambda: native.cross_entropy(x, target, 0.1, -100, False)),
        (backward, lambda: native.cross_entropy_backward(g, g, x, target, lse, 0.1, -100)),
        (double_backward, lambda: native.cross_entropy_double_backward(v, g, g, x, target, lse, 0.1, -100)),
        (forward, lambda: native.gradient_norm(x, 2.0, 1.0, False)),
        (backward, lambda: native.gradient_norm_backward(g, x, norm, 2.0, 1.0)),
        (double_backward, lambda: native.gradient_norm_double_backward(v, g, x, norm, 2.0, 1.0)),
    ]
    for expected, call in calls:
        names = launched(call)
        assert len(names) == len(expected), names
        for name, part in zip(names, expected, strict=True):
            assert f"rds_fast::cuda::{part}" in name


def public_step(x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Forward, backward and double backward of the three public operations."""
    leaf = x.detach().requires_grad_()
    lse = rds_fast.logsumexp(leaf)
    cross_entropy, density = rds_fast.cross_entropy_with_logsumexp(leaf, target)
    (gradient,) = torch.autograd.grad(lse.sum() + (cross_entropy * density).sum(), leaf, create_graph=True)
    norm = rds_fast.gradient_norm(gradient)
    norm.sum().backward()
    return lse.detach(), cross_entropy.detach(), density.detach(), gradient.detach(), norm.detach(), leaf.grad


@pytest.mark.parametrize("size", [(64, 10), (64, 1000), (2, 100_003)], ids=str)
def test_public_operations_run_these_kernels(size: tuple[int, int]) -> None:
    x, target = random_rows(size, torch.float32, 1), torch.zeros(size[0], dtype=torch.int64, device=DEVICE)
    with rds_fast.use_backend("native"):
        ours = public_step(x, target)
        names = " ".join(launched(lambda: public_step(x, target)))
    for operation in ("LogSumExp", "CrossEntropy", "GradientNorm"):
        for suffix in ("<", "Backward<", "DoubleBackward<"):
            assert f"{operation}{suffix}" in names
    with rds_fast.use_backend("reference"):
        truths = public_step(x.double(), target)
    for our, truth in zip(ours, truths, strict=True):
        largest = truth.abs().max().item()
        torch.testing.assert_close(our.double(), truth, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("size", [(2051, 10), (64, 1000), (300, 16_411), (1, 1_000_003)], ids=str)
def test_the_same_bits_twice(size: tuple[int, int]) -> None:
    x, v, g = (
        random_rows(size, torch.float32, 1),
        random_rows(size, torch.float32, 2),
        random_column(size[0], torch.float32, 3),
    )
    target = next(targets(x))
    for _ in range(3):
        for run in (
            lambda: run_logsumexp(x, v, g),
            lambda: run_cross_entropy(x, v, (g, g), target, 0.1),
            lambda: run_gradient_norm(x, v, g, 1.5, 1.0),
        ):
            assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_runs_on_the_current_stream() -> None:
    x = random_rows((64, 1_000), torch.float32, 1)
    target = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    with rds_fast.use_backend("native"):
        expected = public_step(x, target)
        stream = torch.cuda.Stream()
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # kernels of another stream would read the zeros meanwhile
            late.copy_(x)
            ours = public_step(late, target)
        stream.synchronize()
    assert all(torch.equal(our, other) for our, other in zip(ours, expected, strict=True))


@pytest.mark.parametrize("size", [(64, 10), (64, 1000), (2, 100_003), (300, 16_411)], ids=str)
def test_no_synchronisation(size: tuple[int, int]) -> None:
    x, target = random_rows(size, torch.float32, 1), torch.zeros(size[0], dtype=torch.int64, device=DEVICE)
    with rds_fast.use_backend("native"):
        public_step(x, target)  # loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            public_step(x, target)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("size", [(2**21 + 5, 1030), (2**27 + 5, 17), (1, 2**31 + 72)], ids=str)
def test_more_elements_than_32_bits_count(size: tuple[int, int], dtype: torch.dtype) -> None:
    """x is 0 but for one element at the very end, so that the truth is a formula."""
    elements = size[0] * size[1]
    if torch.cuda.mem_get_info()[0] < 8 * elements + 2**31:
        pytest.skip("needs 8 bytes of free memory an element")
    last, high = size[0] - 1, 20.0 if size[0] > 1 else 25.0
    x = torch.zeros(size, dtype=dtype, device=DEVICE)
    x[last, -1] = high
    lse = native.logsumexp(x, True)[0]
    truth = math.log(math.exp(high) + size[1] - 1)
    torch.testing.assert_close(lse[last].item(), truth, rtol=1e-5, atol=0)
    g = torch.ones(1, dtype=torch.float32, device=DEVICE).expand(size[0])
    share = math.exp(high - truth)
    gx = native.logsumexp_backward(g, x, lse)
    torch.testing.assert_close(gx[last, -1].item(), share, rtol=1e-2, atol=0)
    del gx
    dg, dx = native.logsumexp_double_backward(x, g, x, lse)  # v = x: Σ v s = high · share
    torch.testing.assert_close(dg[last].item(), high * share, rtol=1e-4, atol=0)
    torch.testing.assert_close(dx[last, -1].item(), share * high * (1 - share), rtol=1e-2, atol=1e-4)
    del dx
    torch.testing.assert_close(native.gradient_norm(x, 2.0, 1.0, True)[0][last].item(), high, rtol=1e-5, atol=0)
    target = torch.full((size[0],), size[1] - 1, device=DEVICE)
    ce = native.cross_entropy(x, target, 0.0, -100, True)[0]
    torch.testing.assert_close(ce[last].item(), truth - high, rtol=1e-3, atol=1e-5)
