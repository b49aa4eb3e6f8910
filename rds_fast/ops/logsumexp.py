"""Log-sum-exp over any dimensions, differentiable twice.

With l = log Σ exp xᵢ and s = exp(x − l) for each row, g the cotangent of l and v the cotangent of the backward's
result:

    forward            l
    backward           gx = g s
    double backward    dg = Σ v s,   dx = g s (v − Σ v s)

The raw operations work on (N, C) rows. For 16-bit rows the backwards use a float32 l kept beside the rounded result:
with a rounded l the rows of s would sum to 0.97–1.03.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ..reference import accumulation_dtype
from .function import Function
from .inputs import check_rows
from .registration import derivative, register, third_derivative


def _forward_fake(x: Tensor, full_precision: bool, backend: str) -> tuple[Tensor, Tensor]:
    accumulated = accumulation_dtype(x.dtype)
    dtype = accumulated if full_precision else x.dtype
    saved_columns = 0 if dtype == accumulated else 1
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty((x.shape[0], saved_columns), dtype=accumulated)


# x: (N, C) of unit column stride. The result is (N,), of x's dtype or, if full_precision, of the accumulation dtype.
# saved is (N, 1), the log-sum-exp in the accumulation dtype, or (N, 0) where the result itself already is that.
_forward = register(
    "logsumexp", "logsumexp(Tensor x, bool full_precision, str backend) -> (Tensor, Tensor)", _forward_fake
)

# g: (N,), of x's dtype or the accumulation dtype. lse: (N,), contiguous, of the accumulation dtype. Result: as x.
_backward = register(
    "logsumexp",
    "logsumexp_backward(Tensor g, Tensor x, Tensor lse, str backend) -> Tensor",
    lambda g, x, lse, backend: x.new_empty(x.shape),
)

# v: (N, C) of x's dtype and unit column stride. Results: dg as g, dx as x.
_double_backward = register(
    "logsumexp",
    "logsumexp_double_backward(Tensor v, Tensor g, Tensor x, Tensor lse, str backend) -> (Tensor, Tensor)",
    lambda v, g, x, lse, backend: (g.new_empty(g.shape), x.new_empty(x.shape)),
)


def with_unit_column_stride(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, as the kernels need it, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def saved_logsumexp(lse: Tensor, saved: Tensor) -> Tensor:
    """The (N,) log-sum-exp in the accumulation dtype: the saved column, or the result where that is it already."""
    return saved.squeeze(-1) if saved.shape[-1] else lse


class LogSumExp(Function):
    """(N, C) rows to their log-sum-exp (N,)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, full_precision: bool, backend: str) -> tuple[Tensor, Tensor]:
        return _forward(x, full_precision, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, ctx.backend = inputs
        result, saved = output
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, saved_logsumexp(result, saved))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> Any:
        if g is None:
            return None, None, None
        x, lse = ctx.saved_tensors
        return derivative(LogSumExpBackward, g, x, lse.detach(), ctx.backend), None, None


class LogSumExpBackward(Function):
    """gx = g s. lse comes without a graph: the double backward's dx is the total derivative, through l too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, lse: Tensor, backend: str) -> Tensor:
        return _backward(g, x, lse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, x, lse, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, lse)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return None, None, None, None
        dg, dx = derivative(LogSumExpDoubleBackward, v, *ctx.saved_tensors, ctx.backend)
        return dg, dx, None, None


class LogSumExpDoubleBackward(Function):
    """dg = Σ v s, dx = g s (v − Σ v s): the last derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, g: Tensor, x: Tensor, lse: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return _double_backward(with_unit_column_stride(v), g, x, lse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise third_derivative("rds_fast.logsumexp")


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for a device; False for those that have none, such as meta."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off inside; nothing at all where it is off already."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()


def full_precision(x: Tensor) -> bool:
    """Whether a 16-bit input gives a float32 result: under autocast, where PyTorch's own operation would as well."""
    return accumulation_dtype(x.dtype) != x.dtype and autocast_enabled(x.device)


def at_full_precision(x: Tensor) -> Tensor:
    """An input for the plain formula, whose result has its dtype."""
    return x.float() if full_precision(x) else x


def logsumexp(input: Tensor, dim: int | tuple[int, ...] = -1, keepdim: bool = False) -> Tensor:
    """The logarithm of the sum of exponentials of ``input`` over ``dim``.

    The contract is ``torch.logsumexp``'s, infinities, NaN, empty and 0-d inputs included. Differentiable twice in
    reverse mode (a third derivative raises); in forward mode, and in any mix that holds it, the plain formula runs.

    Args:
        input: any shape; float64, float32, bfloat16, float16, or an integer type, which is promoted to the default
            dtype. Rows that are not contiguous in memory over ``dim`` are copied once.
        dim: the dimension or dimensions to reduce.
        keepdim: keep the reduced dimensions with size 1.

    Returns:
        ``log Σ exp(input)``, in the dtype of ``input``; float32 for a 16-bit input under autocast. Sums are kept in
        float32 (float64 for float64).

    Raises:
        TypeError: ``input`` is not a dense tensor of these dtypes; or ``dim`` is neither an int nor a tuple of them.
        IndexError: ``dim`` is out of range.
        RuntimeError: ``dim`` names a dimension twice, or a third derivative is asked for.
    """
    check_rows("input", input, "logsumexp", integers=True)
    if not input.is_floating_point():
        input = input.to(torch.get_default_dtype())
    dims = (dim,) if type(dim) is int else _dims(dim)
    backend = select(input)
    if backend == "reference" or input.numel() == 0:
        return reference.logsumexp(at_full_precision(input), dims, keepdim)
    # The common case, on the short path.
    if input.dim() == 2 and dims in ((-1,), (1,)) and not keepdim:
        return derivative(LogSumExp, with_unit_column_stride(input), full_precision(input), backend)[0]
    reduced = _canonical_dims(dims, input.dim())
    kept = [d for d in range(input.dim()) if d not in reduced]
    kept_shape = [input.shape[d] for d in kept]
    rows = input.permute(*kept, *reduced).flatten(len(kept)) if reduced else input.reshape(1, 1)
    rows = with_unit_column_stride(rows.reshape(-1, rows.shape[-1]))
    result = derivative(LogSumExp, rows, full_precision(input), backend)[0]
    if keepdim:
        kept_shape = [1 if d in reduced else size for d, size in enumerate(input.shape)]
    return result.reshape(kept_shape)


def _dims(dim: Any) -> tuple[int, ...]:
    """The dimensions to reduce as they were given; a bool, which Python counts among the ints, is none."""
    dims = tuple(dim) if isinstance(dim, tuple | list) else (dim,)
    if not all(isinstance(d, int) and not isinstance(d, bool) for d in dims):
        raise TypeError(f"dim is {dim!r}; it must be an int or a tuple of ints")
    return dims


def _canonical_dims(dims: tuple[int, ...], rank: int) -> list[int]:
    """The reduced dimensions as sorted numbers in [0, rank); none for a 0-d input."""
    if not dims and rank:
        raise RuntimeError("dim is empty; logsumexp needs at least one dimension to reduce, as torch.logsumexp does")
    span = max(rank, 1)  # a 0-d input has one virtual dimension
    for d in dims:
        if not -span <= d < span:
            raise IndexError(f"dim is {d}; for an input of {rank} dimensions it must be in [{-span}, {span - 1}]")
    canonical = sorted(d % span for d in dims)
    if len(set(canonical)) < len(canonical):
        raise RuntimeError(f"dim is {dims}, which names a dimension twice")
    return canonical if rank else []
