"""What the kernels of each fused operation do to memory: their launches, and their passes over each tensor.

The bench of a step's traffic counts bytes and launches by this table, and the GPU tests hold it against the profiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


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


# Without the prefix rds_fast::. An operation that is not named reads each tensor once and writes each result once, in
# one launch.
COSTS: dict[str, Cost | Callable[[Mapping[str, Any]], Cost]] = {
    # One pass for the channel sums, a launch that adds up its programs' parts, one pass that writes. A residual is read
    # by the last alone. In eval mode the backwards are one pass and the launch that adds up.
    "batch_norm": Cost(launches=3, reads={"x": 2}),
    "batch_norm_backward": _batch_norm_backward,
    "batch_norm_double_backward": _batch_norm_double_backward,
    # A layer norm whose rows fit a tile: the second launch, where sums over channels are asked for, adds up the
    # programs'. For group and instance norms and longer rows they take a pass of their own, over u, x and v.
    "group_norm_backward": Cost(launches=2),
    "group_norm_double_backward": Cost(launches=2),
}


def cost(name: str, arguments: Mapping[str, Any]) -> Cost:
    """The cost of one call of ``rds_fast::name`` with its arguments, by their names in the schema."""
    declared = COSTS.get(name, Cost())
    return declared(arguments) if callable(declared) else declared
