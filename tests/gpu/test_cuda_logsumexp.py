"""The CUDA kernels of the log-sum-exp, on a GPU and emulated."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import DTYPES, MACHINES, ROWS, Machine, Size, check_logsumexp, random_column, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import with_infinities, with_row_stride

native = torch.ops.rds_fast_native


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("machine", "size"), ROWS, indirect=["machine"])
def test_logsumexp(machine: Machine, size: Size, dtype: torch.dtype) -> None:
    kernels, device = machine
    x, v = random_rows(device, size.of(dtype), dtype, 1, 3.0), random_rows(device, size.of(dtype), dtype, 2)
    check_logsumexp(kernels, x, v, random_column(device, size.rows, dtype, 3))


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("size", [(101, 10), (33, 1000), (5, 16_411)], ids=str)
@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_full_precision(machine: Machine, size: tuple[int, int], dtype: torch.dtype) -> None:
    kernels, device = machine
    x, v = random_rows(device, size, dtype, 1), random_rows(device, size, dtype, 2)
    g = random_column(device, size[0], torch.float32, 3)
    assert kernels.logsumexp(x, True)[0].dtype == torch.float32
    assert kernels.logsumexp(x, True)[1].shape == (size[0], 0)
    result, saved = kernels.logsumexp(x, False)
    assert (result.dtype, saved.dtype, tuple(saved.shape)) == (dtype, torch.float32, (size[0], 1))
    truth = torch.logsumexp(x.double(), 1)
    torch.testing.assert_close(saved[:, 0].double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.logsumexp(x, True)[0].double(), truth, rtol=1e-5, atol=1e-5)
    gx = kernels.logsumexp_backward(g, x, saved[:, 0])
    torch.testing.assert_close(gx, (g[:, None] * x.float().softmax(1)).to(dtype), rtol=2e-2, atol=1e-5)
    dg = kernels.logsumexp_double_backward(v, g, x, saved[:, 0])[0]
    assert dg.dtype == torch.float32
    torch.testing.assert_close(dg.double(), (v.double() * x.double().softmax(1)).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 10, 50, 1000, 20_000])
@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_logsumexp_infinities(machine: Machine, columns: int, dtype: torch.dtype) -> None:
    kernels, device = machine
    x = with_infinities(random_rows(device, (8, columns), dtype, 1))
    check_logsumexp(kernels, x, random_rows(device, (8, columns), dtype, 2), random_column(device, 8, dtype, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_every_cut_of_a_row(machine: Machine, dtype: torch.dtype) -> None:
    """Every number of elements before the first 16-byte boundary and after the last."""
    kernels, device = machine
    width = 16 // dtype.itemsize
    for columns in range(33, 33 + width):
        for before in range(width):
            x = with_row_stride(random_rows(device, (3, columns), dtype, 1), before, -(before + columns) % width)
            v = with_row_stride(random_rows(device, (3, columns), dtype, 2), before, 1)
            check_logsumexp(kernels, x, v, random_column(device, 3, dtype, 3))


@pytest.mark.gpu
@pytest.mark.usefixtures("native_cuda")
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 3000), dtype=st.sampled_from(DTYPES))
def test_rows_of_softmax_sum_to_one(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = random_rows("cuda", (rows, columns), dtype, 1, 4.0)
    lse = native.logsumexp(x, True)[0]
    sums = native.logsumexp_backward(torch.ones_like(lse), x, lse).double().sum(1)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-9}[dtype]
    assert (sums - 1).abs().max() <= rounding
