"""``rds_fast.logsumexp``: torch.logsumexp's contract, accuracy, and both derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rds_fast
from rds_fast import reference
from tests.criteria import assert_accurate

INF = math.inf
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

SIZES = [
    (1, 1),  # one class: l = x, s = 1
    (5, 2),  # two classes, fewer than a vector
    (257, 10),  # many short rows, not a multiple of any block
    (33, 1000),  # ImageNet's classes
    (3, 4099),  # a prime: no vector width divides it
    (2, 262_144),  # longer than one block
]


def derivatives(function, x: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, gx, and dg and dx of the double backward."""
    x, g = x.detach().requires_grad_(), g.detach().requires_grad_()
    result = function(x)
    (gx,) = torch.autograd.grad(result, x, g, create_graph=True)
    dg, dx = torch.autograd.grad(gx, (g, x), v)
    return result.detach(), gx.detach(), dg, dx


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_accurate_as_torch_at_every_order(fused_backend: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(size, generator=generator) * 4).to(dtype)
    g = torch.randn(size[0], generator=generator).to(dtype)
    v = torch.randn(size, generator=generator).to(dtype)
    ours = derivatives(lambda t: rds_fast.logsumexp(t, 1), x, g, v)
    theirs = derivatives(lambda t: torch.logsumexp(t, 1), x, g, v)
    truth = derivatives(lambda t: torch.logsumexp(t, 1), x.double(), g.double(), v.double())
    # The sizes of the terms: max + log Σ, Σ v s, and g s (v − Σ v s).
    lse, gx, dg, dx = range(4)
    s, wide_v = x.double().softmax(1), v.double().abs()
    terms_of_dg = (wide_v * s).sum(1)
    terms_of_dx = g.double().abs() * (s * (wide_v + terms_of_dg[:, None])).amax(1)
    scales = {lse: x.double().abs().amax(1), dg: terms_of_dg, dx: terms_of_dx}
    for index in (lse, gx, dg, dx):
        assert_accurate(ours[index], theirs[index], truth[index], scales.get(index))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_softmax_rows_sum_to_one_in_16_bit(backend: str, dtype: torch.dtype) -> None:
    # Unit variance: no single s is so large that its own rounding (2⁻⁹ of it) is the error of the sum.
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    (s,) = torch.autograd.grad(rds_fast.logsumexp(x, 1).sum(), x)
    assert (s.double().sum(1) - 1).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("shape", "dim", "keepdim"),
    [
        ((3, 4, 5), 1, False),
        ((3, 4, 5), (0, 2), True),
        ((3, 4, 5), (-1, 0, 1), False),
        ((3, 4, 5), (2,), True),
        ((3,), 0, True),
        ((), 0, False),
        ((), -1, True),
        ((), (), False),  # nothing to reduce: the input itself
        ((), (), True),
        ((0, 4), 1, False),
        ((4, 0), 1, False),
        ((2, 3, 0, 4), (0, 3), True),
    ],
    ids=str,
)
def test_dims_and_empty_inputs_as_torch(backend: str, shape: tuple[int, ...], dim, keepdim: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours, theirs = rds_fast.logsumexp(x, dim, keepdim), torch.logsumexp(x, dim, keepdim)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    (gx,) = torch.autograd.grad(ours.sum(), x)
    (expected,) = torch.autograd.grad(theirs.sum(), x)
    torch.testing.assert_close(gx, expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[::3],
        lambda x: x[:1].expand(7, -1),
        lambda x: x[:, :1].expand(-1, 5),
        lambda x: x[:, 3:],
    ],
    ids=["transposed", "strided columns", "strided rows", "expanded rows", "expanded columns", "offset"],
)
def test_memory_layouts(backend: str, make) -> None:
    base = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rds_fast.logsumexp(make(x), 1), base)
    assert torch.autograd.gradgradcheck(lambda x: rds_fast.logsumexp(make(x), 1), base)


def test_channels_last(backend: str) -> None:
    x = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last)
    torch.testing.assert_close(rds_fast.logsumexp(x, 1), torch.logsumexp(x, 1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers_are_promoted(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=dtype)
    result = rds_fast.logsumexp(x, 1)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.logsumexp(x.float(), 1))


@pytest.mark.parametrize(
    "row",
    [
        [-INF, -INF, -INF],
        [-INF, 1.0, 2.0],
        [INF, 1.0, -INF],
        [INF, INF, 0.0],
        [math.nan, 1.0, 2.0],
        [math.nan, INF, -INF],
        [3e38, 3e38, 0.0],
        [-3e38, -3e38, -3e38],
    ],
    ids=str,
)
@pytest.mark.parametrize("columns", [3, 40], ids=["short row", "several vectors"])
def test_infinities_and_nan_as_torch(backend: str, row: list[float], columns: int) -> None:
    x = torch.tensor([row + [row[-1]] * (columns - 3)])
    g, v = torch.tensor([1.5]), torch.linspace(-1, 1, columns)[None]
    ours = derivatives(lambda t: rds_fast.logsumexp(t, 1), x, g, v)
    theirs = derivatives(lambda t: torch.logsumexp(t, 1), x, g, v)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_gradcheck(backend: str) -> None:
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rds_fast.logsumexp, x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(rds_fast.logsumexp, x, check_batched_grad=True)


def test_autocast_gives_float32(backend: str) -> None:
    x = torch.randn(4, 10).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = rds_fast.logsumexp(x, 1), torch.logsumexp(x.float(), 1)
    assert rds_fast.logsumexp(x, 1).dtype == torch.bfloat16
    if backend == "native":
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)


def test_matches_the_reference_class_by_class(backend: str) -> None:
    x = torch.randn(8, 31)
    torch.testing.assert_close(rds_fast.logsumexp(x, 1), reference.logsumexp(x, 1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 2.0], 0), TypeError, "input is a list"),
        ((torch.ones(2, 3), 1.0), TypeError, None),
        ((torch.ones(2, 3), None), TypeError, "dim is None; it must be an int or a tuple of ints"),
        (
            (torch.ones(2, 3), True),
            TypeError,
            "dim is True; it must be an int or a tuple of ints",
        ),  # not the dimension 1
        ((torch.ones(2, 3), (0, True)), TypeError, None),
        ((torch.ones(2, 3), ()), RuntimeError, None),
        ((torch.ones(2, 3), 2), IndexError, None),
        ((torch.ones(2, 3), (0, 0)), RuntimeError, None),
        ((torch.ones(2, 3), (0, -2)), RuntimeError, None),
        ((torch.ones(2, 3), (0, 5)), IndexError, None),
    ],
    ids=str,
)
def test_bad_input(backend: str, arguments, error: type[Exception], message: str | None) -> None:
    with pytest.raises(error, match=message):
        rds_fast.logsumexp(*arguments)


finite_rows = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=70)


@settings(deadline=None, max_examples=60)
@given(row=finite_rows, shift=st.floats(-1e3, 1e3, width=32))
def test_properties(row: list[float], shift: float) -> None:
    """Shift invariance, order invariance, the bounds max <= l <= max + log C, and softmax on the simplex."""
    x = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    lse = rds_fast.logsumexp(x, 1)
    largest = max(row)
    assert largest - 1e-9 <= lse.item() <= largest + math.log(len(row)) + 1e-9
    torch.testing.assert_close(rds_fast.logsumexp(x + shift, 1), lse + shift, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(rds_fast.logsumexp(x.flip(1), 1), lse, rtol=1e-13, atol=1e-12)
    (s,) = torch.autograd.grad(lse.sum(), x)
    assert (s >= 0).all()
    assert abs(s.sum().item() - 1) < 1e-10
