"""What the kernels of group norms share: the rows of (N, C, S) in G groups, and coefficients of channels along them.

A row is the D = C/G channels of a group in one sample, D·S values; a layer norm is S = G = 1, an instance norm D = 1.
"""

# mypy: allow-untyped-defs
# Kernels are not Python: their arguments have types of Triton, known when they are launched.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rows as row_tiles
from .launching import kernel
from .rows import Launch, plan, tl_load

# How a coefficient of a channel varies along a row.
BY_VALUE = tl.constexpr(0)  # each value has a channel of its own: S = 1
BY_ROW = tl.constexpr(1)  # the row is one channel: an instance norm
BY_RUN = tl.constexpr(2)  # each channel is a run of S values

# The decorator of every kernel.
group_kernel = kernel("N", "C", "G", "D", "S", "splits", "split_length", "blocks_per_split", "row_blocks")


@triton.jit
def tl_coefficient(
    ptr, rows, start, G, D, S, row_mask, mask, KIND: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A coefficient of the channels of a tile that begins at column ``start`` of its rows."""
    channel = (rows % G * D)[:, None]
    if KIND == BY_ROW:
        return tl.load(ptr + channel, mask=row_mask[:, None], other=0.0).to(ACC)
    elif KIND == BY_VALUE:
        return tl.load(ptr + channel + (start + tl.arange(0, BLOCK_C))[None, :], mask=mask, other=0.0).to(ACC)
    else:
        # The division of each column has the width of S; that of the start, which may be beyond it, is done once.
        first = start // S
        run = ((start - first * S).to(S.dtype) + tl.arange(0, BLOCK_C)) // S
        return tl.load(ptr + channel + (first + run)[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def tl_cotangent(
    u_ptr, weight_ptr, rows, start, row_mask, mask, C, G, D, S,
    HAS_WEIGHT: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """u, the weight, and u_w of a tile; the weight is 1 where there is none."""
    u = tl_load(u_ptr, rows, C, start + tl.arange(0, BLOCK_C), mask, 0.0, ACC, ALIGN)
    weight = tl.full((1, 1), 1.0, ACC)
    if HAS_WEIGHT:
        weight = tl_coefficient(weight_ptr, rows, start, G, D, S, row_mask, mask, KIND, ACC, BLOCK_C)
    return u, weight, u * weight


class Plan(NamedTuple):
    """How an operation on (N, C, S) in G groups is launched: on rows of D channels, D·S values."""

    launch: Launch
    groups: int
    channels: int  # of a group
    spatial: int
    kind: int
    strips: int  # programs that add up channels along with their own rows; 0 where channel_sums does it
    row_blocks: int  # tiles of rows of each of these

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.launch.N, self.launch.C, self.groups, self.channels, self.spatial

    @property
    def split(self) -> bool:
        return self.launch.splits > 1

    @property
    def split_length(self) -> int:
        return self.launch.blocks_per_split * self.launch.tile.BLOCK_C

    def scratch(self, like: Tensor, sums: int) -> Tensor:
        """Room for partial sums of each split of each row."""
        return like.new_empty((sums, self.launch.N, self.launch.splits) if self.split else (sums, 0))


def plan_rows(x: Tensor, groups: int, *, channel_sums: bool = False, heavy: bool = True) -> Plan:
    """The launch for the rows of a contiguous (N, C, S); only the forward, with one value an element, is not heavy."""
    N, C, S = x.shape
    D = C // groups
    launch = plan(x.view(N * groups, D * S), heavy=heavy)
    if heavy and not launch.whole_row and x.dtype == torch.float64:  # two registers a value
        launch = launch._replace(tile=launch.tile._replace(BLOCK_C=launch.tile.BLOCK_C // 2))
    kind = BY_ROW if D == 1 else BY_VALUE if S == 1 else BY_RUN
    strips, row_blocks = 0, 1
    # A layer norm: every row has the same channels. Wider tiles leave a thread no registers for the sums.
    if channel_sums and launch.whole_row and launch.tile.num_warps <= 8 and groups == 1 and S == 1 and D > 1:
        row_blocks = triton.cdiv(launch.row_blocks, row_tiles._PROGRAMS)
        strips = triton.cdiv(launch.row_blocks, row_blocks)
    return Plan(launch, groups, D, S, kind.value, strips, row_blocks)
