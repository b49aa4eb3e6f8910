"""Compiles every Triton kernel, as the launchers launch it, for GPUs that need not be there, and reads its cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The file that compiles some families, and how many kernels they have at least.
WORKERS = [
    ("compile_kernels.py", 15),  # five kinds for each of three families
    ("compile_group_norm.py", 8),
    ("compile_batch_norm.py", 11),  # three for each order, and two of eval mode
]
ROOT = Path(__file__).parents[2]

# Bytes of stack by release of Triton, kernel and case. 3.7 takes none; in the second case registers are not short.
STACK = {
    ("3.6", "group_norm_double_backward._double_backward_kernel", "64x8192x1 in 1 bfloat16"): 8,
    ("3.6", "batch_norm_backward._backward_sums_kernel", "256x64x56x56 contiguous_format float32"): 8,
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(("worker", "fewest"), WORKERS)
def test_kernels_compile_without_spills(worker: str, fewest: int, target: str) -> None:
    triton_release = pytest.importorskip("triton").__version__.rpartition(".")[0]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(worker)), target],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    forgotten = [report["kernel"] for report in reports if not report["launched"]]
    assert not forgotten, f"no case of {worker} launches {forgotten}"
    assert len({report["kernel"] for report in reports}) >= fewest
    assert all(report["bytes"] > 0 for report in reports)
    if target.startswith("sm_"):
        spilled = [
            r for r in reports if r["local"] or r["stack"] > STACK.get((triton_release, r["kernel"], r["case"]), 0)
        ]
        assert not spilled, spilled
        # 65,536 registers a multiprocessor: else a launch fails, which no compiler says
        too_wide = [report for report in reports if report["registers"] * 32 * report["num_warps"] > 65_536]
        assert not too_wide, too_wide
        # The launches that sum channels run in one wave: four programs of four warps on each multiprocessor.
        in_one_wave = ("batch_norm._statistics_kernel", "batch_norm_double_backward._double_backward_sums_kernel")
        in_one_wave += ("batch_norm_backward._backward_sums_kernel",)
        sums = [r for r in reports if r["kernel"] in in_one_wave and "float64" not in r["case"]]
        assert bool(sums) == (worker == "compile_batch_norm.py")
        assert all(report["registers"] <= 128 for report in sums), sums
