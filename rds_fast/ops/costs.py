"""What the kernels of each fused operation do to memory: their launches, and their passes over each tensor.

The bench of a step's traffic counts bytes and launches by this table, and the GPU tests hold it against the profiler.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Cost(NamedTuple):
    """One call of an operation.

    launches: kernels. reads: passes over an argument, by its name in the schema, where they are not one. writes: passes
    over a result, by its number, where they are not one.
    """

    launches: int = 1
    reads: Mapping[str, int] = MappingProxyType({})
    writes: Mapping[int, int] = MappingProxyType({})


# Without the prefix rds_fast::. An operation that is not named reads each tensor once and writes each result once, in
# one launch.
COSTS: dict[str, Cost] = {
    # One pass for the channel sums, a launch that adds up its programs' parts, and a pass that writes. A residual is read
    # by the last alone. In eval mode the last is not needed: the first writes, and reads each tensor once.
    "batch_norm": Cost(launches=3, reads={"x": 2}),
    "batch_norm_backward": Cost(launches=3, reads={"u": 2, "x": 2, "y": 2}),
    "batch_norm_double_backward": Cost(launches=3, reads={"v": 2, "u": 2, "x": 2}),
}
