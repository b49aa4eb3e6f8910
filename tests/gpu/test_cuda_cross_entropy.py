"""The CUDA kernels of the cross-entropy with its log-sum-exp, on a GPU and emulated."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from criteria import assert_accurate
from cuda_cases import (
    DTYPES,
    MACHINES,
    ROWS,
    SMALL,
    Machine,
    Size,
    check_cross_entropy,
    random_column,
    random_rows,
    targets,
)
from kernel_cases import with_infinite_logits

from rds_fast import reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("machine", "size"), ROWS, indirect=["machine"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing: float, machine: Machine, size: Size, dtype: torch.dtype) -> None:
    kernels, device = machine
    x, v = random_rows(device, size.of(dtype), dtype, 1, 3.0), random_rows(device, size.of(dtype), dtype, 2)
    g = random_column(device, size.rows, dtype, 3), random_column(device, size.rows, dtype, 4)
    for target in targets(x):
        check_cross_entropy(kernels, x, v, g, target, smoothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [4, 50, 20_000])
@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_cross_entropy_infinities(machine: Machine, columns: int, dtype: torch.dtype) -> None:
    kernels, device = machine
    x, target = with_infinite_logits(random_rows(device, (7, columns), dtype, 1))
    ce, lse, _ = kernels.cross_entropy(x, target, 0.0, -100, False)
    truth = torch.nn.functional.cross_entropy(x.double(), target, reduction="none")
    assert_accurate(ce, truth.to(dtype), truth)
    assert_accurate(lse, lse, torch.logsumexp(x.double(), 1))


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("columns", [10, 1000, 20_000])
@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_cross_entropy_of_large_logits_does_not_cancel(machine: Machine, columns: int, offset: float) -> None:
    kernels, device = machine
    x = random_rows(device, (6, columns), torch.float32, 1) + offset
    for target in targets(x):
        for smoothing in (0.0, 0.1):
            truth = reference.cross_entropy_with_logsumexp(x.double(), target, smoothing)[0]
            theirs = reference.cross_entropy_with_logsumexp(x, target, smoothing)[0]
            assert_accurate(kernels.cross_entropy(x, target, smoothing, -100, False)[0], theirs, truth)


@pytest.mark.parametrize("machine", [SMALL], indirect=True, ids=["emulated"])
@pytest.mark.parametrize("columns", [10, 1000])
def test_bad_index_is_seen_before_it_is_used(machine: Machine, columns: int) -> None:
    kernels, _ = machine
    for index in (-1, columns):
        target = torch.tensor([0, 1, index, 3])
        with pytest.raises(RuntimeError, match="the target is not a class index"):
            kernels.cross_entropy(torch.zeros(4, columns), target, 0.0, -100, False)


@pytest.mark.gpu
@pytest.mark.usefixtures("native_cuda")
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
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "stopped" in process.stdout, process.stdout + process.stderr
    assert "the target is not a class index" in process.stdout + process.stderr
