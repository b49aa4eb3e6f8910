"""What the tests of the CUDA kernels, torch.ops.rds_fast_native.*, share: inputs and the comparison with float64.

The truth is autograd, twice, of ``rds_fast.reference`` in float64, on the same (rounded) inputs; "theirs" is the same
in the dtype itself. A sum that may cancel is judged by the size of its terms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import kernel_cases
import torch
from criteria import assert_accurate
from kernel_cases import derivatives
from torch import Tensor

from rds_fast import reference

native = torch.ops.rds_fast_native
run_logsumexp = functools.partial(kernel_cases.run_logsumexp, native)
run_cross_entropy = functools.partial(kernel_cases.run_cross_entropy, native)
run_gradient_norm = functools.partial(kernel_cases.run_gradient_norm, native)

DEVICE = "cuda"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (
    (1, 1),  # one class: every second derivative is 0
    (3, 2),
    (101, 7),  # a tile of short rows that is not full
    (2051, 10),
    (97, 32),  # the longest row that one thread takes
    (9, 33),  # the shortest that a warp takes
    (5, 257),  # in 16-bit types: whole chunks and one element
    (33, 1000),
    (7, 4097),  # a block a row, in registers
    (5, 16_411),  # beyond the registers: few rows, so split over blocks
    (1, 262_144),
    (2, 150_528),  # 3 · 224 · 224
    (1, 1_000_003),
)
LONG_ROWS = ((300, 16_411), (150, 70_001))  # rows enough for a block each: kept in shared memory, whole and in part
NORMS = ((1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (1.5, 1.0), (3.0, 2.0), (math.inf, 1.0))


def random_rows(size: tuple[int, int], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(size[0] * 1_000_003 + size[1] + seed)
    return (torch.randn(size, generator=generator, device=DEVICE) * scale).to(dtype)


def random_column(rows: int, dtype: torch.dtype, seed: int) -> Tensor:
    return random_rows((rows, 1), dtype, seed)[:, 0].contiguous()


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


def check_logsumexp(x: Tensor, v: Tensor, g: Tensor) -> None:
    check("logsumexp", run_logsumexp(x, v, g), lambda x: reference.logsumexp(x, 1), x, v, g)


def check_cross_entropy(x: Tensor, v: Tensor, g: tuple[Tensor, Tensor], target: Tensor, smoothing: float) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return reference.cross_entropy_with_logsumexp(x, target, smoothing)

    check("cross_entropy", run_cross_entropy(x, v, g, target, smoothing), function, x, v, *g)


def check_gradient_norm(x: Tensor, v: Tensor, g: Tensor, p: float, power: float) -> None:
    check(
        "gradient_norm", run_gradient_norm(x, v, g, p, power), lambda x: reference.gradient_norm(x, p, power), x, v, g
    )


def targets(x: Tensor) -> Iterator[Tensor]:
    indices = torch.arange(x.shape[0], device=DEVICE) * 7919 % x.shape[1]
    indices[2::5] = -100
    yield indices
    probabilities = random_rows((x.shape[0], x.shape[1]), x.dtype, 5).float().softmax(1) * 0.9
    yield probabilities.to(x.dtype)
    if x.dtype in (torch.bfloat16, torch.float16):
        yield probabilities
