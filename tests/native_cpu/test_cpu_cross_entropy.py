"""The CPU kernels of the cross-entropy with its log-sum-exp."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import (
    DTYPES,
    SIZES,
    TARGETS,
    assert_accurate,
    check_cross_entropy,
    native,
    needs_kernels,
    random_rows,
    random_target,
    random_values,
    true_cross_entropy,
)
from kernel_cases import with_infinite_logits

pytestmark = needs_kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", TARGETS)
def test_cross_entropy(kind: str, smoothing: float, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, v = random_rows(size, dtype), random_rows(size, dtype, 0.7)
    g = random_values(size[0], dtype), random_values(size[0], dtype).neg() * 0.5
    check_cross_entropy(x, v, g, random_target(kind, x), smoothing)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("columns", [10, 1000])
def test_cross_entropy_full_precision(columns: int, kind: str) -> None:
    x = random_rows((5, columns), torch.bfloat16)
    g = random_values(5, torch.float32), random_values(5, torch.float32) * 2
    ce, lse, saved = native.cross_entropy(x, random_target(kind, x), 0.1, -100, True)
    assert (ce.dtype, lse.dtype, tuple(saved.shape)) == (torch.float32, torch.float32, (5, 0))
    check_cross_entropy(x, random_rows((5, columns), torch.bfloat16, 0.5), g, random_target(kind, x), 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("columns", [4, 50])
def test_cross_entropy_infinities(columns: int, kind: str, smoothing: float, dtype: torch.dtype) -> None:
    """PyTorch's values: of the forward in every case, of the backward where the row has a finite log-sum-exp."""
    x, target = with_infinite_logits(random_rows((7, columns), dtype))
    if kind == "probabilities":
        target = torch.full((7, columns), 1.0 / columns, dtype=dtype)
        target[:, 2:] = 0
    ce, lse, saved = native.cross_entropy(x, target, smoothing, -100, False)
    truth = F.cross_entropy(
        x.double(), target.double() if kind == "probabilities" else target, reduction="none", label_smoothing=smoothing
    )
    assert_accurate(ce, truth.to(dtype), truth)
    assert_accurate(lse, lse, torch.logsumexp(x.double(), 1))
    kept = saved.flatten() if saved.shape[1] else lse
    g = random_values(7, dtype)
    gx = native.cross_entropy_backward(g, g, x, target, kept, smoothing, -100)
    formula = true_cross_entropy(x, x, (g, g), target, smoothing)[2]
    assert_accurate(gx[3:5], formula[3:5].to(dtype), formula[3:5])
    assert gx[0].isnan().all()
    assert gx[2].isnan().all()


@pytest.mark.parametrize("columns", [10, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_cross_entropy_of_large_logits_does_not_cancel(offset: float, smoothing: float, columns: int) -> None:
    x = random_rows((6, columns), torch.float32) + offset
    for kind in TARGETS:
        target = random_target(kind, x)
        ce = native.cross_entropy(x, target, smoothing, -100, False)[0]
        theirs = F.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)
        truth = F.cross_entropy(
            x.double(),
            target.double() if target.is_floating_point() else target,
            reduction="none",
            label_smoothing=smoothing,
        )
        assert_accurate(ce, theirs, truth)
