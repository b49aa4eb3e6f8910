"""All CPU kernels: strides, threads, and every instruction set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import (
    DTYPES,
    check_cross_entropy,
    check_gradient_norm,
    check_logsumexp,
    native,
    needs_kernels,
    random_rows,
    random_values,
    run_gradient_norm,
    run_logsumexp,
)
from kernel_cases import with_row_stride
from threads import assert_same_bits_with_any_number_of_threads
from torch import Tensor

pytestmark = needs_kernels


def strided(x: Tensor, kind: str) -> Tensor:
    """The same values by other strides."""
    if kind == "row stride":
        return with_row_stride(x, 2, 3)
    if kind == "expanded rows":
        return x[:1].expand_as(x)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(33, 10), (5, 70), (2, 16_400)], ids=str)
@pytest.mark.parametrize("kind", ["row stride", "expanded rows", "expanded g", "strided g"])
def test_strides(kind: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    x = strided(random_rows(size, dtype, 3.0), kind)
    v = strided(random_rows(size, dtype, 1.0) + 1, kind)  # so that Σ v s does not cancel
    g = random_values(size[0], dtype)
    if kind == "expanded g":
        g = g[:1].expand(size[0])
    elif kind == "strided g":
        g = torch.stack((g, g + 1), 1)[:, 0]
    check_logsumexp(x, v, g)
    check_cross_entropy(x, v, (g, g), torch.arange(size[0]) % size[1], 0.1)
    check_cross_entropy(x, v, (g, g), strided(random_rows(size, dtype).float().softmax(1).to(dtype), kind), 0.0)
    for p in (1.0, 2.0, 3.0, math.inf):
        check_gradient_norm(x, v, g, p, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_column_of_any_stride(dtype: torch.dtype) -> None:
    x = random_rows((9, 4), dtype)[:, 1:2]
    check_logsumexp(x, x, random_values(9, dtype))
    check_gradient_norm(x, x, random_values(9, dtype), 2.0, 1.0)


def test_no_rows() -> None:
    x, g, target = torch.zeros(0, 5), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert [tuple(r.shape) for r in native.logsumexp(x, False)] == [(0,), (0, 0)]
    assert native.logsumexp_backward(g, x, g).shape == (0, 5)
    assert [tuple(r.shape) for r in native.logsumexp_double_backward(x, g, x, g)] == [(0,), (0, 5)]
    assert [tuple(r.shape) for r in native.cross_entropy(x, target, 0.0, -100, False)] == [(0,), (0,), (0, 0)]
    assert native.cross_entropy_backward(g, g, x, target, g, 0.0, -100).shape == (0, 5)
    assert [tuple(r.shape) for r in native.gradient_norm(x, 2.0, 1.0, False)] == [(0,), (0, 0)]
    assert native.gradient_norm_backward(g, x, g[:, None], 2.0, 1.0).shape == (0, 5)


@pytest.mark.parametrize("size", [(1, 300_001), (7, 50_000), (999, 10), (300, 700)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(size: tuple[int, int]) -> None:
    x, v, g = (
        random_rows(size, torch.float32),
        random_rows(size, torch.float32, 1.0),
        random_values(size[0], torch.float32),
    )
    assert_same_bits_with_any_number_of_threads(
        lambda: (*run_logsumexp(x, v, g), *(r for p in (2.0, 3.0) for r in run_gradient_norm(x, v, g, p, 1.0)))
    )


def test_capability_is_the_one_requested() -> None:
    assert native.cpu_capability() in ("default", "avx2", "avx512")
    requested = os.environ.get("RDS_FAST_CPU_CAPABILITY")
    assert requested is None or native.cpu_capability() == requested


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_lower_capability(capability: str) -> None:
    """This folder's tests again in a process of their own: a process chooses once, when it first uses the library."""
    order = ("default", "avx2", "avx512")
    if "RDS_FAST_CPU_CAPABILITY" in os.environ:
        pytest.skip("already in such a process")
    if order.index(native.cpu_capability()) <= order.index(capability):
        pytest.skip(f"this CPU's best capability is {native.cpu_capability()}: tested already")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    environment = os.environ | {"RDS_FAST_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
