"""The CUDA kernels, torch.ops.rds_fast_native.* and the public operations on them, against the reference in float64.

The truth is autograd, twice, of ``rds_fast.reference`` in float64, on the same (rounded) inputs; "theirs" is the same
in the dtype itself. A sum that may cancel is judged by the size of its terms.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from criteria import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rds_fast
from rds_fast import backends, reference

pytestmark = pytest.mark.gpu
native = torch.ops.rds_fast_native

DEVICE = "cuda"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (
    (1, 1),  # one class: every second derivative is 0
    (3, 2),
    (101, 7),  # a tile of short rows that is not full
    (2051, 10),
    (97, 32),  # the longest row that one thread takes
    (9, 33),  # the shortest that a warp takes
    (5, 257),  # in 16-bit types: whole chunks and one element
    (33, 1000),
    (7, 4097),  # a block a row, in registers
    (5, 16_411),  # beyond the registers: few rows, so split over blocks
    (1, 262_144),
    (2, 150_528),  # 3 · 224 · 224
    (1, 1_000_003),
)
LONG_ROWS = ((300, 16_411), (150, 70_001))  # rows enough for a block each: kept in shared memory, whole and in part
NORMS = ((1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (1.5, 1.0), (3.0, 2.0), (math.inf, 1.0))


@pytest.fixture(autouse=True, scope="module")
def _native_cuda_is_there() -> Iterator[None]:
    assert backends.failure("native", DEVICE) is None, backends.failure("native", DEVICE)
    yield
    torch.cuda.empty_cache()


def random_rows(size: tuple[int, int], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(size[0] * 1_000_003 + size[1] + seed)
    return (torch.randn(size, generator=generator, device=DEVICE) * scale).to(dtype)


def random_column(rows: int, dtype: torch.dtype, seed: int) -> Tensor:
    return random_rows((rows, 1), dtype, seed)[:, 0].contiguous()


def derivatives(
    function: Callable[..., Tensor | tuple[Tensor, ...]], x: Tensor, v: Tensor, *g: Tensor
) -> tuple[Tensor, ...]:
    """The results, the gradient of x, and for v its cotangent the gradients of each of g and of x."""
    x = x.detach().requires_grad_()
    g = tuple(cotangent.detach().clone().requires_grad_() for cotangent in g)
    results = function(x)
    results = results if isinstance(results, tuple) else (results,)
    (gx,) = torch.autograd.grad(results, x, g, create_graph=True)
    second = torch.autograd.grad(gx, (*g, x), v, materialize_grads=True)
    return (*(result.detach() for result in results), gx.detach(), *second)


def run_logsumexp(x: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    result, saved = native.logsumexp(x, g.dtype != x.dtype)
    lse = saved[:, 0] if saved.shape[1] else result
    return result, native.logsumexp_backward(g, x, lse), *native.logsumexp_double_backward(v, g, x, lse)


def run_cross_entropy(
    x: Tensor, v: Tensor, g: tuple[Tensor, Tensor], target: Tensor, smoothing: float
) -> tuple[Tensor, ...]:
    ce, result, saved = native.cross_entropy(x, target, smoothing, -100, g[0].dtype != x.dtype)
    lse = saved[:, 0] if saved.shape[1] else result
    gx = native.cross_entropy_backward(*g, x, target, lse, smoothing, -100)
    return ce, result, gx, *native.cross_entropy_double_backward(v, *g, x, target, lse, smoothing, -100)


def run_gradient_norm(x: Tensor, v: Tensor, g: Tensor, p: float, power: float) -> tuple[Tensor, ...]:
    result, saved = native.gradient_norm(x, p, power, g.dtype != x.dtype)
    gx = native.gradient_norm_backward(g, x, saved, p, power)
    return result, gx, *native.gradient_norm_double_backward(v, g, x, saved, p, power)


def size_of_terms(kind: str, number: int, truths: tuple[Tensor, ...], v: Tensor, *g: Tensor) -> Tensor | None:
    """(N,) the size of the terms whose difference result ``number`` is, where that can be far below it, else None."""
    largest = torch.stack([cotangent.double().abs() for cotangent in g]).amax(0)
    largest_v = v.double().abs().amax(1)
    is_dx = number == len(truths) - 1
    if kind == "cross_entropy":
        # log Σ exp(f − m), where the sum rounds to 1; a s − g q'; a s (v − Σ v s).
        return {0: torch.full_like(largest, 2.0**-6), 2: largest, len(truths) - 1: largest * largest_v}.get(number)
    if kind == "logsumexp" and is_dx:  # g s (v − Σ v s)
        return (truths[1].abs().amax(1) * largest_v).nan_to_num(0.0, 0.0)
    if kind == "gradient_norm" and is_dx and v.shape[1] <= 3:  # in one dimension the norm has no curvature
        return largest * largest_v
    return None


def check(
    kind: str,
    ours: tuple[Tensor, ...],
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    x: Tensor,
    v: Tensor,
    *g: Tensor,
) -> None:
    """Compares (results, gx, gradients of g, dx)."""
    theirs = derivatives(function, x.to(g[0].dtype), v.to(g[0].dtype), *g)
    truths = derivatives(function, x.double(), v.double(), *(cotangent.double() for cotangent in g))
    for number, (our, their, truth) in enumerate(zip(ours, theirs, truths, strict=True)):
        scale = size_of_terms(kind, number, truths, v, *g)
        if len(g) < number <= 2 * len(g):  # Σ v ∂gx/∂g
            unit = [torch.full_like(one, i == number - len(g) - 1, dtype=torch.float64) for i, one in enumerate(g)]
            terms = derivatives(function, x.double(), v.double(), *unit)[len(g)] * v.double()
            scale = terms.abs().nan_to_num(0.0, 0.0).sum(1)
            if kind == "cross_entropy":  # where s − q' is itself a small difference
                scale = torch.maximum(scale, v.double().abs().amax(1))
        assert_accurate(our, their.to(our.dtype), truth, scale)


def check_logsumexp(x: Tensor, v: Tensor, g: Tensor) -> None:
    check("logsumexp", run_logsumexp(x, v, g), lambda x: reference.logsumexp(x, 1), x, v, g)


def check_cross_entropy(x: Tensor, v: Tensor, g: tuple[Tensor, Tensor], target: Tensor, smoothing: float) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return reference.cross_entropy_with_logsumexp(x, target, smoothing)

    check("cross_entropy", run_cross_entropy(x, v, g, target, smoothing), function, x, v, *g)


def check_gradient_norm(x: Tensor, v: Tensor, g: Tensor, p: float, power: float) -> None:
    check(
        "gradient_norm", run_gradient_norm(x, v, g, p, power), lambda x: reference.gradient_norm(x, p, power), x, v, g
    )


def targets(x: Tensor) -> Iterator[Tensor]:
    indices = torch.arange(x.shape[0], device=DEVICE) * 7919 % x.shape[1]
    indices[2::5] = -100
    yield indices
    probabilities = random_rows((x.shape[0], x.shape[1]), x.dtype, 5).float().softmax(1) * 0.9
    yield probabilities.to(x.dtype)
    if x.dtype in (torch.bfloat16, torch.float16):
        yield probabilities


# ---- values, by the shape of the rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, *LONG_ROWS], ids=str)
def test_logsumexp(size: tuple[int, int], dtype: torch.dtype) -> None:
    x, v, g = random_rows(size, dtype, 1, 3.0), random_rows(size, dtype, 2), random_column(size[0], dtype, 3)
    check_logsumexp(x, v, g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, *LONG_ROWS], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing: float, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, v = random_rows(size, dtype, 1, 3.0), random_rows(size, dtype, 2)
    g = random_column(size[0], dtype, 3), random_column(size[0], dtype, 4)
    for target in targets(x):
        check_cross_entropy(x, v, g, target, smoothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, *LONG_ROWS], ids=str)
@pytest.mark.parametrize(("p", "power"), NORMS)
def test_gradient_norm(p: float, power: float, size: tuple[int, int], dtype: torch.dtype) -> None:
    x = random_rows(size, dtype, 1, 0.3 / math.sqrt(size[1]))  # float16 must hold the norms of long rows
    v, g = random_rows(size, dtype, 2), random_column(size[0], dtype, 3)
    check_gradient_norm(x, v, g, p, power)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("size", [(101, 10), (33, 1000), (5, 16_411)], ids=str)
def test_full_precision(size: tuple[int, int], dtype: torch.dtype) -> None:
    x, v = random_rows(size, dtype, 1), random_rows(size, dtype, 2)
    g = random_column(size[0], torch.float32, 3)
    assert native.logsumexp(x, True)[0].dtype == torch.float32
    assert native.logsumexp(x, True)[1].shape == (size[0], 0)
    result, saved = native.logsumexp(x, False)
    assert (result.dtype, saved.dtype, tuple(saved.shape)) == (dtype, torch.float32, (size[0], 1))
    truth = torch.logsumexp(x.double(), 1)
    torch.testing.assert_close(saved[:, 0].double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(native.logsumexp(x, True)[0].double(), truth, rtol=1e-5, atol=1e-5)
    gx = native.logsumexp_backward(g, x, saved[:, 0])
    torch.testing.assert_close(gx, (g[:, None] * x.float().softmax(1)).to(dtype), rtol=2e-2, atol=1e-5)
    dg = native.logsumexp_double_backward(v, g, x, saved[:, 0])[0]
    assert dg.dtype == torch.float32
    torch.testing.assert_close(dg.double(), (v.double() * x.double().softmax(1)).sum(1), rtol=1e-4, atol=1e-5)


# ---- infinities, zeros, magnitudes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 10, 50, 1000, 20_000])
def test_logsumexp_infinities(columns: int, dtype: torch.dtype) -> None:
    x = random_rows((8, columns), dtype, 1)
    x[0] = -math.inf
    x[1, 1] = math.inf
    x[2, 0] = math.nan
    x[3, 1:] = -math.inf
    x[4, :-1] = -math.inf
    x[5, 0], x[5, 1] = math.inf, math.nan
    x[6, 0], x[6, 1] = math.inf, -math.inf
    check_logsumexp(x, random_rows((8, columns), dtype, 2), random_column(8, dtype, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [4, 50, 20_000])
def test_cross_entropy_infinities(columns: int, dtype: torch.dtype) -> None:
    x = random_rows((7, columns), dtype, 1)
    x[0] = -math.inf
    x[1, 1] = math.inf
    x[2, 0] = math.nan
    x[3, 2:] = -math.inf
    x[4, 0] = -math.inf
    x[5, 0] = math.inf
    target = torch.tensor([1, 1, 1, 1, 0, 1, -100], device=DEVICE)
    ce, lse, _ = native.cross_entropy(x, target, 0.0, -100, False)
    truth = torch.nn.functional.cross_entropy(x.double(), target, reduction="none")
    assert_accurate(ce, truth.to(dtype), truth)
    assert_accurate(lse, lse, torch.logsumexp(x.double(), 1))


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("columns", [10, 1000, 20_000])
def test_cross_entropy_of_large_logits_does_not_cancel(columns: int, offset: float) -> None:
    x = random_rows((6, columns), torch.float32, 1) + offset
    for target in targets(x):
        for smoothing in (0.0, 0.1):
            truth = reference.cross_entropy_with_logsumexp(x.double(), target, smoothing)[0]
            theirs = reference.cross_entropy_with_logsumexp(x, target, smoothing)[0]
            assert_accurate(native.cross_entropy(x, target, smoothing, -100, False)[0], theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 50, 20_000])
@pytest.mark.parametrize(("p", "power"), NORMS)
def test_gradient_norm_at_zeros(p: float, power: float, columns: int, dtype: torch.dtype) -> None:
    x = random_rows((4, columns), dtype, 1, 0.3)
    x[0] = 0
    x[1, ::2] = 0
    check_gradient_norm(x, random_rows((4, columns), dtype, 2), random_column(4, dtype, 3), p, power)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("columns", [2, 50, 20_000])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 50.0, math.inf])
def test_gradient_norm_neither_overflows_nor_underflows(p: float, columns: int, dtype: torch.dtype) -> None:
    exponent = 100 if dtype == torch.float32 else 1000
    x = random_rows((4, columns), dtype, 1).clamp(-2, 2)
    v, g = random_rows((4, columns), dtype, 2), random_column(4, dtype, 3)
    result, gx, *_ = run_gradient_norm(x, v, g, p, 1.0)
    for factor in (2.0**exponent, 2.0**-exponent):
        far_result, far_gx, far_dg, _ = run_gradient_norm(x * factor, v, g, p, 1.0)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(far_result / factor, result, rtol=tolerance, atol=0)
        torch.testing.assert_close(far_gx, gx, rtol=tolerance, atol=tolerance)
        assert far_dg.isfinite().all()


# ---- strides ---------------------------------------------------------------------------------------------------------


def with_row_stride(x: Tensor, before: int, after: int) -> Tensor:
    """The same values as a slice of wider rows, so that no row starts where it did."""
    wide = x.new_full((x.shape[0], before + x.shape[1] + after), math.nan)
    wide[:, before : before + x.shape[1]] = x
    return wide[:, before : before + x.shape[1]]


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


# ---- properties ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 3000), dtype=st.sampled_from(DTYPES))
def test_rows_of_softmax_sum_to_one(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = random_rows((rows, columns), dtype, 1, 4.0)
    lse = native.logsumexp(x, True)[0]
    sums = native.logsumexp_backward(torch.ones_like(lse), x, lse).double().sum(1)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-9}[dtype]
    assert (sums - 1).abs().max() <= rounding


# ---- which kernel, how many launches, the same bits, no synchronisation -------------------------------------------


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


def test_bad_index_stops_the_program() -> None:
    """In a process of its own, whose CUDA context it ends."""
    program = """
import torch
from rds_fast import backends
assert backends.failure("native", "cuda") is None
logits = torch.zeros(4, 10, device="cuda")
target = torch.tensor([0, 1, 10, 3], device="cuda")
torch.ops.rds_fast_native.cross_entropy(logits, target, 0.0, -100, False)
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    assert "assert" in str(error), error
    print("stopped")
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert "stopped" in process.stdout, process.stdout + process.stderr
    assert "the target is not a class index" in process.stdout + process.stderr


# ---- more than 2³¹ elements ------------------------------------------------------------------------------------------


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
