"""Compiles the kernels of group norms as ``compile_kernels.py`` compiles the others."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import torch
from compile_kernels import main

from rds_fast.kernels import group_norm, rows

FILES = ["channel_sums", "group_norm", "group_norm_backward", "group_norm_double_backward", "group_rows"]

# (N, C, S), groups. The longest row of each tile; then long rows, many of them (one launch) and few (split).
LAYERS = [((64, tile.limit, 1), 1) for tile in rows._TILES] + [((1024, 50257, 1), 1), ((2, 1_000_000, 1), 1)]
GROUPS = [
    ((4, 64, 49), 8),
    ((4, 64, 1024), 4),  # the longest row in registers
    ((64, 64, 65_536), 32),
    ((1, 8, 262_144), 2),
    ((64, 32, 1), 4),
]
INSTANCES = [((4, 16, 49), 16), ((4, 16, 16_384), 16), ((2, 4, 1_000_000), 4)]


def launch(shape: tuple[int, int, int], groups: int, dtype: torch.dtype) -> None:
    """Every operation as a step of training calls it; and the double backward with all that it can be given."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    accumulated = rows.accumulation_dtype(dtype)
    w = torch.empty(shape[1], dtype=accumulated, device="meta")
    row = torch.empty(shape[0] * groups, dtype=accumulated, device="meta")
    group_norm.group_norm(x, w, w, groups, 1e-5)
    group_norm.group_norm_backward(x, x, w, row, row, None, groups, False)
    group_norm.group_norm_backward(x, x, w, row, row, x, groups, True)
    group_norm.group_norm_double_backward(x, None, None, x, x, w, row, row, groups, True)
    if shape[1] * shape[2] // groups >= 8192:
        group_norm.group_norm_double_backward(x, w, w, x, x, w, row, row, groups, True)
        group_norm.group_norm_double_backward(x, None, None, x, x, None, row, row, groups, False)


def cases(target: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every tile for sm_90, where the kernels are measured first, else one of each kind."""
    chosen = [(case, torch.bfloat16) for case in [*LAYERS, *GROUPS, *INSTANCES]]
    chosen += [(case, torch.float32) for case in [*LAYERS[5:], GROUPS[1]]]
    chosen += [(case, torch.float64) for case in [LAYERS[7], LAYERS[8], LAYERS[-1]]]
    if target != "sm_90":
        chosen = [(case, torch.bfloat16) for case in [LAYERS[3], LAYERS[9], LAYERS[-1], *GROUPS[:2], INSTANCES[0]]]
        chosen += [(LAYERS[9], torch.float32), (LAYERS[8], torch.float64)]
    for (shape, groups), dtype in chosen:
        name = f"{'x'.join(map(str, shape))} in {groups} {str(dtype).removeprefix('torch.')}"
        yield name, functools.partial(launch, shape, groups, dtype)


if __name__ == "__main__":
    main(sys.argv[1], FILES, cases(sys.argv[1]))
