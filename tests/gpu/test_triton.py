"""The Triton kernels on a GPU: accuracy at every order against float64, special values, determinism, and what ran."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from kernel_cases import derivatives
from torch import Tensor

import rds_fast
from rds_fast import reference

triton = pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ran_by_file")]

INF, NAN = math.inf, math.nan
FAMILIES = ("logsumexp", "cross_entropy", "gradient_norm")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place at a power of two for 16-bit results; else as the design states.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

SIZES = [
    (5, 1),  # one class
    (1000, 2),  # the smallest tile; a program with rows outside the mask
    (1003, 10),  # 64 rows a program, the last not full
    (77, 33),  # no vector load divides it; half of the tile outside the mask
    (64, 1000),  # ImageNet's classes: a multiple of 8, not of 16
    (7, 16_384),  # the longest row in registers (float64: split)
    (600, 16_411),  # long rows, enough of them for one program each; a prime
    (3, 32_768),  # few long rows, split over programs
    (4, 131_072),
    (2, 150_528),  # an image of 3·224·224 values
    (2, 262_144),
    (1, 1_000_000),  # one row over the whole GPU
]
GRADIENT_NORMS = [(1.0, 1.0), (1.5, 1.0), (2.0, 1.0), (2.0, 2.0), (2.0, 0.5), (3.0, 1.5), (INF, 1.0), (INF, 2.0)]


def assert_ran(ran_by_file: Counter[str], family: str) -> None:
    """The three orders of ``family`` ran in Triton."""
    for kernel in ("_forward_kernel", "_backward_kernel", "_double_backward_kernel"):
        assert ran_by_file[family + kernel] > 0, f"{family}{kernel} did not run: {ran_by_file}"


def inputs(size: tuple[int, int], dtype: torch.dtype, count: int) -> list[Tensor]:
    """x and v (N, C), and ``count`` cotangents (N,), on the GPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = [size, size, *[size[:1]] * count]
    return [torch.randn(shape, generator=generator).to(dtype).cuda() for shape in shapes]


def assert_accurate(ours: Tensor, theirs: Tensor, truth: Tensor, scale: Tensor | None = None) -> None:
    """As close to the truth as PyTorch, plus the tolerance at the row's largest value, or at ``scale``, its terms'."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == truth.shape
    row = truth.abs().reshape(truth.shape[0], -1).amax(1)
    scale = (row if scale is None else torch.maximum(row, scale)).reshape(-1, *[1] * (truth.dim() - 1))
    error, their_error = (ours.double() - truth).abs(), (theirs.double() - truth).abs().nan_to_num(posinf=0.0)
    subnormal = torch.finfo(ours.dtype).tiny * torch.finfo(ours.dtype).eps
    excess = (error - their_error - TOLERANCE[ours.dtype] * scale - subnormal).max()
    assert excess <= 0, f"exceeds the allowed error by {excess:.3e}; worst error {error.max():.3e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logsumexp(ran_by_file: Counter[str], size: tuple[int, int], dtype: torch.dtype) -> None:
    x, v, g = inputs(size, dtype, 1)
    ours = derivatives(lambda x: rds_fast.logsumexp(x, 1), x, v, g)
    assert_ran(ran_by_file, "logsumexp")
    theirs = derivatives(lambda x: torch.logsumexp(x, 1), x, v, g)
    truth = derivatives(lambda x: torch.logsumexp(x, 1), x.double(), v.double(), g.double())
    terms = (v.double() * x.double().softmax(1)).abs().sum(1)
    scales = (x.double().abs().amax(1), None, terms, g.double().abs() * terms)
    for our, their, true, scale in zip(ours, theirs, truth, scales, strict=True):
        assert_accurate(our, their, true, scale)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [size for size in SIZES if size[1] not in (2, 150_528, 262_144)], ids=str)
def test_cross_entropy(
    ran_by_file: Counter[str], size: tuple[int, int], dtype: torch.dtype, kind: str, label_smoothing: float
) -> None:
    f, v, g, h = inputs(size, dtype, 2)
    target = torch.randint(size[1], size[:1], device="cuda")
    target[1::3] = -100
    if kind == "probabilities":
        target = torch.rand(size, dtype=reference.accumulation_dtype(dtype), device="cuda").softmax(1)

    def plain(f: Tensor) -> tuple[Tensor, Tensor]:
        q = target.to(f.dtype) if target.is_floating_point() else target
        ce = torch.nn.functional.cross_entropy(f, q, reduction="none", label_smoothing=label_smoothing)
        return ce, torch.logsumexp(f, 1)

    ours = derivatives(
        lambda f: rds_fast.cross_entropy_with_logsumexp(f, target, label_smoothing=label_smoothing), f, v, g, h
    )
    assert_ran(ran_by_file, "cross_entropy")
    theirs = derivatives(plain, f, v, g, h)
    truth = derivatives(plain, *(t.double() for t in (f, v, g, h)))
    terms = v.double().abs().amax(1)  # dg_ce and dg_lse are averages of terms of both signs
    a = g.double().abs() + h.double().abs()
    scales = (None, f.double().abs().amax(1), None, terms, terms, a * (v.double() * f.double().softmax(1)).abs().sum(1))
    for our, their, true, scale in zip(ours, theirs, truth, scales, strict=True):
        assert_accurate(our, their, true, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("p", "power"), GRADIENT_NORMS)
@pytest.mark.parametrize("size", [SIZES[0], SIZES[3], SIZES[4], SIZES[6], SIZES[9], SIZES[11]], ids=str)
def test_gradient_norm(
    ran_by_file: Counter[str], size: tuple[int, int], p: float, power: float, dtype: torch.dtype
) -> None:
    x, v, g = inputs(size, dtype, 1)
    x = torch.where(x < 0, -1, 1) * (0.25 + x.abs() / 8)  # away from 0, where PyTorch's second derivative overflows
    if dtype == torch.float16:
        x = x / 32  # the 1-norm of a million values, and their sum of squares, stay below 65504
    ours = derivatives(lambda x: rds_fast.gradient_norm(x, p, power=power), x, v, g)
    assert_ran(ran_by_file, "gradient_norm")
    theirs = derivatives(lambda x: torch.linalg.vector_norm(x, p, dim=1) ** power, x, v, g)
    truth = derivatives(lambda x: reference.gradient_norm(x, p, power), x.double(), v.double(), g.double())
    terms = (truth[1] / g.double()[:, None] * v.double()).abs().sum(1)
    norm = torch.linalg.vector_norm(x.double(), p, dim=1)
    difference = (truth[1] * (v.double() / x.double())).abs().amax(1) + (truth[1].abs().amax(1) * terms / norm**power)
    for our, their, true, scale in zip(ours, theirs, truth, (None, None, terms, difference), strict=True):
        assert_accurate(our, their, true, scale)


@pytest.mark.parametrize("C", [5, 40_000], ids=["whole row", "split row"])
def test_infinities_and_nan(C: int) -> None:
    x = torch.randn(5, C, device="cuda")
    x[0] = -INF
    x[1, 2], x[1, -1] = INF, -INF
    x[2, 1] = NAN
    x[3, :-1] = -INF
    x[4] *= 1e30
    v, g = torch.randn_like(x), torch.randn(5, device="cuda")
    ours = derivatives(lambda x: rds_fast.logsumexp(x, 1), x, v, g)
    for our, true in zip(ours, derivatives(lambda x: torch.logsumexp(x, 1), x, v, g), strict=True):
        torch.testing.assert_close(our, true, rtol=1e-5, atol=1e-5, equal_nan=True)
    target = torch.tensor([0, 0, 0, C - 1, 1], device="cuda")
    ce, _ = rds_fast.cross_entropy_with_logsumexp(x, target)
    torch.testing.assert_close(ce, torch.nn.functional.cross_entropy(x, target, reduction="none"), equal_nan=True)
    for p in (1.0, 1.5, 2.0, INF):
        ours, theirs = rds_fast.gradient_norm(x[1:], p), torch.linalg.vector_norm(x[1:], p, dim=1)
        torch.testing.assert_close(ours[:3], theirs[:3], equal_nan=True)  # the last overflows in PyTorch
        assert ours[3].isfinite()


@pytest.mark.parametrize("D", [3, 40_000], ids=["whole row", "split row"])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, INF])
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42], ids=["large", "small", "subnormal"])
def test_norms_neither_overflow_nor_underflow(scale: float, p: float, D: int) -> None:
    x = torch.zeros(2, D, device="cuda")
    x[:, :3] = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 1.0]], device="cuda") * scale
    x.requires_grad_()
    norm = rds_fast.gradient_norm(x, p)
    truth = torch.linalg.vector_norm(x.detach().double(), p, dim=1)
    torch.testing.assert_close(norm.double(), truth, rtol=1e-5, atol=2e-45)
    (u,) = torch.autograd.grad(norm.sum(), x)
    # Euler's identity; a subnormal norm has three digits
    torch.testing.assert_close((u.double() * x.double()).sum(1), truth, rtol=1e-2 if scale == 1e-42 else 1e-5, atol=0)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, INF])
def test_zero_rows(p: float) -> None:
    x, v, g = torch.zeros(3, 7, device="cuda"), torch.randn(3, 7, device="cuda"), torch.ones(3, device="cuda")
    for tensor in derivatives(lambda x: rds_fast.gradient_norm(x, p), x, v, g):
        assert not tensor.any()
    assert torch.equal(derivatives(lambda x: rds_fast.gradient_norm(x, 2.0, power=2), x, v, g)[3], 2 * v)


def test_index_out_of_range_is_nan() -> None:
    from rds_fast.kernels import cross_entropy

    f = torch.randn(4, 10, device="cuda")
    target = torch.tensor([0, 10, -1, 2**40], device="cuda")
    ce, lse, _ = cross_entropy.cross_entropy(f, target, 0.0, -100, False)
    gx = cross_entropy.cross_entropy_backward(lse, lse, f, target, lse, 0.0, -100)
    assert ce.isnan().tolist() == gx[:, 0].isnan().tolist() == [False, True, True, True]
    assert lse.isfinite().all()


def test_row_strides_and_expanded_cotangents() -> None:
    wide = torch.randn(7, 2400, device="cuda", dtype=torch.float64)
    for x in (wide[:, 3:1013], wide[:1, :1000].expand(7, -1), wide[:, ::2]):
        x = x.detach().requires_grad_()
        assert torch.allclose(rds_fast.logsumexp(x, 1), torch.logsumexp(x, 1), rtol=1e-12)
        (ours,) = torch.autograd.grad(rds_fast.gradient_norm(x).sum(), x)
        (theirs,) = torch.autograd.grad(torch.linalg.vector_norm(x, dim=1).sum(), x)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [(1003, 10), (600, 16_411), (1, 1_000_000)], ids=str)
def test_the_same_bits_on_every_run(size: tuple[int, int]) -> None:
    x, v, g, h = inputs(size, torch.float32, 2)
    target = torch.arange(size[0], device="cuda") % size[1]
    for function, cotangents in (
        (lambda x: rds_fast.logsumexp(x, 1), (g,)),
        (lambda x: rds_fast.cross_entropy_with_logsumexp(x, target, label_smoothing=0.1), (g, h)),
        (lambda x: rds_fast.gradient_norm(x, 3.0), (g,)),
    ):
        first = derivatives(function, x, v, *cotangents)
        for _ in range(5):
            for again, once in zip(derivatives(function, x, v, *cotangents), first, strict=True):
                assert torch.equal(again, once)


def test_a_kernel_serves_only_launches_like_its_own() -> None:
    """Widths of sizes, alignment, dtypes and options change to and fro between launches of the same kernels."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40 * 1000 + 1, generator=generator, dtype=torch.float64).cuda()
    for _ in range(3):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for first, shape in ((0, (40, 1000)), (1, (40, 1000)), (0, (39, 1000)), (0, (4000, 10)), (1, (3, 9))):
                x = values.to(dtype)[first : first + math.prod(shape)].view(shape)
                ours, theirs = rds_fast.logsumexp(x, 1), torch.logsumexp(x.double(), 1)
                assert torch.allclose(ours.double(), theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_one_launch_an_operation_for_short_rows(ran_by_file: Counter[str]) -> None:
    x, v, g, h = inputs((65_536, 10), torch.bfloat16, 2)
    target = torch.zeros(65_536, dtype=torch.int64, device="cuda")
    derivatives(lambda x: rds_fast.logsumexp(x, 1), x, v, g)
    derivatives(lambda x: rds_fast.cross_entropy_with_logsumexp(x, target), x, v, g, h)
    derivatives(lambda x: rds_fast.gradient_norm(x), x, v, g)
    kernels = ("_forward_kernel", "_backward_kernel", "_double_backward_kernel")
    assert ran_by_file == {family + kernel: 1 for family in FAMILIES for kernel in kernels}


def test_more_than_two_to_the_31_elements() -> None:
    """Row offsets past 2³¹, in the last rows, and a row that is long at the same time."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    for N, C in ((2**18, 2**13 + 8), (3, 2**30)):
        x = torch.zeros(N, C, dtype=torch.bfloat16, device="cuda").requires_grad_()
        with torch.no_grad():
            x[-1, -1] = 30.0
        lse = rds_fast.logsumexp(x, 1)
        (gx,) = torch.autograd.grad(lse[-1], x)
        truth = math.log(C - 1 + math.exp(30.0))
        assert abs(lse[-1].item() - truth) <= 0.0625
        assert abs(gx[-1, -1].item() - math.exp(30.0 - truth)) <= 2.0**-8
        assert not gx[0].any()
        del x, lse, gx


@pytest.mark.parametrize("name", FAMILIES)
def test_gradcheck(ran_by_file: Counter[str], name: str) -> None:
    x = torch.randn(3, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    target = torch.tensor([0, 5, -100], device="cuda")
    function = {
        "logsumexp": lambda x: rds_fast.logsumexp(x, 1),
        "cross_entropy": lambda x: rds_fast.cross_entropy_with_logsumexp(x, target, label_smoothing=0.1),
        "gradient_norm": lambda x: rds_fast.gradient_norm(x, 3.0, power=1.5),
    }[name]
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    assert_ran(ran_by_file, name)
