"""Compiles what the launchers launch, for a GPU that need not be there, and prints one JSON line for each kernel.

Run by ``test_compile.py`` in processes of their own: ``python compile_kernels.py TARGET``; files of other families
beside this one do the same for their own, by way of ``main``. The launchers are called on
meta tensors while ``JITFunction.run`` records the arguments, so the configurations compiled here are the shipped ones,
whatever the heuristics table says. A kernel that no case launches is reported with ``"launched": false``.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import rds_fast.kernels
from rds_fast.kernels import activation, cross_entropy, gradient_norm, logsumexp, rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}

# (N, C): one size for each tile of the table, the longest row that uses it, whose masks and alignment cost the most
# registers when C is odd; then long rows, many of them (one launch) and few (split over programs).
TILES = [(64, tile.limit) for tile in rows._TILES]
LONG_ROWS = [(1024, 50257), (2, 1_000_000)]
# One of each kind of code: many rows a program, a row in registers at its largest, long rows.
KINDS = [(64, 10), (64, 16384), *LONG_ROWS]
MOST_REGISTERS = {*KINDS, (64, 8192)}  # 8192: the longest row in registers for float64, and for the general p-norm


def sizes_and_dtypes(target: str) -> list[tuple[tuple[int, int], torch.dtype]]:
    """What is compiled for a target: every tile for sm_90, where the kernels are measured first, else each kind."""
    if target == "sm_90":
        cases = [(size, dtype) for size in TILES + LONG_ROWS for dtype in (torch.float32, torch.bfloat16)]
        return [*cases, ((64, 8192), torch.float64), ((2, 1_000_000), torch.float64), ((64, 1000), torch.float16)]
    return [(size, torch.bfloat16) for size in KINDS] + [((64, 16384), torch.float32), ((64, 8192), torch.float64)]


def launch_logsumexp(x: torch.Tensor, v: torch.Tensor, row: torch.Tensor, g: torch.Tensor) -> None:
    logsumexp.logsumexp(x, False)
    logsumexp.logsumexp_backward(g, x, row)
    logsumexp.logsumexp_double_backward(v, g, x, row)


def launch_cross_entropy(x: torch.Tensor, v: torch.Tensor, row: torch.Tensor, g: torch.Tensor) -> None:
    """Class indices; and probabilities, which need more registers, where they matter: not in the smaller tiles."""
    targets = [torch.empty(x.shape[0], dtype=torch.int64, device="meta"), torch.empty_like(x)]
    for target, smoothing in zip(
        targets if tuple(x.shape) in MOST_REGISTERS else targets[:1], (0.0, 0.1), strict=False
    ):
        cross_entropy.cross_entropy(x, target, smoothing, -100, False)
        cross_entropy.cross_entropy_backward(g, g, x, target, row, smoothing, -100)
        cross_entropy.cross_entropy_double_backward(v, g, g, x, target, row, smoothing, -100)


def launch_gradient_norm(x: torch.Tensor, v: torch.Tensor, row: torch.Tensor, g: torch.Tensor) -> None:
    """p = 2 at power 1, which is the default; the general code, which needs more registers; and each other case of
    p and power that the kernels tell apart, at the longest rows that stay in registers.
    """
    modes = [(2.0, 1.0)]
    if tuple(x.shape) in MOST_REGISTERS:
        modes.append((3.0, 1.5))
    if x.shape[1] in (rows._TILES[-2].limit, rows._TILES[-1].limit):
        modes += [(1.0, 1.0), (math.inf, 1.0), (2.0, 2.0)]
    for p, power in modes:
        saved = row.new_empty((x.shape[0], 2 if p == math.inf else 1))
        gradient_norm.gradient_norm(x, p, power, False)
        gradient_norm.gradient_norm_backward(g, x, saved, p, power)
        gradient_norm.gradient_norm_double_backward(v, g, x, saved, p, power)


def launch_activation(x: torch.Tensor, v: torch.Tensor, row: torch.Tensor, g: torch.Tensor) -> None:
    """Every activation at one size, which is no part of the code but for its alignment; and at an odd one."""
    kinds = ("gelu", "gelu_tanh", "silu", "mish", "softplus", "hardswish", "elu", "selu", "sigmoid", "tanh")
    if tuple(x.shape) == (64, 8192):
        for kind in kinds:
            activation.activation_backward(v, x, v, kind, 1.0, 1.0)
            activation.activation_double_backward(v, v, x, kind, 1.0, 1.0)
    elif tuple(x.shape) == (64, 10):
        odd = x[:, :9].contiguous()
        activation.activation_backward(odd, odd, None, "gelu", 1.0, 1.0)
        activation.activation_double_backward(odd, odd, odd, "gelu", 1.0, 1.0)


FAMILIES: tuple[Callable[..., None], ...] = (
    launch_logsumexp,
    launch_cross_entropy,
    launch_gradient_norm,
    launch_activation,
)

# Files of kernels that have a ``compile_*.py`` of their own.
ELSEWHERE = {"channel_sums", "group_norm", "group_norm_backward", "group_norm_double_backward", "group_rows"}
ELSEWHERE |= {"channels", "batch_norm", "batch_norm_backward", "batch_norm_double_backward"}


def row_cases(target: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each input, and what launches the kernels for it."""
    for (N, C), dtype in sizes_and_dtypes(target):
        x = torch.empty(N, C, dtype=dtype, device="meta")
        row = torch.empty(N, dtype=rows.accumulation_dtype(dtype), device="meta")
        g = torch.empty(N, dtype=dtype, device="meta")
        for family in FAMILIES:
            case = f"{N}x{C} {str(dtype).removeprefix('torch.')}"
            yield case, functools.partial(family, x, torch.empty_like(x), row, g)


def kernels(files: Collection[str]) -> dict[str, JITFunction]:
    """Every kernel of these files: every compiled function whose name does not begin with ``tl_``."""
    found = {}
    for file in files:
        module = importlib.import_module(f"rds_fast.kernels.{file}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and not name.startswith("tl_"):
                found[f"{value.__module__.rpartition('.')[2]}.{name}"] = value
    return found


def signature(kernel: JITFunction, arguments: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Types, compile-time values and alignments of a launch, as the JIT derives them: torch aligns its allocations."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    alignments: dict[tuple[int], list] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            types[parameter.name] = _TYPES[value.dtype]
            alignments[(index,)] = [["tt.divisibility", 16]]
        elif (
            parameter.is_constexpr
            or value is None
            or (value == 1 and isinstance(value, int) and not parameter.do_not_specialize)
        ):
            types[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, int):
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            types[parameter.name] = "fp32"
    return types, constants, alignments


def recorded_launches(
    files: Collection[str], cases: Iterable[tuple[str, Callable[[], None]]]
) -> list[tuple[str, dict, dict, dict, int, str]]:
    """What to compile: kernel, signature and warps of each distinct launch, and the first input that led to it."""
    names = {id(kernel): name for name, kernel in kernels(files).items()}
    launches: list[tuple] = []
    seen = set()

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **options: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
        launch = (names[id(kernel)], *signature(kernel, arguments), num_warps)
        if repr(launch) not in seen:
            seen.add(repr(launch))
            launches.append((*launch, case))

    run, JITFunction.run = JITFunction.run, record
    try:
        for case, launch_kernels in cases:  # noqa: B007
            launch_kernels()
    finally:
        JITFunction.run = run
    return launches


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and of local memory, where spills go, that ptxas gave a kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        key: int(re.search(rf"{name}:(\d+)", text).group(1))  # type: ignore[union-attr]
        for key, name in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
    }


def compile_launch(target_name: str, files: Collection[str], launch: tuple) -> dict[str, Any]:
    name, types, constants, alignments, num_warps, case = launch
    target = TARGETS[target_name]
    source = ASTSource(kernels(files)[name], types, constants, alignments)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    report = {"kernel": name, "case": case, "launched": True, "num_warps": num_warps}
    if target.backend == "cuda":
        return report | {"bytes": len(compiled.asm["cubin"])} | resources(compiled.asm["cubin"])
    return report | {"bytes": len(compiled.asm["hsaco"])}


def main(target: str, files: Collection[str], cases: Iterable[tuple[str, Callable[[], None]]]) -> None:
    launches = recorded_launches(files, cases)
    for name in kernels(files).keys() - {launch[0] for launch in launches}:
        print(json.dumps({"kernel": name, "launched": False}))
    with ProcessPoolExecutor(2) as pool:
        for report in pool.map(functools.partial(compile_launch, target, files), launches, chunksize=4):
            print(json.dumps(report))


if __name__ == "__main__":
    every = {module.name for module in pkgutil.iter_modules(rds_fast.kernels.__path__)}
    main(sys.argv[1], sorted(every - ELSEWHERE), row_cases(sys.argv[1]))
