"""The build goes on without what is missing and says so, unless it was told to fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SYSTEM_PATH = "/usr/bin:/bin"


def run_setup(python: str | Path = sys.executable, **variables: str) -> subprocess.CompletedProcess[str]:
    """``setup.py --name`` decides what would be built and builds nothing."""
    pytest.importorskip("setuptools")
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | variables
    command = [str(python), "-W", "ignore", "setup.py", "--name"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_compiler_the_reason_and_the_command_are_printed() -> None:
    run = run_setup(PATH="/nonexistent")
    assert run.returncode == 0, run.stderr
    assert "without native kernels: no C++ compiler was found" in run.stderr
    assert "pip install --no-build-isolation ." in run.stderr


def test_without_a_compiler_it_fails_if_told_to() -> None:
    run = run_setup(PATH="/nonexistent", RDS_FAST_NATIVE="1")
    assert run.returncode != 0
    assert "RDS_FAST_NATIVE is 1" in run.stderr
    assert "no C++ compiler was found" in run.stderr


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """This Python in a folder of its own, without the programs beside it, and beside it in tools/ a C++ compiler."""
    tools = tmp_path / "tools"
    tools.mkdir()
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    (tools / "c++").symlink_to(compiler)
    (tmp_path / "python").symlink_to(sys.executable)
    return tmp_path / "python"


@pytest.mark.parametrize(
    ("programs", "reason"),
    [
        ((), "CMake was not found; pip install cmake, or install the system's package cmake"),
        (
            ("cmake",),
            "neither Ninja nor make was found; pip install ninja, or install the system's package ninja-build",
        ),
        (("cmake", "make"), None),
        (("cmake", "ninja"), None),
    ],
    ids=str,
)
def test_what_the_build_needs(bare_python: Path, programs: tuple[str, ...], reason: str | None) -> None:
    """CMake, and Ninja or make: what is missing is said with the way to get it."""
    tools = bare_python.parent / "tools"
    for name in programs:
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    site_packages = str(Path(torch.__file__).parents[1])
    run = run_setup(python=bare_python, PATH=str(tools), PYTHONPATH=site_packages, RDS_FAST_NATIVE="1")
    assert (run.returncode == 0) == (reason is None), run.stderr
    assert reason is None or f"RDS_FAST_NATIVE is 1, and the native kernels cannot be built: {reason}" in run.stderr


def test_native_code_can_be_left_out() -> None:
    run = run_setup(RDS_FAST_NATIVE="0")
    assert run.returncode == 0
    assert "without native kernels: RDS_FAST_NATIVE is 0" in run.stderr


def test_an_unknown_setting() -> None:
    run = run_setup(RDS_FAST_NATIVE="yes")
    assert run.returncode != 0
    assert "RDS_FAST_NATIVE is 'yes'; it must be auto, 0 or 1" in run.stderr


def configure(folder: Path, cuda: str) -> subprocess.CompletedProcess[str]:
    """CMake's configuration where nvcc is not there."""
    scripts = str(Path(sys.executable).parent)
    cmake = shutil.which("cmake", path=os.pathsep.join([scripts, os.environ.get("PATH", "")]))
    ninja = shutil.which("ninja", path=os.pathsep.join([scripts, os.environ.get("PATH", "")]))
    if cmake is None or ninja is None or shutil.which("c++", path=SYSTEM_PATH) is None:
        pytest.skip("needs cmake, ninja and a C++ compiler")
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "CUDA_PATH")}
    command = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DRDS_FAST_CUDA={cuda}", "-Dnvcc=/nonexistent/nvcc"]
    return subprocess.run(command, env=environment | {"PATH": SYSTEM_PATH}, capture_output=True, text=True)


def test_without_nvcc_the_cuda_kernels_are_left_out(tmp_path: Path) -> None:
    run = configure(tmp_path, "auto")
    assert run.returncode == 0, run.stderr
    assert "CUDA kernels: left out" in run.stdout + run.stderr


def test_without_nvcc_it_fails_if_told_to(tmp_path: Path) -> None:
    run = configure(tmp_path, "1")
    assert run.returncode != 0
    assert "RDS_FAST_CUDA" in run.stdout + run.stderr


def test_the_libraries_hold_no_path_of_this_machine() -> None:
    libraries = sorted((ROOT / "rds_fast").glob("*.so"))
    if not libraries:
        pytest.skip("the native kernels were not built")
    for library in libraries:
        content = library.read_bytes()
        for folder in (ROOT, Path(torch.__file__).parent):
            assert f"{folder}/".encode() not in content, f"{library.name} names {folder}"


def test_the_build_information_is_of_this_torch() -> None:
    build_info = pytest.importorskip("rds_fast._build_info").build_info()
    assert build_info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "default" in build_info["cpu_capabilities"]
