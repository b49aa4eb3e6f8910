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
