"""What the kernels of each fused operation do to memory: their launches, and their passes over each tensor.

The bench of a step's traffic counts bytes and launches by this table, and the GPU tests hold it against the profiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Cost(NamedTuple):
    """One call of an operation.

    launches: kernels. reads: passes over an argument, by its name in the schema, where they are not one. writes: passes
    over a result, by its number, where they are not one; a pass that reads it again is among them.
    """

    launches: int = 1
    reads: Mapping[str, int] = MappingProxyType({})
    writes: Mapping[int, int] = MappingProxyType({})


def _batch_norm_backward(arguments: Mapping[str, Any]) -> Cost:
    """Two passes over u and x. With y the first writes gresidual, the masked sum of both cotangents, for the second."""
    if not arguments["training"]:  # the sums are not needed for gx
        return Cost(launches=2)
    if arguments["y"] is None:
        return Cost(launches=3, reads={"u": 2, "x": 2})
    gresidual = 3
    return Cost(launches=3, reads={"x": 2}, writes={gresidual: 2})


def _batch_norm_double_backward(arguments: Mapping[str, Any]) -> Cost:
    return Cost(launches=3, reads={"v": 2, "u": 2, "x": 2}) if arguments["training"] else Cost(launches=2)


def _is_long(columns: int, x: Tensor, values: int = 1) -> bool:
    """Whether a row does not fit a tile of a kernel that keeps so many values an element."""
    return columns > 16384 // max(values, 2 if x.dtype == torch.float64 else 1)


def _parts(rows: int) -> int:
    """The launches of a reduction over long rows: where there are few, each is cut, and the parts are added up."""
    return 2 if rows <= 256 else 1


def _row_forward(arguments: Mapping[str, Any]) -> Cost:
    x = _rows_of(arguments)
    return Cost(launches=_parts(x.shape[0])) if _is_long(x.shape[1], x) else Cost()


def _row_double_backward(arguments: Mapping[str, Any]) -> Cost:
    x = _rows_of(arguments)
    if not _is_long(x.shape[1], x):
        return Cost()
    name = "logits" if "logits" in arguments else "x"
    return Cost(launches=_parts(x.shape[0]), reads={name: 2, "v": 2})


def _rows_of(arguments: Mapping[str, Any]) -> Tensor:
    return arguments["logits"] if "logits" in arguments else arguments["x"]


def _group_norm(arguments: Mapping[str, Any], gradients: str | None, tensors: tuple[str, ...]) -> Cost:
    """A pass of rows, twice over long rows, and the sums over channels, if these are asked for.

    A layer norm whose rows fit a narrow tile adds up its channels' parts as it goes, and a launch sums them up; for all
    else the sums over channels are a pass over the same tensors and such a launch.
    """
    x, groups = arguments["x"], arguments["groups"]
    row = x.shape[1] // groups * x.shape[2]
    long = _is_long(row, x, values=1 if gradients is None else 2)
    launches, reads = (_parts(x.shape[0] * groups), 2) if long else (1, 1)
    if gradients is not None and arguments[gradients]:
        in_passing = groups == 1 and x.shape[2] == 1 and row <= (2048 if x.dtype == torch.float64 else 4096)
        launches, reads = launches + (1 if in_passing else 2), reads + (0 if in_passing else 1)
    return Cost(launches=launches, reads=dict.fromkeys(tensors, reads))


# Without the prefix rds_fast::. An operation that is not named reads each tensor once and writes each result once, in
# one launch.
COSTS: dict[str, Cost | Callable[[Mapping[str, Any]], Cost]] = {
    # One pass for the channel sums, a launch that adds up its programs' parts, one pass that writes. A residual is read
    # by the last alone. In eval mode the backwards are one pass and the launch that adds up.
    "batch_norm": Cost(launches=3, reads={"x": 2}),
    "batch_norm_backward": _batch_norm_backward,
    "batch_norm_double_backward": _batch_norm_double_backward,
    "group_norm": lambda arguments: _group_norm(arguments, None, ("x",)),
    "group_norm_backward": lambda arguments: _group_norm(arguments, "affine_gradient", ("u", "x")),
    "group_norm_double_backward": lambda arguments: _group_norm(arguments, "weight_gradient", ("u", "x", "v")),
    # Rows that fit a tile are read once, in one launch, and so are all in the first backwards.
    **dict.fromkeys(("logsumexp", "cross_entropy", "gradient_norm"), _row_forward),
    **dict.fromkeys(
        ("logsumexp_double_backward", "cross_entropy_double_backward", "gradient_norm_double_backward"),
        _row_double_backward,
    ),
}


def cost(name: str, arguments: Mapping[str, Any]) -> Cost:
    """The cost of one call of ``rds_fast::name`` with its arguments, by their names in the schema."""
    declared = COSTS.get(name, Cost())
    return declared(arguments) if callable(declared) else declared
