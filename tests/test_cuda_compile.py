"""Every CUDA file compiles for an H200, with no register spilled and no kernel that is long. Needs nvcc, no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURE = "sm_90"
REGISTERS_OF_A_MULTIPROCESSOR = 65536
LONGEST = 4000  # instructions of a kernel's PTX: compiling takes as long as they are many
PAIRED = r"(?:cvt\.rn|max)\.b?f16x2"  # instructions for two 16-bit numbers
KERNELS = ("small_rows", "reduce_rows", "finish_rows", "map_rows", "reduce_map_held", "reduce_map_stashed")


class Kernel(NamedTuple):
    registers: int
    stack_bytes: int
    spill_bytes: int
    threads: int  # of a block, its launch bound
    resident_blocks: int  # that must fit on a multiprocessor together


def compile_kernels(source: Path, folder: Path, architecture: str = ARCHITECTURE) -> tuple[dict[str, Kernel], str]:
    """What ptxas reports of each kernel, by its mangled name, and the PTX that it read."""
    include = Path(torch.__file__).parent / "include"
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        f"-arch={architecture}",
        "-DTORCH_TARGET_VERSION=((2ULL << 56) | (11ULL << 48))",
    ]
    command += [f"-I{include}", "-DUSE_CUDA", "-Xcompiler=-fPIC", "-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
    command += ["-c", str(source), "-o", str(folder / "kernels.o")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    (ptx_file,) = folder.glob("*.ptx")
    ptx = ptx_file.read_text()
    bounds = {
        name: (int(threads), int(blocks))
        for name, threads, blocks in re.findall(
            r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)(?:, \d+, \d+)?\s*\.minnctapersm (\d+)", ptx
        )
    }
    kernels = {}
    for entry in process.stderr.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", entry)[1]
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+) ", entry).groups())
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        assert name in bounds, f"{name} has no launch bounds with both of its numbers"
        kernels[name] = Kernel(registers, stack, stores + loads, *bounds[name])
    return kernels, ptx


def test_there_are_files() -> None:
    assert [source.stem for source in SOURCES] == ["cross_entropy", "gradient_norm", "logsumexp"]


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_kernel_spills_or_is_long(source: Path, tmp_path: Path) -> None:
    kernels, ptx = compile_kernels(source, tmp_path)
    for family in KERNELS:
        assert any(family in name for name in kernels), f"{family} was not compiled"
    for name, kernel in kernels.items():
        assert kernel.spill_bytes == 0, f"{name} spills {kernel.spill_bytes} bytes"
        assert kernel.stack_bytes == 0, f"{name} has a stack frame of {kernel.stack_bytes} bytes"
        allocated = -(-kernel.registers // 8) * 8  # registers are given out in eights
        warps = -(-kernel.threads // 32) * kernel.resident_blocks
        assert allocated * 32 * warps <= REGISTERS_OF_A_MULTIPROCESSOR, f"{name}: {kernel}"
    for entry in ptx.split(".entry ")[1:]:
        name, _, body = entry.partition("(")
        length = body.partition("\n}")[0].count(";\n")
        assert length <= LONGEST, f"{name} has {length} instructions"
    assert "ld.global.nc.L1::no_allocate.v4.u32" in ptx  # the 16-byte loads are there
    assert re.search(r"st\.global\.v4\.[bu]32", ptx)
    assert set(re.findall(PAIRED, ptx)) == {"cvt.rn.bf16x2", "cvt.rn.f16x2", "max.bf16x2", "max.f16x2"}


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_gpus_without_paired_instructions(tmp_path: Path) -> None:
    """A build for the GPU that is present may be for one older than sm_80, the first with instructions for pairs."""
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    if "sm_75" not in known.split():
        pytest.skip("this nvcc compiles for no GPU so old")
    kernels, ptx = compile_kernels(SOURCES[-1], tmp_path, "sm_75")
    assert kernels
    assert not re.search(PAIRED, ptx)
