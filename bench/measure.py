"""Timing and records that every bench shares.

Machines are noisy, so the providers of one case are run in turn, round after round, and a provider's rate is given
beside its ratio to the copy of the same round. A record names its device, versions and commit: without them a figure
is not a result.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy
import torch

RESULTS = Path(__file__).parent / "results"
FIELDS = [
    "operation",
    "provider",
    "mode",
    "metric",
    "unit",
    "size",
    "p20",
    "p50",
    "p80",
    "dtype",
    "device",
    "threads",
    "torch",
    "triton",
    "cuda",
    "commit",
    "time",
]


def device_name(device: torch.device) -> str:
    """The device's own name; for a CPU the processor's, as the system gives it; ``"meta"`` where nothing runs."""
    if device.type == "meta":
        return "meta"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def _version(module: str) -> str:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return ""


def commit() -> str:
    """The commit of this tree, with ``+`` where files differ from it; outside a repository, RDS_FAST_COMMIT."""
    here, otherwise = Path(__file__).parent, os.environ.get("RDS_FAST_COMMIT", "")
    try:
        name = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "..", ":!results"],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except OSError:
        return otherwise
    if name.returncode:
        return otherwise
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _seconds_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _seconds_cuda(function: Callable[[], object], occupied: float = 0.0) -> float:
    """Seconds between two events around a call; the GPU has ``occupied`` seconds of other work when the first is given.

    Without it the GPU is idle at the first event, and waits for the host between that and each launch.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if occupied:
        torch.cuda._sleep(int(occupied * CLOCK))
    start.record()
    function()
    end.record()
    idle = occupied and start.query()
    end.synchronize()
    if idle and occupied < LONGEST_OCCUPATION:  # the GPU was through with it before the host had given all work
        return _seconds_cuda(function, 2 * occupied)
    return start.elapsed_time(end) * 1e-3


# Cycles a second, at least as many as a GPU's processors have: what is to occupy it may last longer, not less.
CLOCK = 2.1e9
# Seconds. A function that still finds the GPU idle waits for the device itself, and its time includes the host's.
LONGEST_OCCUPATION = 0.1


def host_seconds(function: Callable[[], object], device: torch.device, rounds: int = 5) -> numpy.ndarray:
    """Seconds until each call returns, (rounds,): what the host takes to give a GPU its work, while that is idle."""
    times = numpy.empty(rounds)
    for round_number in range(rounds):
        torch.cuda.synchronize(device)
        times[round_number] = _seconds_cpu(function)
    torch.cuda.synchronize(device)
    return times


def captured(function: Callable[[], object], device: torch.device, warm_up: int = 3) -> Callable[[], object]:
    """The replay of a CUDA graph of a function without arguments: the work of its launches, and nearly no host time.

    What the function returned while it was captured keeps its place in memory, and so has the values of each replay.
    """
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        result = function()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warm_up: int = 3,
    *,
    without_host: bool = False,
) -> dict[str, numpy.ndarray]:
    """Seconds of each function in each round, (rounds,) a function; the order within a round rotates.

    On a GPU a function's time runs from an idle device to the end of its work, the host's time included where the
    device waits for it; with ``without_host`` the device is kept busy until the host has given it the whole work.
    """
    names = list(functions)
    for name in names:
        for _ in range(warm_up):
            functions[name]()
    occupied = dict.fromkeys(names, 0.0)
    if device.type == "cuda" and without_host:
        occupied = {name: 2 * float(host_seconds(functions[name], device).max()) + 5e-5 for name in names}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    times = {name: numpy.empty(rounds) for name in names}
    for round_number in range(rounds):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            if device.type == "cuda":
                times[name][round_number] = _seconds_cuda(functions[name], occupied[name])
            else:
                times[name][round_number] = _seconds_cpu(functions[name])
    return times


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, so that a result's pages are not fetched from the system, zeroed, in every run.

    On a CPU that would cost about as much as a pass itself. A copy into a given output does not pay it, nor does a GPU,
    where PyTorch's allocator keeps what was freed. It holds for every provider alike.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


class Results:
    """Appends records to ``results/<device>/<bench>.csv``."""

    def __init__(self, bench: str, device: torch.device) -> None:
        name = device_name(device)
        folder = "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()
        while "--" in folder:
            folder = folder.replace("--", "-")
        self.path = RESULTS / folder / f"{bench}.csv"
        self.common = {
            "device": name,
            "threads": torch.get_num_threads() if device.type == "cpu" else "",
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda or "",
            "commit": commit(),
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def append(self, values: numpy.ndarray, **record: str) -> None:
        """One record: the 20th, 50th and 80th percentile of ``values``, and the fields of ``record``."""
        p20, p50, p80 = (f"{value:.4g}" for value in numpy.percentile(values, (20, 50, 80)))
        row = {**self.common, **record, "p20": p20, "p50": p50, "p80": p80}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerow(row)
