"""The CPU kernels of the norm."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_cases import (
    DTYPES,
    SIZES,
    assert_accurate,
    check_gradient_norm,
    native,
    needs_kernels,
    random_rows,
    random_values,
    run_gradient_norm,
    true_gradient_norm,
)

pytestmark = needs_kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "power"),
    [(size, power) for power in (1.0, 2.0) for size in SIZES] + [((259, 10), 0.5), ((5, 65), 3.0)],  # once a row
    ids=str,
)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_gradient_norm(power: float, p: float, size: tuple[int, int], dtype: torch.dtype) -> None:
    x = random_rows(size, dtype, 0.3)
    if math.isinf(p):
        x[:, -1] = -x.abs().amax(1)  # a tie
    check_gradient_norm(x, random_rows(size, dtype, 0.7), random_values(size[0], dtype), p, power)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 50, 20_000])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_gradient_norm_at_zeros(power: float, p: float, columns: int, dtype: torch.dtype) -> None:
    x = random_rows((4, columns), dtype)
    x[0] = 0
    x[1, 1:] = 0
    x[2, ::2] = 0
    v, g = random_rows((4, columns), dtype, 0.5), random_values(4, dtype)
    truths = true_gradient_norm(x, v, g, p, power)
    for our, truth in zip(run_gradient_norm(x, v, g, p, power), truths, strict=True):
        assert not our.isnan().any()
        assert_accurate(our, truth.to(dtype), truth)


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float32, 1e-42),
        (torch.float64, 1e300),
        (torch.float64, 1e-300),
        (torch.float64, 1e-315),
    ],
    ids=str,
)
@pytest.mark.parametrize("columns", [2, 50, 20_000])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 50.0, math.inf])
def test_gradient_norm_does_not_overflow_or_underflow(
    p: float, columns: int, dtype: torch.dtype, magnitude: float
) -> None:
    x = random_rows((3, columns), torch.float64, 1.0).clamp(-2, 2)
    tiny = (x * magnitude).to(dtype)
    v, g = random_rows((3, columns), dtype, 0.5), random_values(3, dtype)
    scaled = tiny.double() / magnitude  # the norm is homogeneous: the truth of an input of ordinary size
    scaled[2] = 0
    tiny[2] = 0
    n = torch.linalg.vector_norm(scaled, p, 1)
    result, gx = run_gradient_norm(tiny, v, g, p, 1.0)[:2]
    subnormal = dtype in (torch.float32, torch.float64) and magnitude < torch.finfo(dtype).smallest_normal
    tolerance = 1e-2 if subnormal else 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(result.double() / magnitude, n, rtol=tolerance, atol=0)
    truth = true_gradient_norm(scaled, v, g, p, 1.0)[1]
    torch.testing.assert_close(gx.double(), truth, rtol=tolerance, atol=tolerance * truth.abs().max().item())


@pytest.mark.parametrize("columns", [1, 10, 64, 1000])
def test_gradient_norm_of_rows_of_every_magnitude(columns: int) -> None:
    """Neighbouring rows on either side of the range where squares are summed without a scale, and zero rows."""
    exponents = torch.arange(-120, 121, 3, dtype=torch.float64)
    x = random_rows((len(exponents), columns), torch.float64)
    x = (x * torch.exp2(exponents)[:, None]).float()
    x[::7] = 0
    truth = x.double().norm(dim=1)
    result, saved = native.gradient_norm(x, 2.0, 1.0, False)
    assert saved.shape == (len(x), 0)  # the result is all that the backwards need
    torch.testing.assert_close(result.double(), truth, rtol=1e-6, atol=0.0)
    _, norms = native.gradient_norm(x, 2.0, 2.0, False)
    assert torch.equal(result, norms[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 50, 20_000])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_gradient_norm_of_infinities(p: float, columns: int, dtype: torch.dtype) -> None:
    x = random_rows((5, columns), dtype)
    x[0, 1] = math.inf
    x[1, 0] = -math.inf
    x[2, 2] = math.nan
    x[3, 0], x[3, 1] = math.inf, math.nan
    x[4, 0], x[4, 1] = math.inf, math.inf
    result = native.gradient_norm(x, p, 1.0, False)[0]
    assert torch.equal(result[[0, 1, 4]], x.new_full((3,), math.inf))
    assert result[2:4].isnan().all()
