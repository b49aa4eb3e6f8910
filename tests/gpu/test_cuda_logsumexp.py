"""The CUDA kernels of the log-sum-exp."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import DTYPES, LONG_ROWS, SIZES, check_logsumexp, native, random_column, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import with_infinities

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native_cuda")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, *LONG_ROWS], ids=str)
def test_logsumexp(size: tuple[int, int], dtype: torch.dtype) -> None:
    x, v, g = random_rows(size, dtype, 1, 3.0), random_rows(size, dtype, 2), random_column(size[0], dtype, 3)
    check_logsumexp(x, v, g)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 10, 50, 1000, 20_000])
def test_logsumexp_infinities(columns: int, dtype: torch.dtype) -> None:
    x = with_infinities(random_rows((8, columns), dtype, 1))
    check_logsumexp(x, random_rows((8, columns), dtype, 2), random_column(8, dtype, 3))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 3000), dtype=st.sampled_from(DTYPES))
def test_rows_of_softmax_sum_to_one(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = random_rows((rows, columns), dtype, 1, 4.0)
    lse = native.logsumexp(x, True)[0]
    sums = native.logsumexp_backward(torch.ones_like(lse), x, lse).double().sum(1)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-9}[dtype]
    assert (sums - 1).abs().max() <= rounding
