"""The number of threads of PyTorch and of the CPU kernels, which is one in all other tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def assert_same_bits_with_any_number_of_threads(run: Callable[[], Iterable[Tensor]]) -> None:
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(tuple(run()))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
