"""top_k_intersection, kendall_tau and spearman: by hand, against SciPy, and what must hold for every input."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rds_fast.evaluation import kendall_tau, rank_correlation, spearman, top_k_intersection

# Two values, powers of two (the bits of the inversion count) and their neighbours, an MNIST image, more than 2^16.
SIZES = (2, 3, 4, 5, 7, 8, 9, 16, 17, 100, 784, 70_000)


def integers(shape: tuple[int, ...], levels: int, seed: int) -> Tensor:
    """Values of which few levels tie often, and many never."""
    return torch.randint(-levels, levels + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


def by_scipy(name: str, a: Tensor, b: Tensor) -> np.ndarray:
    stats = pytest.importorskip("scipy.stats")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a row is constant
        return np.array([getattr(stats, name)(*rows).statistic for rows in zip(a.numpy(), b.numpy(), strict=True)])


def test_intersection_by_hand() -> None:
    a = torch.tensor([[5.0, -4.0, 3.0, 0.0], [5.0, -4.0, 3.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    b = torch.tensor([[0.1, 9.0, -8.0, 0.0], [-1.0, 2.0, 0.0, 0.5], [4.0, 3.0, 2.0, 1.0]])
    assert top_k_intersection(a, b, 2).tolist() == [0.5, 1.0, 0.0]
    assert top_k_intersection(a, b, 1).tolist() == [0.0, 0.0, 0.0]
    assert top_k_intersection(a, b, 3).tolist() == pytest.approx([1.0, 2 / 3, 2 / 3])
    assert top_k_intersection(a, b, 4).tolist() == [1.0, 1.0, 1.0]


def test_ties_for_the_last_place_go_to_the_first_in_order() -> None:
    a = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert top_k_intersection(a, torch.tensor([[1.0, 0.0, 1.0, 1.0]]), 2).item() == 0.5  # {0, 1} and {0, 2}
    assert top_k_intersection(a, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 2).item() == 0.0


def test_correlations_by_hand() -> None:
    # Pairs of (1, 2, 3, 4) against (1, 3, 2, 4): five alike, one oppositely.
    a, b = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, 3.0, 2.0, 4.0]])
    assert kendall_tau(a, b).item() == pytest.approx(4 / 6)
    assert spearman(a, b).item() == pytest.approx(1 - 6 * 2 / (4 * 15))
    # With a tie in b: pairs alike 5, oppositely 0, tied in b 1; ranks (1, 2.5, 2.5, 4).
    tied = torch.tensor([[1.0, 2.0, 2.0, 4.0]])
    assert kendall_tau(a, tied).item() == pytest.approx(5 / math.sqrt(6 * 5))
    assert spearman(a, tied).item() == pytest.approx(4.5 / math.sqrt(5 * 4.5))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("levels", [1, 2, 10, 10**12], ids=["three values", "five", "21", "no ties"])
def test_kendall_is_scipys_to_the_last_bit_and_spearman_to_rounding(size: int, levels: int) -> None:
    samples = 40 if size < 1000 else 2
    a, b = integers((samples, size), levels, seed=size), integers((samples, size), levels, seed=size + 1)
    b[1:] += a[1:]  # one pair independent, the others related
    np.testing.assert_array_equal(kendall_tau(a, b).numpy(), by_scipy("kendalltau", a, b))
    np.testing.assert_allclose(spearman(a, b).numpy(), by_scipy("spearmanr", a, b), rtol=0, atol=1e-12)


def test_constant_rows_are_nan_as_in_scipy() -> None:
    a = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0.0, -0.0, 0.0]])
    b = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [3.0, 1.0, 2.0]])
    for ours, name in ((kendall_tau, "kendalltau"), (spearman, "spearmanr")):
        assert np.isnan(by_scipy(name, a, b)).all()
        assert ours(a, b).isnan().all()


@pytest.mark.parametrize("function", [kendall_tau, spearman, lambda a, b: top_k_intersection(a, b, 2)])
def test_a_row_that_holds_nan_is_nan_and_the_others_are_not(function) -> None:
    a = integers((3, 6), 100, seed=0)
    b = integers((3, 6), 100, seed=1)
    expected = function(a, b)
    a[0, 3], b[1, 2] = math.nan, math.nan
    result = function(a, b)
    assert result[:2].isnan().all()
    assert torch.equal(result[2], expected[2])


def test_a_zero_attribution_has_no_largest_values() -> None:
    a = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    b = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    result = top_k_intersection(a, b, 1)
    assert result[:2].isnan().all()
    assert result[2] == 1.0


def test_infinite_values_are_ranked_last() -> None:
    a = torch.tensor([[math.inf, 1.0, -math.inf, 0.0]])
    b = torch.tensor([[3.0, 2.0, 0.0, 1.0]])
    assert kendall_tau(a, b).item() == 1.0
    assert spearman(a, b).item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]
)
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    a, b = (integers((2, 3, 4, 5), 50, seed=seed).abs() for seed in (0, 1))
    given = (a.to(dtype).contiguous(memory_format=torch.channels_last), b.to(dtype).flip(0).flip(0))
    assert torch.equal(kendall_tau(*given), kendall_tau(a, b))
    assert torch.equal(spearman(*given), spearman(a, b))
    assert torch.equal(top_k_intersection(*given, 7), top_k_intersection(a, b, 7))
    assert kendall_tau(*given).dtype == torch.float64


def test_the_magnitude_of_the_least_integer_is_the_largest() -> None:
    a = torch.tensor([[-128, 1, 127]], dtype=torch.int8)
    assert top_k_intersection(a, torch.tensor([[5, 1, 2]], dtype=torch.int8), 1).item() == 1.0


def test_no_samples_no_values_one_value_and_samples_without_dimensions() -> None:
    assert top_k_intersection(torch.empty(0, 5), torch.empty(0, 5), 2).shape == (0,)
    for function in (kendall_tau, spearman):
        assert function(torch.empty(0, 5), torch.empty(0, 5)).shape == (0,)
        assert function(torch.empty(2, 0), torch.empty(2, 0)).isnan().tolist() == [True, True]
        assert function(torch.rand(2, 1), torch.rand(2, 1)).isnan().tolist() == [True, True]
        assert function(torch.rand(2), torch.rand(2)).isnan().tolist() == [True, True]


def test_many_rows_are_ranked_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = integers((7, 30), 10, seed=0), integers((7, 30), 10, seed=1)
    whole = kendall_tau(a, b), spearman(a, b), top_k_intersection(a, b, 5)
    monkeypatch.setattr(rank_correlation, "_CHUNK", 60)
    for one, other in zip(whole, (kendall_tau(a, b), spearman(a, b), top_k_intersection(a, b, 5)), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=60, deadline=None)
@example(size=30, levels=2, k=22, seed=1)
@given(size=st.integers(2, 40), levels=st.integers(1, 30), k=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_what_holds_for_every_input(size: int, levels: int, k: int, seed: int) -> None:
    a, b = integers((3, size), levels, seed), integers((3, size), levels, seed + 1)
    k = min(k, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    for function in (kendall_tau, spearman):
        value = function(a, b)
        defined = ~value.isnan()
        assert (value[defined].abs() <= 1).all()
        torch.testing.assert_close(function(b, a), value, equal_nan=True)  # symmetric
        torch.testing.assert_close(function(a[:, order], b[:, order]), value, equal_nan=True)
        torch.testing.assert_close(function(a, -b), -value, equal_nan=True)
        torch.testing.assert_close(function(a.exp(), 3 * b + 1), value, equal_nan=True)  # ranks alone count
        assert (function(a, a).nan_to_num(1.0) > 1 - 1e-12).all()
    shared = top_k_intersection(a, b, k)
    assert torch.equal(top_k_intersection(-a, 2 * b, k).nan_to_num(7), shared.nan_to_num(7))  # |values| alone count
    assert torch.equal(top_k_intersection(b, a, k).nan_to_num(7), shared.nan_to_num(7))
    counts = (shared * k).round()  # 15 / 22 · 22 is not 15: the quotient of whole numbers is what is exact
    assert torch.equal((counts / k).nan_to_num(7), shared.nan_to_num(7))
    assert (top_k_intersection(a, a, k).nan_to_num(1.0) == 1).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: top_k_intersection(torch.rand(2, 3), torch.rand(2, 3), 4), ValueError, "at most 3"),
        (lambda: top_k_intersection(torch.rand(2, 3), torch.rand(2, 3), 0), ValueError, "k is 0"),
        (lambda: top_k_intersection(torch.rand(2, 3), torch.rand(2, 3), 1.5), TypeError, "k is a float"),
        (lambda: kendall_tau(torch.rand(2, 3), torch.rand(3, 2)), ValueError, r"\(2, 3\) and b \(3, 2\)"),
        (lambda: spearman(torch.tensor(1.0), torch.tensor(1.0)), ValueError, "N samples"),
        (lambda: kendall_tau([1.0, 2.0], torch.rand(2)), TypeError, "a is list"),
        (lambda: spearman(torch.rand(2, 2), torch.rand(2, 2) + 1j), TypeError, "b is torch.complex64"),
    ],
)
def test_wrong_input_is_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
