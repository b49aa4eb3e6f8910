"""What the tests on a GPU share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rds_fast import backends


@pytest.fixture(scope="module")
def native_cuda() -> Iterator[None]:
    """The native kernels are there: a test of them is not to pass, nor to be skipped, for their absence."""
    assert backends.failure("native", "cuda") is None, backends.failure("native", "cuda")
    yield
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def large_memory_is_given_back() -> Iterator[None]:
    """Several processes share the GPU, and what PyTorch keeps for later the others cannot have."""
    yield
    if torch.cuda.memory_reserved() > 2**31:
        torch.cuda.empty_cache()
