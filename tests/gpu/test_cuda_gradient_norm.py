"""The CUDA kernels of the norm."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_cases import (
    DTYPES,
    LONG_ROWS,
    NORMS,
    SIZES,
    check_gradient_norm,
    random_column,
    random_rows,
    run_gradient_norm,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native_cuda")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, *LONG_ROWS], ids=str)
@pytest.mark.parametrize(("p", "power"), NORMS)
def test_gradient_norm(p: float, power: float, size: tuple[int, int], dtype: torch.dtype) -> None:
    x = random_rows(size, dtype, 1, 0.3 / math.sqrt(size[1]))  # float16 must hold the norms of long rows
    v, g = random_rows(size, dtype, 2), random_column(size[0], dtype, 3)
    check_gradient_norm(x, v, g, p, power)


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
