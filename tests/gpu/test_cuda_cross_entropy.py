"""The CUDA kernels of the cross-entropy with its log-sum-exp."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from criteria import assert_accurate
from cuda_cases import DTYPES, LONG_ROWS, SIZES, check_cross_entropy, native, random_column, random_rows, targets
from kernel_cases import with_infinite_logits

from rds_fast import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native_cuda")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, *LONG_ROWS], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing: float, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, v = random_rows(size, dtype, 1, 3.0), random_rows(size, dtype, 2)
    g = random_column(size[0], dtype, 3), random_column(size[0], dtype, 4)
    for target in targets(x):
        check_cross_entropy(x, v, g, target, smoothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [4, 50, 20_000])
def test_cross_entropy_infinities(columns: int, dtype: torch.dtype) -> None:
    x, target = with_infinite_logits(random_rows((7, columns), dtype, 1))
    ce, lse, _ = native.cross_entropy(x, target, 0.0, -100, False)
    truth = torch.nn.functional.cross_entropy(x.double(), target, reduction="none")
    assert_accurate(ce, truth.to(dtype), truth)
    assert_accurate(lse, lse, torch.logsumexp(x.double(), 1))


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("columns", [10, 1000, 20_000])
def test_cross_entropy_of_large_logits_does_not_cancel(columns: int, offset: float) -> None:
    x = random_rows((6, columns), torch.float32, 1) + offset
    for target in targets(x):
        for smoothing in (0.0, 0.1):
            truth = reference.cross_entropy_with_logsumexp(x.double(), target, smoothing)[0]
            theirs = reference.cross_entropy_with_logsumexp(x, target, smoothing)[0]
            assert_accurate(native.cross_entropy(x, target, smoothing, -100, False)[0], theirs, truth)


def test_bad_index_stops_the_program() -> None:
    """In a process of its own, whose CUDA context it ends."""
    program = """
import torch
from rds_fast import backends
assert backends.failure("native", "cuda") is None
logits = torch.zeros(4, 10, device="cuda")
target = torch.tensor([0, 1, 10, 3], device="cuda")
torch.ops.rds_fast_native.cross_entropy(logits, target, 0.0, -100, False)
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    assert "assert" in str(error), error
    print("stopped")
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert "stopped" in process.stdout, process.stdout + process.stderr
    assert "the target is not a class index" in process.stdout + process.stderr
