"""The CUDA kernels of the norm, on a GPU and emulated."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_cases import (
    DTYPES,
    MACHINES,
    NORMS,
    ROWS,
    Machine,
    Size,
    check_gradient_norm,
    random_column,
    random_rows,
)
from kernel_cases import run_gradient_norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("machine", "size"), ROWS, indirect=["machine"])
@pytest.mark.parametrize(("p", "power"), NORMS)
def test_gradient_norm(p: float, power: float, machine: Machine, size: Size, dtype: torch.dtype) -> None:
    kernels, device = machine
    rows, columns = size.of(dtype)
    # float16 must hold the norms of long rows
    x = random_rows(device, (rows, columns), dtype, 1, 0.3 / math.sqrt(columns))
    v, g = random_rows(device, (rows, columns), dtype, 2), random_column(device, rows, dtype, 3)
    check_gradient_norm(kernels, x, v, g, p, power)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 50, 20_000])
@pytest.mark.parametrize(("p", "power"), NORMS)
@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_gradient_norm_at_zeros(machine: Machine, p: float, power: float, columns: int, dtype: torch.dtype) -> None:
    kernels, device = machine
    x = random_rows(device, (4, columns), dtype, 1, 0.3)
    x[0] = 0
    x[1, ::2] = 0
    v, g = random_rows(device, (4, columns), dtype, 2), random_column(device, 4, dtype, 3)
    check_gradient_norm(kernels, x, v, g, p, power)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("columns", [2, 50, 20_000])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 50.0, math.inf])
@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_gradient_norm_neither_overflows_nor_underflows(
    machine: Machine, p: float, columns: int, dtype: torch.dtype
) -> None:
    kernels, device = machine
    exponent = 100 if dtype == torch.float32 else 1000
    x = random_rows(device, (4, columns), dtype, 1).clamp(-2, 2)
    v, g = random_rows(device, (4, columns), dtype, 2), random_column(device, 4, dtype, 3)
    result, gx, *_ = run_gradient_norm(kernels, x, v, g, p, 1.0)
    for factor in (2.0**exponent, 2.0**-exponent):
        far_result, far_gx, far_dg, _ = run_gradient_norm(kernels, x * factor, v, g, p, 1.0)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(far_result / factor, result, rtol=tolerance, atol=0)
        torch.testing.assert_close(far_gx, gx, rtol=tolerance, atol=tolerance)
        assert far_dg.isfinite().all()
