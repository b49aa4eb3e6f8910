"""Runs ``activation_cases.py`` in a process of its own, where Triton's interpreter takes the compiler's place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    cases = Path(__file__).with_name("activation_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(cases)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    # nothing failed or was skipped
    passed = re.fullmatch(r"(\d+) passed in .*", run.stdout.strip().rpartition("\n")[2])
    assert run.returncode == 0, run.stdout + run.stderr
    assert passed, run.stdout + run.stderr
    assert int(passed.group(1)) > len(re.findall(r"^def test_", cases.read_text(), re.MULTILINE))
