"""The emulation that runs the CUDA kernels in tests: each fault that it is to find, in a kernel with that fault."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cuda_emulation
import pytest
import torch
from cuda_emulation import Device

THREADS = 128


@pytest.fixture(params=[0, 1, 2], ids=["threads in order", "warp by warp", "threads at random"])
def machine(request: pytest.FixtureRequest) -> Iterator[Any]:
    with cuda_emulation.emulated(Device(schedule=request.param)) as operations:
        yield operations


def numbers() -> torch.Tensor:
    return torch.arange(THREADS, dtype=torch.float32)


def test_one_builds_while_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building = threading.Lock()

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert building.acquire(blocking=False)
        time.sleep(0.02)
        building.release()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(cuda_emulation, "FOLDER", tmp_path / "build" / "emulation")
    monkeypatch.setattr(cuda_emulation.subprocess, "run", run)
    with ThreadPoolExecutor(3) as pool:
        builds = [pool.submit(cuda_emulation.build) for _ in range(3)]
    assert len({build.result() for build in builds}) == 1


@pytest.mark.parametrize("kind", ["none", "shared memory asked for"])
def test_a_kernel_without_a_fault(machine: Any, kind: str) -> None:
    assert torch.equal(machine.fault(kind, numbers()), numbers().roll(-2))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("barrier of half the block", r"barrier of .*faults\.cu:\d+, which only 64 of 128 threads reach"),
        ("two barriers", r"barrier of .*faults\.cu:\d+, others at that of .*faults\.cu:\d+"),
        ("shuffle of half the lanes", r"waits for ever for other lanes of its mask at the shuffle of .*faults\.cu"),
        ("shuffle outside the mask", "is not in its own mask"),
        ("shuffle from outside the mask", "takes from a lane that is not in the mask"),
        ("write beyond shared memory", "wrote beyond the 512 bytes of dynamic shared memory"),
        ("misaligned load", r"4 bytes past a multiple of 16 bytes, which is misaligned, at .*faults\.cu"),
        ("misaligned store", "4 bytes past a multiple of 8 bytes, which is misaligned"),
        ("read past the end", "0 bytes past the end of an allocation of 512 bytes"),
        ("write past the end", "0 bytes past the end of an allocation of 512 bytes"),
        ("write before the beginning", "wrote just outside of an allocation of 512 bytes"),
        ("failed assertion", "thread .5, 0, 0. of block .0, 0, 0. fails the assertion threadIdx.x != 5"),
        ("too many threads", "invalid configuration argument"),
        ("no blocks", "invalid configuration argument"),
        ("too many blocks in y", "invalid configuration argument"),
        ("shared memory not asked for", "invalid argument"),
        ("more shared memory than there is", "invalid argument"),
    ],
)
def test_a_fault_is_reported(machine: Any, kind: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        machine.fault(kind, numbers())
    assert torch.equal(machine.fault("none", numbers()), numbers().roll(-2))  # the next launch is not disturbed


def test_faults_name_their_kernel(machine: Any) -> None:
    with pytest.raises(RuntimeError, match=r"CUDA emulation: two_barriers: thread \(\d+, 0, 0\)"):
        machine.fault("two barriers", numbers())


@pytest.mark.parametrize("kind", ["no barrier after a write", "no barrier before a write"])
def test_a_race_shows_in_some_order(kind: str) -> None:
    """Unwritten shared memory is NaN; what is written too early makes the result depend on the order."""
    results = []
    for schedule in range(4):
        with cuda_emulation.emulated(Device(schedule=schedule)) as machine:
            results.append(machine.fault(kind, numbers()))
    expected = numbers().roll(-1 if "after" in kind else -2)
    assert any(not torch.equal(result, expected) for result in results)


def test_guarded_memory_is_nan_until_written(machine: Any) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.empty(5, dtype=dtype).isnan().all()


def test_a_smaller_grid_than_asked_for() -> None:
    """What makes kernels loop over what is beyond their grid, at small sizes."""
    with cuda_emulation.emulated(Device(largest_grid=2)) as machine:
        machine.logsumexp(torch.zeros(1000, 2), False)
        (launch,) = cuda_emulation.launches()
    assert launch == ("small_rows<LogSumExp<float> >", (2, 1, 1), 96, 96 * 3 * 4)


def test_what_the_build_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the emulation cannot be built, the tests that need it are skipped and say why."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cuda_emulation.sys, "executable", "/nonexistent/python")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "C++ compiler" in str(cuda_emulation.obstacle())
    monkeypatch.setenv("CXX", "c++")
    assert "CMake" in str(cuda_emulation.obstacle())
    with (
        pytest.raises(pytest.skip.Exception, match="the CUDA kernels' emulation: needs CMake"),
        cuda_emulation.emulated(),
    ):
        pass
