"""The CUDA kernels on a machine without a GPU: builds and loads csrc/tests/cuda_emulation, and sets its device up.

The operations are ``torch.ops.rds_fast_emulated.*``, for CPU tensors, from the very files that nvcc compiles. What the
emulation finds wrong, and a GPU would punish or leave undefined, is a RuntimeError that names kernel, block and thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rds_fast import backends

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "cuda_emulation"
OPERATIONS = [
    f"{operation}{derivative}"
    for operation in ("logsumexp", "cross_entropy", "gradient_norm")
    for derivative in ("", "_backward", "_double_backward")
]


class Device(NamedTuple):
    """The properties of the emulated GPU. ``schedule`` is the seed of the order in which its threads run; 0: theirs."""

    processors: int = 132
    shared_bytes: int = 227 * 1024
    largest_grid: int = 2**31 - 1  # more blocks than this are not run, so that kernels loop over what is beyond
    schedule: int = 0


H200 = Device()


class Launch(NamedTuple):
    kernel: str  # its name with its template arguments, without namespaces
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int


def program(*names: str) -> str | None:
    """A program on PATH or beside this Python."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def obstacle() -> str | None:
    """Why the emulation cannot be built here; None if it can."""
    if not sys.platform.startswith("linux"):
        return "it is written for Linux"
    if backends.failure("native", "cpu") is not None:
        return f"the native library, which has the schemas: {backends.failure('native', 'cpu')}"
    if program("c++", "g++", "clang++") is None and "CXX" not in os.environ:
        return "needs a C++ compiler"
    if program("cmake") is None or program("ninja", "make") is None:
        return "needs CMake, and Ninja or make"
    return None


def build() -> Path:
    """The library, built if it is older than its sources: about half a minute on one core."""
    import fcntl  # which Windows lacks

    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with FOLDER.with_suffix(".lock").open("w") as lock:  # tests run side by side, each process would build it
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build_alone()


def _build_alone() -> Path:
    cache = FOLDER / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        shutil.rmtree(FOLDER)  # the project was moved or copied
    ninja = program("ninja")
    cmake, tool = str(program("cmake")), ninja or program("make")
    configure = [cmake, "-S", str(ROOT), "-B", str(FOLDER), "-G", "Ninja" if ninja else "Unix Makefiles"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool}", f"-DPython_EXECUTABLE={sys.executable}", "-DRDS_FAST_CUDA=0"]
    compile_it = [cmake, "--build", str(FOLDER), "--target", "_cuda_emulation", "--parallel", str(os.cpu_count())]
    for command in (configure, compile_it):
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout + process.stderr
    return FOLDER / "csrc" / "tests" / "cuda_emulation" / "_cuda_emulation.so"


@functools.cache
def load() -> tuple[ctypes.CDLL, torch.library.Library]:
    """The library's own functions, and the declarations of its operations, which hold as long as the object lives."""
    path = build()
    declarations = torch.library.Library("rds_fast_emulated", "DEF")
    for name in OPERATIONS:
        schema = getattr(torch.ops.rds_fast_native, name).default._schema
        declarations.define(str(schema).removeprefix("rds_fast_native::"))
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.cuda_emulation_take_launches.restype = ctypes.c_char_p
    return library, declarations


@contextmanager
def emulated(device: Device = H200) -> Iterator[Any]:
    """The operations on such a device. CPU tensors made meanwhile are guarded: an access outside of one is an error."""
    reason = obstacle()
    if reason is not None:
        pytest.skip(f"the CUDA kernels' emulation: {reason}")
    library, _ = load()
    library.cuda_emulation_set(*device)
    library.cuda_emulation_guard_memory(True)
    try:
        yield torch.ops.rds_fast_emulated
    finally:
        library.cuda_emulation_guard_memory(False)


def launches() -> list[Launch]:
    """What was launched since the last call."""
    library, _ = load()
    result = []
    for line in library.cuda_emulation_take_launches().decode().splitlines():
        name, grid, block, shared_bytes = line.split("|")
        sizes = tuple(int(size) for size in grid.split(","))
        result.append(Launch(name, sizes, int(block.split(",")[0]), int(shared_bytes)))
    return result
