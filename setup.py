"""Drives the native build; CMakeLists.txt describes it.

Without a C++ compiler, CMake, Ninja or make, or PyTorch (an isolated build sees none) the package is installed without
native kernels and runs on PyTorch and Triton alone. Environment variables:

- ``RDS_FAST_NATIVE`` = auto | 0 | 1: all native code; 1 fails rather than going on without;
- ``RDS_FAST_CUDA`` = auto | 0 | 1: the CUDA kernels, which need nvcc but no GPU;
- ``RDS_FAST_CUDA_ARCHITECTURES``, such as ``90`` or ``80;90``: default the GPUs present, else all.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"
OLDEST_TORCH = (2, 11)
COMMAND = "pip install cmake ninja pybind11 && pip install --no-build-isolation ."


def setting(name: str) -> str:
    value = os.environ.get(name, "auto") or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} is {value!r}; it must be auto, 0 or 1")
    return value


def program(*names: str) -> str | None:
    """A program on PATH or beside this Python, which need not be on PATH."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def obstacle() -> str | None:
    """Why the native kernels cannot be built here; None if they can."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not visible to the build (pip isolates builds by default)"
    torch = version("torch")
    if tuple(int(part) for part in torch.split(".")[:2]) < OLDEST_TORCH:
        return f"PyTorch {torch} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if os.environ.get("CXX") is None and program("c++", "g++", "clang++") is None:
        return "no C++ compiler was found (CXX, c++, g++, clang++); the system's package is often named g++"
    if program("cmake") is None:
        return "CMake was not found; pip install cmake, or install the system's package cmake"
    if generator() is None:
        return (
            "neither Ninja nor make was found; pip install ninja, or install the system's package ninja-build or make"
        )
    return None


def generator() -> tuple[str, str] | None:
    """CMake's name for what runs the compiler, and the path of that; Ninja where it is."""
    for name, tool in (("Ninja", "ninja"), ("Unix Makefiles", "make")):
        found = program(tool)
        if found is not None:
            return name, found
    return None


class BuildNative(build_ext):
    """Configures and builds with CMake. The build folder is kept, so a second build does what changed only."""

    def run(self) -> None:
        package = ROOT / "rds_fast" if self.inplace else Path(self.build_lib).resolve() / "rds_fast"
        cmake, (generator_name, make_program) = program("cmake"), generator()
        cache = BUILD / "CMakeCache.txt"
        of_this_build = (f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n", f"CMAKE_GENERATOR:INTERNAL={generator_name}\n")
        if cache.exists() and not all(line in cache.read_text(encoding="utf-8") for line in of_this_build):
            cache.unlink()  # the project was moved or copied, or Ninja came or went
        os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))  # make alone would run one compiler
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", generator_name, "--log-level=STATUS"),
            f"-DCMAKE_MAKE_PROGRAM={make_program}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRDS_FAST_OUTPUT={package}",
            f"-DRDS_FAST_CUDA={setting('RDS_FAST_CUDA')}",
            f"-DRDS_FAST_CUDA_ARCHITECTURES={os.environ.get('RDS_FAST_CUDA_ARCHITECTURES', '')}",
        ]
        # All that compiles is built, though a file does not: the kernels for the CPU, say, without those for CUDA.
        build = [cmake, "--build", str(BUILD), "--", "-k", *(["0"] if generator_name == "Ninja" else [])]
        for command in (configure, build):
            if subprocess.run(command).returncode != 0:
                raise SystemExit("rds_fast: the native build failed; RDS_FAST_NATIVE=0 installs without it")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def extensions() -> list[Extension]:
    """One name that stands for the whole native build, or nothing."""
    native = setting("RDS_FAST_NATIVE")
    reason = "RDS_FAST_NATIVE is 0" if native == "0" else obstacle()
    if reason is None:
        return [Extension("rds_fast._native", sources=[])]
    if native == "1":
        raise SystemExit(f"rds_fast: RDS_FAST_NATIVE is 1, and the native kernels cannot be built: {reason}")
    print(f"rds_fast: built without native kernels: {reason}.\nThis builds them: {COMMAND}", file=sys.stderr)
    return []


setup(license="BSD-3-Clause", ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
