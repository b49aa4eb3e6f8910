"""The Triton kernels in Triton's interpreter, on CPU tensors, against float64.

Run by ``test_interpreter.py`` in a process of its own: the interpreter takes the compiler's place for a whole process.
It computes with numpy, and differs from a GPU in one thing that matters here: it rounds to bfloat16 towards zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import rds_fast
from rds_fast import reference
from rds_fast.kernels import cross_entropy, gradient_norm, logsumexp, rows
from rds_fast.ops import registration
from tests.criteria import RELATIVE_TOLERANCE
from tests.kernel_cases import (
    ROW_FUNCTIONS,
    UNUSUAL_WAYS,
    derivatives,
    run_cross_entropy,
    run_gradient_norm,
    run_logsumexp,
)

# The layer's operations under their names, as torch.ops holds those of another.
TRITON = SimpleNamespace(**vars(logsumexp) | vars(cross_entropy) | vars(gradient_norm))

INF, NAN = math.inf, math.nan
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place at a power of two, which is all that may go wrong where PyTorch's own result overflows;
# for bfloat16 a whole unit, for rounding towards zero.
TOLERANCE = RELATIVE_TOLERANCE | {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}

# (N, C), and the programs that long rows are spread over: with 1, a program reduces a row alone, as for many rows.
ONE_CLASS = (1, 1, 512)
SMALLEST_TILE = (300, 3, 512)  # 256 rows a program: a second program with rows outside the mask
MANY_ROWS_A_PROGRAM = (70, 10, 512)  # 64
ODD = (3, 33, 512)  # 31 columns outside the mask; no vector load divides it
ONE_ROW_A_PROGRAM = (2, 1000, 512)
SPLIT_ROWS = (2, 16_389, 512)  # longer than a block: split over programs, merged by a second launch
LONG_ROWS = (2, 16_389, 1)
SIZES = [ONE_CLASS, SMALLEST_TILE, MANY_ROWS_A_PROGRAM, ODD, ONE_ROW_A_PROGRAM, SPLIT_ROWS, LONG_ROWS]
# The same three kinds of code for float64 rows of special values, whose number a test chooses.
KINDS = pytest.mark.parametrize(
    ("C", "programs"), [(5, 512), (9000, 512), (9000, 1)], ids=["whole row", "split row", "long row"]
)
GRADIENT_NORMS = [(p, power) for p in (1.0, 1.5, 2.0, 3.0, INF) for power in (1.0, 2.0)] + [(2.0, 0.5), (1.5, 3.0)]


@pytest.fixture(autouse=True)
def spread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spreads long rows over the number of programs that the test's size or its argument ``programs`` names."""
    arguments = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "size" in arguments or "programs" in arguments:
        monkeypatch.setattr(rows, "_PROGRAMS", arguments["size"][2] if "size" in arguments else arguments["programs"])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Runs the public operations on Triton, and counts the launchers that they reach."""
    counter: Counter[str] = Counter()

    def counted(name: str, launcher: Callable) -> Callable:
        def launch(*arguments: object) -> object:
            counter[name] += 1
            return launcher(*arguments)

        return launch

    for module in (logsumexp, cross_entropy, gradient_norm):
        family = module.__name__.rpartition(".")[2]
        for name in (family, f"{family}_backward", f"{family}_double_backward"):
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    registration._kernel.cache_clear()
    with rds_fast.use_backend("triton"):
        yield counter
    registration._kernel.cache_clear()


def inputs(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, v (N, C) and two cotangents (N,)."""
    N, C = size[:2]
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(N, C, generator=generator, dtype=torch.float64) for _ in range(2))
    g, h = (torch.randn(N, generator=generator, dtype=torch.float64) for _ in range(2))
    return (3 * x).to(dtype), v.to(dtype), g.to(dtype), h.to(dtype)


def assert_accurate(ours: Tensor, theirs: Tensor, truth: Tensor, scale: Tensor | None = None) -> None:
    """The criterion of tests/criteria.py; ``scale``: of a sum of terms of both signs, the size of a row's terms."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == truth.shape
    row = truth.abs().reshape(truth.shape[0], -1).amax(1)
    scale = (row if scale is None else torch.maximum(row, scale)).reshape(-1, *[1] * (truth.dim() - 1))
    error, their_error = (ours.double() - truth).abs(), (theirs.double() - truth).abs().nan_to_num()
    subnormal = torch.finfo(ours.dtype).tiny * torch.finfo(ours.dtype).eps
    excess = (error - their_error - TOLERANCE[ours.dtype] * scale - subnormal).max()
    assert excess <= 0, f"exceeds the allowed error by {excess:.3e}; worst error {error.max():.3e}"


@pytest.mark.parametrize("way", UNUSUAL_WAYS)
@pytest.mark.parametrize("name", ROW_FUNCTIONS)
def test_tensors_that_are_more_than_memory(name: str, way: str, ran: Counter[str]) -> None:
    gradient = UNUSUAL_WAYS[way](ROW_FUNCTIONS[name])
    assert ran[f"{name}_backward"]
    with rds_fast.use_backend("reference"):
        torch.testing.assert_close(gradient, UNUSUAL_WAYS[way](ROW_FUNCTIONS[name]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logsumexp(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, v, g, _ = inputs(size, dtype)
    ours = run_logsumexp(TRITON, x, v, g)
    theirs = derivatives(lambda x: torch.logsumexp(x, 1), x, v, g)
    truth = derivatives(lambda x: torch.logsumexp(x, 1), x.double(), v.double(), g.double())
    terms = (v.double() * x.double().softmax(1)).abs().sum(1)
    largest = x.double().abs().amax(1)  # l is the largest value and a logarithm, which may cancel
    scales = (largest, None, terms, g.double().abs() * terms)
    for our, their, true, scale in zip(ours, theirs, truth, scales, strict=True):
        assert_accurate(our, their, true, scale)


@KINDS
def test_logsumexp_of_infinities(C: int, programs: int) -> None:
    x = torch.randn(6, C, dtype=torch.float64)
    x[0] = -INF  # l = -inf, s NaN
    x[1, 2], x[1, -1] = INF, -INF  # l = inf, s NaN at the infinity and 0 elsewhere
    x[2, 1] = NAN
    x[3, :-1] = -INF  # masked but for one
    x[4, 0] = -INF
    x[5] *= 1e300  # neither overflows nor loses the largest
    _, v, g, _ = inputs(x.shape, torch.float64)
    truth = derivatives(lambda x: torch.logsumexp(x, 1), x, v, g)
    for our, true in zip(run_logsumexp(TRITON, x, v, g), truth, strict=True):
        torch.testing.assert_close(our, true, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_row_strides_and_expanded_cotangents() -> None:
    """Rows with a gap between them, one row expanded to many, and the cotangent that a sum sends back."""
    wide = torch.randn(7, 24, dtype=torch.float64)
    g = torch.ones((), dtype=torch.float64).expand(7)
    for x in (wide[:, 3:13], wide[0, :10].expand(7, 10), wide[::2].repeat(2, 1)[:7, :1].as_strided((7, 1), (24, 5))):
        v = torch.randn(7, 12, dtype=torch.float64)[:, : x.shape[1]]
        for our, true in zip(
            run_logsumexp(TRITON, x, v, g), derivatives(lambda x: torch.logsumexp(x, 1), x, v, g), strict=True
        ):
            torch.testing.assert_close(our, true, rtol=1e-12, atol=1e-14)


def plain_cross_entropy(f: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    target = target.to(f.dtype) if target.is_floating_point() else target
    ce = torch.nn.functional.cross_entropy(f, target, reduction="none", label_smoothing=label_smoothing)
    return ce, torch.logsumexp(f, 1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [ONE_CLASS, MANY_ROWS_A_PROGRAM, ODD, SPLIT_ROWS, LONG_ROWS], ids=str)
def test_cross_entropy(size: tuple[int, int, int], dtype: torch.dtype, kind: str, label_smoothing: float) -> None:
    f, v, g, h = inputs(size, dtype)
    target = torch.arange(size[0]) % size[1]
    target[1::3] = -100
    if kind == "probabilities":  # they need not sum to 1, and come in the accumulation dtype
        target = torch.rand(size[:2], dtype=reference.accumulation_dtype(dtype)) / size[1]
    ours = run_cross_entropy(TRITON, f, v, (g, h), target, label_smoothing)
    theirs = derivatives(lambda f: plain_cross_entropy(f, target, label_smoothing), f, v, g, h)
    truth = derivatives(lambda f: plain_cross_entropy(f, target, label_smoothing), *(t.double() for t in (f, v, g, h)))
    terms = v.double().abs().amax(1)  # dg_ce and dg_lse are sums of terms of both signs
    largest = f.double().abs().amax(1)  # l is the largest logit and a logarithm, which may cancel
    scales = (None, largest, None, terms, terms, None)
    for our, their, true, scale in zip(ours, theirs, truth, scales, strict=True):
        assert_accurate(our, their, true, scale)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@KINDS
def test_cross_entropy_of_masked_logits(C: int, programs: int, label_smoothing: float) -> None:
    """Infinite logits, at the target and beside it, and an ignored row of them, as PyTorch."""
    f = torch.randn(6, C, dtype=torch.float64)
    f[:, 1], f[3, 1], f[5] = -INF, INF, -INF
    _, v, g, h = inputs((6, C), torch.float64)
    for target in (torch.tensor([0, 1, -100, 0, 1, 2]), torch.rand(6, C, dtype=torch.float64).softmax(1)):
        ce, lse, gx, *_ = run_cross_entropy(TRITON, f, v, (g, h), target, label_smoothing)
        true_ce, true_lse = plain_cross_entropy(f, target, label_smoothing)
        torch.testing.assert_close(ce, true_ce, equal_nan=True)
        torch.testing.assert_close(lse, true_lse, equal_nan=True)
        s = (f - lse[:, None]).exp()
        assert torch.equal(gx.isnan(), s.isnan())


def test_cross_entropy_of_large_logits_keeps_its_digits() -> None:
    """l − f is a difference of numbers near 1e4, each rounded to 5e-4 in float32; forming l first would show."""
    f = torch.tensor([[10_000.0, 9_999.5, 9_998.25]])
    ce, *_ = cross_entropy.cross_entropy(f, torch.tensor([1]), 0.0, -100, False)
    torch.testing.assert_close(
        ce.double(), plain_cross_entropy(f.double(), torch.tensor([1]), 0.0)[0], rtol=1e-6, atol=0
    )


@KINDS
def test_index_out_of_range_is_nan(C: int, programs: int) -> None:
    f, v, g, h = inputs((4, C), torch.float64)
    target = torch.tensor([0, C, -1, 2**40])
    ce, lse, gx, dg_ce, dg_lse, dx = run_cross_entropy(TRITON, f, v, (g, h), target, 0.1)
    for result in (ce, gx[:, 0], gx[:, -1], dg_ce, dx[:, 0], dx[:, -1]):
        assert result.isnan().tolist() == [False, True, True, True]
    assert lse.isfinite().all()
    assert dg_lse.isfinite().all()


def plain_gradient_norm(p: float, power: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.linalg.vector_norm(x, p, dim=1) ** power


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)  # float16 differs in loads and stores alone, tested above
@pytest.mark.parametrize(("p", "power"), GRADIENT_NORMS)
@pytest.mark.parametrize("size", [ONE_CLASS, SMALLEST_TILE, ODD, SPLIT_ROWS, LONG_ROWS], ids=str)
def test_gradient_norm(size: tuple[int, int, int], p: float, power: float, dtype: torch.dtype) -> None:
    x, v, g, _ = inputs(size, torch.float64)
    x = (x.sign() * (0.25 + x.abs() / 8)).to(dtype)  # away from 0, where PyTorch's second derivative overflows
    v, g = v.to(dtype), g.to(dtype)
    ours = run_gradient_norm(TRITON, x, v, g, p, power)
    theirs = derivatives(plain_gradient_norm(p, power), x, v, g)
    truth = derivatives(lambda x: reference.gradient_norm(x, p, power), x.double(), v.double(), g.double())
    terms = (truth[1] / g.double()[:, None] * v.double()).abs().sum(1)
    # dx is a difference of two terms, which cancel altogether for D = 1 and power 1: their size is that of w v / n
    norm = torch.linalg.vector_norm(x.double(), p, dim=1)
    difference = (truth[1] * (v.double() / x.double())).abs().amax(1) + (truth[1].abs().amax(1) * terms / norm**power)
    for our, their, true, scale in zip(ours, theirs, truth, (None, None, terms, difference), strict=True):
        assert_accurate(our, their, true, scale)


@pytest.mark.parametrize(("p", "power"), [*GRADIENT_NORMS, (3.0, 0.5), (1.0, 0.5), (INF, 0.5)])
@KINDS
def test_zero_rows_and_coordinates(C: int, programs: int, p: float, power: float) -> None:
    x, v, g, _ = inputs((3, C), torch.float64)
    x[0] = 0
    x[1, ::2] = 0
    x[2, 1] = x[2, 3] = -x[2].abs().max()  # ties
    ours = run_gradient_norm(TRITON, x, v, g, p, power)
    truth = derivatives(lambda x: reference.gradient_norm(x, p, power), x, v, g)
    for our, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(our, true, rtol=1e-11, atol=1e-12)
    assert torch.equal(ours[3][0], 2 * g[0] * v[0] if p == power == 2 else torch.zeros_like(v[0]))


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, INF])
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42], ids=["large", "small", "subnormal"])
@pytest.mark.parametrize("D", [3, 16_389], ids=["whole row", "split row"])
def test_norms_neither_overflow_nor_underflow(D: int, scale: float, p: float) -> None:
    x = torch.zeros(2, D)
    x[:, :3] = torch.tensor([[3.0, -4.0, 0.0], [1.0, 1.0, 1.0]]) * scale
    x[:, -1] = -scale
    result, saved = gradient_norm.gradient_norm(x, p, 1.0, False)
    saved = saved if p == INF else result.unsqueeze(1)
    torch.testing.assert_close(result.double(), torch.linalg.vector_norm(x.double(), p, dim=1), rtol=1e-5, atol=2e-45)
    u = gradient_norm.gradient_norm_backward(torch.ones(2), x, saved, p, 1.0)
    torch.testing.assert_close((u.double() * x.double()).sum(1), result.double(), rtol=5e-3, atol=0)  # Euler's identity
    dg, dx = gradient_norm.gradient_norm_double_backward(u, torch.ones(2), x, saved, p, 1.0)
    assert dg.isfinite().all()
    assert dx.isfinite().all() or scale < 1e-38  # 1/n is not representable


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, INF])
@KINDS
def test_norms_of_infinities_and_nan(C: int, programs: int, p: float) -> None:
    x = torch.ones(4, C, dtype=torch.float64)
    x[0, 1], x[1, 0], x[2, 0], x[3, 0], x[3, -1] = INF, -INF, NAN, NAN, INF
    result, _ = gradient_norm.gradient_norm(x, p, 1.0, False)
    torch.testing.assert_close(result, torch.linalg.vector_norm(x, p, dim=1), equal_nan=True)


def test_full_precision_results() -> None:
    """Under autocast a 16-bit input gives a float32 result, which is itself what the backwards need."""
    x = torch.randn(3, 10).bfloat16()
    result, saved = logsumexp.logsumexp(x, True)
    torch.testing.assert_close(result, torch.logsumexp(x.float(), 1))
    ce, lse, also_saved = cross_entropy.cross_entropy(x, torch.tensor([0, 1, 2]), 0.0, -100, True)
    torch.testing.assert_close(lse, result)
    assert saved.shape == also_saved.shape == (3, 0)
    assert ce.dtype == gradient_norm.gradient_norm(x, 2.0, 1.0, True)[0].dtype == torch.float32


def test_no_rows() -> None:
    x, row = torch.empty(0, 5), torch.empty(0)
    assert run_logsumexp(TRITON, x, x, row)[3].shape == (0, 5)
    assert run_cross_entropy(TRITON, x, x, (row, row), torch.empty(0, dtype=torch.int64), 0.0)[5].shape == (0, 5)
    assert run_gradient_norm(TRITON, x, x, row, 2.0, 1.0)[3].shape == (0, 5)


def assert_differentiable_twice(function: Callable, x: Tensor) -> None:
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_public_logsumexp(ran: Counter[str]) -> None:
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert_differentiable_twice(lambda x: rds_fast.logsumexp(x, (0, 2)), x)
    for dim in (-1, 0, (0, 2)):
        torch.testing.assert_close(rds_fast.logsumexp(x, dim), torch.logsumexp(x, dim))
    assert all(ran[name] for name in ("logsumexp", "logsumexp_backward", "logsumexp_double_backward"))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_public_cross_entropy(ran: Counter[str], kind: str, label_smoothing: float) -> None:
    f = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, -100, 3])
    if kind == "probabilities":
        target = torch.rand(3, 4, dtype=torch.float64)

    def both(f: Tensor) -> tuple[Tensor, Tensor]:
        return rds_fast.cross_entropy_with_logsumexp(f, target, label_smoothing=label_smoothing)

    assert_differentiable_twice(both, f)
    torch.testing.assert_close(both(f), plain_cross_entropy(f, target, label_smoothing))
    names = ("cross_entropy", "cross_entropy_backward", "cross_entropy_double_backward")
    assert all(ran[name] for name in names)


@pytest.mark.parametrize(("p", "power"), [*GRADIENT_NORMS, (2.5, 0.7)])
def test_public_gradient_norm(ran: Counter[str], p: float, power: float) -> None:
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert_differentiable_twice(lambda x: rds_fast.gradient_norm(x, p, power=power), x)
    torch.testing.assert_close(rds_fast.gradient_norm(x, p, power=power), reference.gradient_norm(x, p, power))
    assert all(ran[name] for name in ("gradient_norm", "gradient_norm_backward", "gradient_norm_double_backward"))
