"""What the tests on a GPU share, and those of the CUDA kernels, which run in an emulation as well."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_emulation
import pytest
import torch
from cuda_cases import Machine

from rds_fast import backends


@pytest.fixture(scope="module")
def native_cuda() -> Iterator[None]:
    """The native kernels are there: a test of them is not to pass, nor to be skipped, for their absence."""
    assert backends.failure("native", "cuda") is None, backends.failure("native", "cuda")
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Where the CUDA kernels run: the emulated device that is the test's parameter, or the GPU where that is None."""
    if request.param is None:
        request.getfixturevalue("native_cuda")
        yield Machine(torch.ops.rds_fast_native, "cuda")
        return
    with cuda_emulation.emulated(request.param) as kernels:
        yield Machine(kernels, "cpu")


@pytest.fixture(autouse=True)
def large_memory_is_given_back() -> Iterator[None]:
    """Several processes share the GPU, and what PyTorch keeps for later the others cannot have."""
    yield
    if torch.cuda.memory_reserved() > 2**31:
        torch.cuda.empty_cache()
