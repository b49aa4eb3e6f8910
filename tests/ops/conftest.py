"""Each test of an operation runs on every implementation that exists on this CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import rds_fast


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one implementation. Triton's run in tests/kernels, in its interpreter's own process."""
    reason = rds_fast.backends.failure(request.param, "cpu")
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with rds_fast.use_backend(request.param):
        yield request.param


@pytest.fixture
def fused_backend() -> Iterator[str]:
    """Forces the native kernels, for what is asked of fused implementations alone: accuracy beyond plain PyTorch's."""
    reason = rds_fast.backends.failure("native", "cpu")
    if reason is not None:
        pytest.skip(f"native: {reason}")
    with rds_fast.use_backend("native"):
        yield "native"
