"""Compiles every Triton kernel, as the launchers launch it, for GPUs that need not be there, and reads its cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("compile_kernels.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile_without_spills(target: str) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, str(WORKER), target], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    forgotten = [report["kernel"] for report in reports if not report["launched"]]
    assert not forgotten, f"no case of compile_kernels.py launches {forgotten}"
    # five kinds of kernel for each of three families, and of batch norm three for each order and two of eval mode
    assert len({report["kernel"] for report in reports}) >= 26
    assert all(report["bytes"] > 0 for report in reports)
    if target.startswith("sm_"):
        spilled = [report for report in reports if report["stack"] or report["local"]]
        assert not spilled, spilled
        # 65,536 registers a multiprocessor: else a launch fails, which no compiler says
        too_wide = [report for report in reports if report["registers"] * 32 * report["num_warps"] > 65_536]
        assert not too_wide, too_wide
        # The launches that sum channels run in one wave: four programs of four warps on each multiprocessor.
        sums = [report for report in reports if report["kernel"].endswith(("_statistics_kernel", "_sums_kernel"))]
        assert not [report for report in sums if report["registers"] > 128 and "float64" not in report["case"]]
