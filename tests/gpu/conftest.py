"""What the tests on a GPU share, and those of the CUDA kernels, which run in an emulation as well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import cuda_emulation
import pytest
import torch
from cuda_cases import Machine

import rds_fast
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


@contextmanager
def _on_triton(monkeypatch: pytest.MonkeyPatch, with_file: bool) -> Iterator[Counter[str]]:
    """Runs the public operations on Triton, and counts the kernels that the GPU is given, by name."""
    from rds_fast.kernels.launching import Kernel

    counter: Counter[str] = Counter()
    launch = Kernel.launch

    def counted(kernel: Kernel, *args: object, **options: object) -> None:
        file = kernel.fn.__module__.rpartition(".")[2] if with_file else ""
        counter[file + kernel.fn.__name__] += 1
        launch(kernel, *args, **options)

    monkeypatch.setattr(Kernel, "launch", counted)
    with rds_fast.use_backend("triton"):
        yield counter


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Runs the public operations on Triton, and counts the kernels that the GPU is given."""
    with _on_triton(monkeypatch, with_file=False) as counter:
        yield counter


@pytest.fixture
def ran_by_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """As ``ran``, with the name of the file before that of the kernel."""
    with _on_triton(monkeypatch, with_file=True) as counter:
        yield counter


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """TF32 convolutions would round as float16 does."""
    precision = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = precision


@contextmanager
def _without_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def without_synchronisation() -> Callable[[], AbstractContextManager[None]]:
    """A context in which any wait of the host for the device raises."""
    return _without_synchronisation


@pytest.fixture(autouse=True)
def large_memory_is_given_back() -> Iterator[None]:
    """Several processes share the GPU, and what PyTorch keeps for later the others cannot have."""
    yield
    if torch.cuda.memory_reserved() > 2**31:
        torch.cuda.empty_cache()
