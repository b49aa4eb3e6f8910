"""The CPU kernels of the log-sum-exp."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import (
    DTYPES,
    SIZES,
    assert_accurate,
    check_logsumexp,
    native,
    needs_kernels,
    random_rows,
    random_values,
    run_logsumexp,
    true_logsumexp,
)
from kernel_cases import derivatives, with_infinities

pytestmark = needs_kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logsumexp(size: tuple[int, int], dtype: torch.dtype) -> None:
    check_logsumexp(
        random_rows(size, dtype), random_rows((size[0], size[1]), dtype, 1.0), random_values(size[0], dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("size", [(65, 10), (3, 1000)], ids=str)
def test_logsumexp_full_precision(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = random_rows(size, dtype)
    result, saved = native.logsumexp(x, True)
    assert result.dtype == torch.float32
    assert saved.shape == (size[0], 0)
    result, saved = native.logsumexp(x, False)
    assert result.dtype == dtype
    assert saved.shape == (size[0], 1)
    assert saved.dtype == torch.float32
    check_logsumexp(x, random_rows(size, dtype, 1.0), random_values(size[0], torch.float32))
    if size[1] >= 1000:  # the rounding of few values would not average out
        softmax = native.logsumexp_backward(torch.ones(size[0]), x, saved.flatten())
        assert (softmax.double().sum(1) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 10, 50, 20_000])
def test_logsumexp_infinities(columns: int, dtype: torch.dtype) -> None:
    x = with_infinities(random_rows((8, columns), dtype))
    v, g = random_rows((8, columns), dtype, 1.0), random_values(8, dtype)
    theirs = derivatives(lambda x: torch.logsumexp(x, 1), x.double(), v.double(), g.double())
    for our, truth in zip(run_logsumexp(x, v, g), theirs, strict=True):
        assert_accurate(our, truth.to(dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("columns", [5, 1000])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_logsumexp_magnitudes(scale: float, columns: int, dtype: torch.dtype) -> None:
    check_logsumexp(
        random_rows((4, columns), dtype) * scale, random_rows((4, columns), dtype, 1.0), random_values(4, dtype)
    )


@pytest.mark.parametrize("columns", [5, 1000])
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logsumexp_of_large_logits_does_not_cancel(offset: float, columns: int) -> None:
    """Half a unit in the last place of l is 5e-4 here: s has that relative error, but Σ v s and v − Σ v s must not."""
    x, v, g = (
        random_rows((4, columns), torch.float32) + offset,
        random_rows((4, columns), torch.float32, 1.0),
        torch.ones(4),
    )
    result, gx, dg, dx = run_logsumexp(x, v, g)
    true_result, true_gx, true_dg, true_dx = true_logsumexp(x, v, g)
    assert (result - true_result).abs().max() <= 2.0**-11
    torch.testing.assert_close(gx.double(), true_gx, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(dg.double(), true_dg, rtol=1e-5, atol=1e-6)
    assert (dx.double() / gx.double() - true_dx / true_gx).abs().max() < 1e-5
