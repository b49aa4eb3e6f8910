"""Runs the files of cases in processes of their own, where Triton's interpreter takes the compiler's place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def release(distribution: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(distribution).split(".")[:2])


@pytest.mark.parametrize(
    "file", ["interpreter_cases.py", "activation_cases.py", "group_norm_cases.py", "batch_norm_cases.py"]
)
def test_kernels_in_the_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("Triton before 3.7, interpreted, takes int() of an array of one value, which NumPy 2.4 refuses")
    cases = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(cases)]
    # numpy warns of log 0 and inf − inf, which are meant, where a GPU does not
    command += ["-W", "ignore::RuntimeWarning"]
    # and, until 2.4 refused, of the int() of an array of one value that Triton took before 3.7
    command += ["-W", "ignore:Conversion of an array with ndim > 0:DeprecationWarning"]
    # The arrays are small: threads would only wait for one another.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    summary = run.stdout.strip().rpartition("\n")[2]
    passed = re.fullmatch(r"(\d+) passed in .*", summary)  # nothing failed, was skipped or was deselected
    assert run.returncode == 0, run.stdout + run.stderr
    assert passed, run.stdout + run.stderr
    functions = len(re.findall(r"^def test_", cases.read_text(), re.MULTILINE))
    assert int(passed.group(1)) > functions  # every function, many of them with several cases
