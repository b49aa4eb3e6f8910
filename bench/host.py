"""What a training step costs the host: the calls of Python functions in it, and its time where the device has none.

    python bench/host.py                                   # torchvision's ResNet-18 at 32² x 32
    python bench/host.py --model resnet50 --rounds 5

Where the batch is small a GPU waits for the host, which launches its kernels one by one. Calls are counted by
``sys.setprofile`` on the CPU: of Python's functions, not of C's, and the same on every machine. The time is that of a
step on the meta device, where nothing is computed: the host's part alone, but with that device's computation of shapes
in Python, which a GPU does not have. So the ratios say more than the milliseconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import Results
from bench.steps import LOSSES, Case

PROVIDERS = ("cross_entropy", "eager", "ours", "ours_fused")


def python_calls(function: Callable[[], Any]) -> int:
    """The calls of Python functions inside ``function``, those of the engine's backward among them."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def step(case: Case, provider: str, device: torch.device) -> Callable[[], None]:
    """One step, warm: what is computed once, such as the choice of a backend, is over."""
    loss, batch = LOSSES[provider](case.network(device)), case.batch(device)

    def run() -> None:
        loss(*batch).backward()

    run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64, help="above 64 pixels torchvision's models are taken")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds of the timing; 0: count calls alone")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=LOSSES)
    arguments = parser.parse_args()
    case = Case(arguments.model, arguments.image_size, arguments.batch_size, channels_last=True)
    cpu, meta = torch.device("cpu"), torch.device("meta")
    results = Results("host", cpu)
    calls = {provider: python_calls(step(case, provider, cpu)) for provider in arguments.providers}
    steps = {provider: step(case, provider, meta) for provider in arguments.providers}
    times: dict[str, list[float]] = {provider: [] for provider in steps}
    for _ in range(arguments.rounds):
        for provider, run in steps.items():
            start = time.perf_counter()
            run()
            times[provider].append(time.perf_counter() - start)
    print(f"{case.size}, torch {torch.__version__}")
    for provider, count in calls.items():
        rows = [("python_calls", "1", [float(count)])]
        rows += [("host_time", "s", times[provider])] if arguments.rounds else []
        for metric, unit, values in rows:
            results.append(
                numpy.array(values),
                operation="training_step",
                provider=provider,
                mode=case.mode,
                metric=metric,
                unit=unit,
                size=case.size,
                dtype=case.precision,
            )
        median = f"{1e3 * numpy.median(times[provider]):8.1f} ms of the host" if arguments.rounds else ""
        print(f"{provider:20}{count:8} calls{median}")
    print(f"appended to {results.path}")


if __name__ == "__main__":
    main()
