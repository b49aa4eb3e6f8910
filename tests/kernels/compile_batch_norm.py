"""Compiles the kernels of batch norm as ``compile_kernels.py`` compiles the others."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import torch
from compile_kernels import main

from rds_fast.kernels import batch_norm, rows

FILES = ["channels", "batch_norm", "batch_norm_backward", "batch_norm_double_backward"]

LAYERS = [
    (256, 64, 56, 56),  # ResNet-50 at batch 256
    (256, 2048, 7, 7),  # contiguous, no vector load divides a plane
    (1024, 512, 4, 4),  # ResNet-18 at 32² × 1024; contiguous, four channels make a run
    (64, 97, 5, 5),  # no vector load divides the channels
]


def launch(shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    """Train mode bare, with a ReLU, and with a residual and a ReLU; eval mode with all that it can be given."""
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    c = x.new_empty(x.shape[1], dtype=rows.accumulation_dtype(dtype))
    for residual, relu in ((None, False), (None, True), (x, True)):
        batch_norm.batch_norm(x, c, c, residual, c, c, 0.1, 1e-5, relu)
        batch_norm.batch_norm_backward(x, residual, x, residual, c, c, c, c, x, True, 1e-5, relu)
        of_second = (x, c, c, residual, x, x, residual, c, c, c, c, True, 1e-5, relu)
        for input_gradient in (False, True):
            batch_norm.batch_norm_double_backward(*of_second, input_gradient)
    batch_norm.batch_norm_backward(x, x, x, x, c, c, c, c, x, False, 1e-5, True)
    batch_norm.batch_norm_double_backward(x, c, c, x, x, x, x, c, c, c, c, False, 1e-5, True, True)
    batch_norm.batch_norm_input_gradient(x, x, c, c, c, c, c, False, 1e-5, True)


def cases(target: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every layer for sm_90, where the kernels are measured first."""
    chosen = [(LAYERS[0], dtype) for dtype in (torch.bfloat16, torch.float32)]
    if target == "sm_90":
        chosen += [(shape, torch.bfloat16) for shape in LAYERS[1:]] + [(LAYERS[0], torch.float64)]
    for shape, dtype in chosen:
        for memory_format in (torch.channels_last, torch.contiguous_format):
            name = f"{'x'.join(map(str, shape))} {memory_format} {dtype}".replace("torch.", "")
            yield name, functools.partial(launch, shape, memory_format, dtype)


if __name__ == "__main__":
    main(sys.argv[1], FILES, cases(sys.argv[1]))
