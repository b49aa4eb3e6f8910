"""All CUDA kernels, on a GPU and emulated: strides, which of them run and how often, the same bits, streams, size."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import cuda_emulation
import pytest
import torch
from cuda_cases import (
    DTYPES,
    MACHINES,
    PATHS,
    SHORT,
    SPLIT,
    STASHED,
    Machine,
    Size,
    check_cross_entropy,
    check_gradient_norm,
    check_logsumexp,
    held,
    random_column,
    random_rows,
    targets,
)
from cuda_emulation import H200
from kernel_cases import run_cross_entropy, run_gradient_norm, run_logsumexp, with_row_stride
from torch import Tensor

import rds_fast

native = torch.ops.rds_fast_native


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of what only a GPU has."""
    return pytest.mark.gpu(pytest.mark.usefixtures("native_cuda")(test))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(33, 10), (5, 70), (33, 1000), (3, 4096), (3, 20_000)], ids=str)
@pytest.mark.parametrize("kind", ["one tensor misaligned", "all misaligned", "expanded rows", "strided g"])
@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_strides(machine: Machine, kind: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    kernels, device = machine
    x, v = random_rows(device, size, dtype, 1), random_rows(device, size, dtype, 2)
    g = random_column(device, size[0], dtype, 3)
    if kind == "one tensor misaligned":
        x = with_row_stride(x, 1, 4)
    elif kind == "all misaligned":
        x, v = with_row_stride(x, 3, 2), with_row_stride(v, 1, 1)
    elif kind == "expanded rows":
        x, v, g = x[:1].expand_as(x), v[:1].expand_as(v), g[:1].expand_as(g)
    else:
        g = torch.stack((g, g + 1), 1)[:, 0]
    check_logsumexp(kernels, x, v, g)
    for target in targets(x):
        if kind == "all misaligned" and target.is_floating_point():
            target = with_row_stride(target, 2, 3)
        check_cross_entropy(kernels, x, v, (g, g), target, 0.1)
    check_gradient_norm(kernels, x, v, g, 2.0, 1.0)


@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_no_rows(machine: Machine) -> None:
    kernels, device = machine
    x, g = torch.zeros(0, 5, device=device), torch.zeros(0, device=device)
    target = torch.zeros(0, dtype=torch.int64, device=device)
    assert [tuple(r.shape) for r in run_logsumexp(kernels, x, x, g)] == [(0,), (0, 5), (0,), (0, 5)]
    assert [tuple(r.shape) for r in run_cross_entropy(kernels, x, x, (g, g), target, 0.0)][:3] == [(0,), (0,), (0, 5)]
    assert [tuple(r.shape) for r in run_gradient_norm(kernels, x, x, g, 2.0, 1.0)] == [(0,), (0, 5), (0,), (0, 5)]


def launched(function: Callable[[], object], device: str = "cuda") -> list[str]:
    """The names of the kernels that a function launches."""
    if device == "cpu":
        cuda_emulation.launches()
        function()
        return [launch.kernel for launch in cuda_emulation.launches()]
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memset", "Memcpy"))]


def calls(kernels: Any, size: tuple[int, int], dtype: torch.dtype, device: str) -> list[tuple[Callable[[], Any], ...]]:
    """Forward, backward and double backward of each operation."""
    x, v = random_rows(device, size, dtype, 1), random_rows(device, size, dtype, 2)
    g = random_column(device, size[0], dtype, 3)
    target = torch.zeros(size[0], dtype=torch.int64, device=device)
    lse, norm = kernels.logsumexp(x, True)[0], kernels.gradient_norm(x, 2.0, 1.0, True)[0].unsqueeze(1)
    return [
        (
            lambda: kernels.logsumexp(x, False),
            lambda: kernels.logsumexp_backward(g, x, lse),
            lambda: kernels.logsumexp_double_backward(v, g, x, lse),
        ),
        (
            lambda: kernels.cross_entropy(x, target, 0.1, -100, False),
            lambda: kernels.cross_entropy_backward(g, g, x, target, lse, 0.1, -100),
            lambda: kernels.cross_entropy_double_backward(v, g, g, x, target, lse, 0.1, -100),
        ),
        (
            lambda: kernels.gradient_norm(x, 2.0, 1.0, False),
            lambda: kernels.gradient_norm_backward(g, x, norm, 2.0, 1.0),
            lambda: kernels.gradient_norm_double_backward(v, g, x, norm, 2.0, 1.0),
        ),
    ]


@pytest.mark.parametrize(
    ("machine", "size", "expected"),
    [
        pytest.param(None, Size(4096, 10), SHORT, marks=pytest.mark.gpu, id="gpu-short"),
        pytest.param(None, Size(4096, 1000), held(32, 32, 32, 8), marks=pytest.mark.gpu, id="gpu-in registers"),
        pytest.param(None, Size(16_384, 500), held(8, 32, 32, 4), marks=pytest.mark.gpu, id="gpu-several a warp"),
        pytest.param(None, Size(512, 16_384), STASHED, marks=pytest.mark.gpu, id="gpu-in shared memory"),
        pytest.param(None, Size(1, 1_000_000), SPLIT, marks=pytest.mark.gpu, id="gpu-split"),
        *(pytest.param(*path, id=f"emulated-{name}") for name, path in PATHS.items()),
    ],
    indirect=["machine"],
)
def test_which_kernels_run(machine: Machine, size: Size, expected: tuple[str, ...]) -> None:
    for dtype in DTYPES if machine.device == "cpu" else (torch.float32,):
        for operation in calls(machine.kernels, size.of(dtype), dtype, machine.device):
            names = [name for call in operation for name in launched(call, machine.device)]
            assert len(names) == len(expected), names
            for name, pattern in zip(names, expected, strict=True):
                assert re.search(f"(^|rds_fast::cuda::){pattern}", name), name


def public_step(x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Forward, backward and double backward of the three public operations."""
    leaf = x.detach().requires_grad_()
    lse = rds_fast.logsumexp(leaf)
    cross_entropy, density = rds_fast.cross_entropy_with_logsumexp(leaf, target)
    (gradient,) = torch.autograd.grad(lse.sum() + (cross_entropy * density).sum(), leaf, create_graph=True)
    norm = rds_fast.gradient_norm(gradient)
    norm.sum().backward()
    return lse.detach(), cross_entropy.detach(), density.detach(), gradient.detach(), norm.detach(), leaf.grad


@on_gpu
@pytest.mark.parametrize("size", [(64, 10), (64, 1000), (2, 100_003)], ids=str)
def test_public_operations_run_these_kernels(size: tuple[int, int]) -> None:
    x, target = random_rows("cuda", size, torch.float32, 1), torch.zeros(size[0], dtype=torch.int64, device="cuda")
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


def results(kernels: Any, device: str, size: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Of all operations, every kind of target and of norm."""
    x, v = random_rows(device, size, dtype, 1), random_rows(device, size, dtype, 2)
    g = random_column(device, size[0], dtype, 3)
    found = list(run_logsumexp(kernels, x, v, g))
    for target in targets(x):
        found += run_cross_entropy(kernels, x, v, (g, g), target, 0.1)
    for p in (1.0, 1.5, 2.0, math.inf):
        found += run_gradient_norm(kernels, x, v, g, p, 1.0)
    return found


@on_gpu
@pytest.mark.parametrize("size", [(2051, 10), (64, 1000), (300, 16_411), (1, 1_000_003)], ids=str)
def test_the_same_bits_twice(size: tuple[int, int]) -> None:
    first = results(native, "cuda", size, torch.float32)
    for _ in range(5):
        again = results(native, "cuda", size, torch.float32)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_in_every_order(path: str, dtype: torch.dtype) -> None:
    """Whatever thread, warp and block comes first, and however many rows a block has: no race, no order in a sum."""
    device, size, _ = PATHS[path]
    outcomes = []
    for schedule in range(5):
        grid = device.largest_grid if schedule > 0 else H200.largest_grid
        with cuda_emulation.emulated(device._replace(schedule=schedule, largest_grid=grid)) as kernels:
            outcomes.append(results(kernels, "cpu", size.of(dtype), dtype))
    for others in outcomes[1:]:
        assert all(torch.equal(*pair) for pair in zip(outcomes[0], others, strict=True))


@on_gpu
def test_runs_on_the_current_stream() -> None:
    x = random_rows("cuda", (64, 1_000), torch.float32, 1)
    target = torch.zeros(64, dtype=torch.int64, device="cuda")
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


@on_gpu
@pytest.mark.parametrize("size", [(64, 10), (64, 1000), (2, 100_003), (300, 16_411)], ids=str)
def test_no_synchronisation(size: tuple[int, int]) -> None:
    x, target = random_rows("cuda", size, torch.float32, 1), torch.zeros(size[0], dtype=torch.int64, device="cuda")
    with rds_fast.use_backend("native"):
        public_step(x, target)  # loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            public_step(x, target)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("size", [(2**21 + 5, 1030), (2**27 + 5, 17), (1, 2**31 + 72)], ids=str)
def test_more_elements_than_32_bits_count(size: tuple[int, int], dtype: torch.dtype) -> None:
    """x is 0 but for one element at the very end, so that the truth is a formula."""
    elements = size[0] * size[1]
    if torch.cuda.mem_get_info()[0] < 8 * elements + 2**31:
        pytest.skip("needs 8 bytes of free memory an element")
    last, high = size[0] - 1, 20.0 if size[0] > 1 else 25.0
    x = torch.zeros(size, dtype=dtype, device="cuda")
    x[last, -1] = high
    lse = native.logsumexp(x, True)[0]
    truth = math.log(math.exp(high) + size[1] - 1)
    torch.testing.assert_close(lse[last].item(), truth, rtol=1e-5, atol=0)
    g = torch.ones(1, dtype=torch.float32, device="cuda").expand(size[0])
    share = math.exp(high - truth)
    gx = native.logsumexp_backward(g, x, lse)
    torch.testing.assert_close(gx[last, -1].item(), share, rtol=1e-2, atol=0)
    del gx
    dg, dx = native.logsumexp_double_backward(x, g, x, lse)  # v = x: Σ v s = high · share
    torch.testing.assert_close(dg[last].item(), high * share, rtol=1e-4, atol=0)
    torch.testing.assert_close(dx[last, -1].item(), share * high * (1 - share), rtol=1e-2, atol=1e-4)
    del dx
    torch.testing.assert_close(native.gradient_norm(x, 2.0, 1.0, True)[0][last].item(), high, rtol=1e-5, atol=0)
    target = torch.full((size[0],), size[1] - 1, device="cuda")
    ce = native.cross_entropy(x, target, 0.0, -100, True)[0]
    torch.testing.assert_close(ce[last].item(), truth - high, rtol=1e-3, atol=1e-5)
