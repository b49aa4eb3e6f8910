"""What the tests of the CUDA kernels share: where they run, which rows they get, and the comparison with float64.

They run on a GPU as torch.ops.rds_fast_native.*, and anywhere as torch.ops.rds_fast_emulated.* (``cuda_emulation``),
which has tables of its own: fewer elements, and a device so small that every path is taken.

The truth is autograd, twice, of ``rds_fast.reference`` in float64, on the same (rounded) inputs; "theirs" is the same
in the dtype itself. A sum that may cancel is judged by the size of its terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import kernel_cases
import pytest
import torch
from criteria import assert_accurate
from cuda_emulation import Device
from kernel_cases import derivatives
from torch import Tensor

from rds_fast import reference


class Machine(NamedTuple):
    """Where the kernels run: what holds the operations, and the device of their tensors."""

    kernels: Any
    device: str


class Size(NamedTuple):
    """Rows of ``columns`` elements and ``chunks`` times 16 bytes, so that every dtype takes the same path."""

    rows: int
    columns: int
    chunks: int = 0

    def of(self, dtype: torch.dtype) -> tuple[int, int]:
        return self.rows, self.columns + self.chunks * 16 // dtype.itemsize


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (
    (1, 1),  # one class: every second derivative is 0
    (3, 2),
    (101, 7),  # a tile of short rows that is not full
    (2051, 10),
    (97, 32),  # the longest row that one thread takes
    (9, 33),  # the shortest that lanes of a warp share
    (5, 257),  # in 16-bit types: whole chunks and one element
    (33, 1000),
    (10_007, 1000),  # so many that several share a warp
    (7, 4097),  # a block a row, in registers
    (5, 16_411),  # beyond the registers: few rows, so split over blocks
    (1, 262_144),
    (2, 150_528),  # 3 · 224 · 224
    (1, 1_000_003),
)
LONG_ROWS = ((300, 16_411), (150, 70_001))  # rows enough for a block each: kept in shared memory, whole and in part

# Two blocks at most, so that kernels loop over rows beyond the grid; two processors, so that few rows are enough to
# have a block each; and shared memory for 2000 chunks of two inputs.
SMALL = Device(processors=2, shared_bytes=1024 + 2000 * 32, largest_grid=2, schedule=1)
WIDE = Device(processors=132, largest_grid=2, schedule=2)  # so many that few rows are split over blocks
ONE = Device(processors=1, largest_grid=2, schedule=1)  # a single processor, which 64 rows keep busy
SHORT = ("small_rows", "small_rows", "small_rows")
STASHED = ("reduce_rows<.*, 256>", "map_rows<.*, 256>", "reduce_map_stashed")
SPLIT = ("reduce_rows<.*, 256>", "finish_rows", "map_rows<.*, 256>", "reduce_rows<.*, 256>", "map_rows<.*, 256>")


def held(reducing: int, mapping: int, both: int, chunks: int) -> tuple[str, ...]:
    """The kernels by how many threads share a row, which keep ``chunks`` each in the double backward."""
    return f"reduce_rows<.*, {reducing}>", f"map_rows<.*, {mapping}>", f"reduce_map_held<.*, {both}, {chunks}>"


class Path(NamedTuple):
    """An emulated device, and rows that take one path on it: the kernels of forward, backward and double backward."""

    device: Device
    size: Size
    kernels: tuple[str, ...]


PATHS = {  # named by where the double backward keeps a row
    "one class": Path(SMALL, Size(3, 1), SHORT),
    "a thread a row": Path(SMALL, Size(301, 7), SHORT),
    "the longest row of a thread": Path(SMALL, Size(97, 32), SHORT),
    "the shortest row of 8 lanes": Path(SMALL, Size(13, 33), held(8, 8, 8, 4)),
    "8 lanes, a row without edges": Path(SMALL, Size(13, 0, 17), held(8, 8, 8, 4)),
    "the longest row of 8 lanes": Path(SMALL, Size(13, 1, 31), held(8, 8, 8, 4)),
    "many rows, 8 lanes reduce": Path(ONE, Size(67, 3, 120), held(8, 32, 32, 4)),
    "a warp, 4 chunks a lane": Path(SMALL, Size(9, 3, 120), held(32, 32, 32, 4)),
    "a warp, 8 chunks a lane": Path(SMALL, Size(9, 3, 250), held(32, 32, 32, 8)),  # of three inputs, a block
    "a block, in registers": Path(SMALL, Size(5, 1, 700), held(256, 256, 256, 4)),
    "a block, in shared memory": Path(SMALL, Size(5, 1, 1100), STASHED),
    "a block, in shared memory in part": Path(SMALL, Size(5, 0, 2300), STASHED),
    "split over blocks": Path(WIDE, Size(3, 3, 3500), SPLIT),
}
MACHINES = (pytest.param(None, marks=pytest.mark.gpu, id="gpu"), pytest.param(SMALL, id="emulated"))
ROWS = (
    *(pytest.param(None, Size(*size), marks=pytest.mark.gpu, id=f"gpu-{size}") for size in (*SIZES, *LONG_ROWS)),
    *(pytest.param(path.device, path.size, id=f"emulated-{name}") for name, path in PATHS.items()),
)
NORMS = ((1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (1.5, 1.0), (3.0, 2.0), (math.inf, 1.0))


def random_rows(device: str, size: tuple[int, int], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(size[0] * 1_000_003 + size[1] + seed)
    return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)


def random_column(device: str, rows: int, dtype: torch.dtype, seed: int) -> Tensor:
    return random_rows(device, (rows, 1), dtype, seed)[:, 0].contiguous()


def size_of_terms(kind: str, number: int, truths: tuple[Tensor, ...], v: Tensor, *g: Tensor) -> Tensor | None:
    """(N,) the size of the terms whose difference result ``number`` is, where that can be far below it, else None."""
    largest = torch.stack([cotangent.double().abs() for cotangent in g]).amax(0)
    largest_v = v.double().abs().amax(1)
    is_dx = number == len(truths) - 1
    if kind == "cross_entropy":
        # log Σ exp(f − m), where the sum rounds to 1; a s − g q'; a s (v − Σ v s).
        return {0: torch.full_like(largest, 2.0**-6), 2: largest, len(truths) - 1: largest * largest_v}.get(number)
    if kind == "logsumexp" and is_dx:  # g s (v − Σ v s)
        return (truths[1].abs().amax(1) * largest_v).nan_to_num(0.0, 0.0)
    if kind == "gradient_norm" and is_dx and v.shape[1] <= 3:  # in one dimension the norm has no curvature
        return largest * largest_v
    return None


def check(
    kind: str,
    ours: tuple[Tensor, ...],
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    x: Tensor,
    v: Tensor,
    *g: Tensor,
) -> None:
    """Compares (results, gx, gradients of g, dx)."""
    theirs = derivatives(function, x.to(g[0].dtype), v.to(g[0].dtype), *g)
    truths = derivatives(function, x.double(), v.double(), *(cotangent.double() for cotangent in g))
    for number, (our, their, truth) in enumerate(zip(ours, theirs, truths, strict=True)):
        scale = size_of_terms(kind, number, truths, v, *g)
        if len(g) < number <= 2 * len(g):  # Σ v ∂gx/∂g
            unit = [torch.full_like(one, i == number - len(g) - 1, dtype=torch.float64) for i, one in enumerate(g)]
            terms = derivatives(function, x.double(), v.double(), *unit)[len(g)] * v.double()
            scale = terms.abs().nan_to_num(0.0, 0.0).sum(1)
            if kind == "cross_entropy":  # where s − q' is itself a small difference
                scale = torch.maximum(scale, v.double().abs().amax(1))
        assert_accurate(our, their.to(our.dtype), truth, scale)


def check_logsumexp(kernels: Any, x: Tensor, v: Tensor, g: Tensor) -> None:
    ours = kernel_cases.run_logsumexp(kernels, x, v, g)
    check("logsumexp", ours, lambda x: reference.logsumexp(x, 1), x, v, g)


def check_cross_entropy(
    kernels: Any, x: Tensor, v: Tensor, g: tuple[Tensor, Tensor], target: Tensor, smoothing: float
) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return reference.cross_entropy_with_logsumexp(x, target, smoothing)

    ours = kernel_cases.run_cross_entropy(kernels, x, v, g, target, smoothing)
    check("cross_entropy", ours, function, x, v, *g)


def check_gradient_norm(kernels: Any, x: Tensor, v: Tensor, g: Tensor, p: float, power: float) -> None:
    ours = kernel_cases.run_gradient_norm(kernels, x, v, g, p, power)
    check("gradient_norm", ours, lambda x: reference.gradient_norm(x, p, power), x, v, g)


def targets(x: Tensor) -> Iterator[Tensor]:
    indices = torch.arange(x.shape[0], device=x.device) * 7919 % x.shape[1]
    indices[2::5] = -100
    yield indices
    probabilities = random_rows(x.device.type, (x.shape[0], x.shape[1]), x.dtype, 5).float().softmax(1) * 0.9
    yield probabilities.to(x.dtype)
    if x.dtype in (torch.bfloat16, torch.float16):
        yield probabilities
