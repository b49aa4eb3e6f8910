"""The calls of Python functions in a training step: what it costs the host, on every machine the same.

    python bench/host.py                                   # ResNet-18 at 64² x 2
    python bench/host.py --model resnet50 --image-size 224

Where the batch is small a GPU waits for the host, which launches its kernels one by one, and most of the host's time
goes into Python. Counted by ``sys.setprofile`` in a step on the CPU: calls of Python's functions, not of C's. The size
of the batch does not matter.
"""

from __future__ import annotations

import argparse
import sys
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


def calls_of_a_step(case: Case, provider: str) -> int:
    """Those of the second step: what is found once, such as the choice of a backend, is over."""
    cpu = torch.device("cpu")
    loss, batch = LOSSES[provider](case.network(cpu)), case.batch(cpu)

    def step() -> None:
        loss(*batch).backward()

    step()
    return python_calls(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="one of rds_fast's or torchvision's models, by its name")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=LOSSES)
    arguments = parser.parse_args()
    case = Case(arguments.model, arguments.image_size, arguments.batch_size)
    results = Results("host", torch.device("cpu"))
    print(f"{case.size}, torch {torch.__version__}")
    for provider in arguments.providers:
        count = calls_of_a_step(case, provider)
        print(f"{provider:20}{count:8} calls")
        results.append(
            numpy.array([float(count)]),
            operation="training_step",
            provider=provider,
            mode=case.mode,
            metric="python_calls",
            unit="1",
            size=case.size,
            dtype=case.precision,
        )
    print(f"appended to {results.path}")


if __name__ == "__main__":
    main()
