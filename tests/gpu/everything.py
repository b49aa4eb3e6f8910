"""Runs all that needs a GPU to its end, whatever fails on the way: what is there, the tests, the benches.

    python tests/gpu/everything.py            # after the build; ``make gpu`` does both

The tests make Triton compile some two thousand kernels at about a second each, so they run in as many parts side by
side as there are processors. Each part is a process: a fault on the device ends a process's CUDA context, and with it
every test that the process had yet to run. The tests of more than 2³¹ elements follow in a part of their own, since
together with others they might not find the memory. Then the benches, one at a time, with nothing beside them.

What a part prints is in build/gpu and, once the part has ended, on the screen; the last lines name every test that
failed. A part that takes longer than it may is stopped. The exit status is 0 if every part succeeded.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "build" / "gpu"
LARGE = "more_than_two_to_the_31 or more_elements_than_32_bits"


class Part(NamedTuple):
    """A command, and the seconds that it may take."""

    name: str
    arguments: tuple[str, ...]
    limit: float


class Ended(NamedTuple):
    """How a part ended: ``outcome`` is empty where it succeeded."""

    part: Part
    outcome: str
    seconds: float


def pytest(*arguments: str) -> tuple[str, ...]:
    return "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider", "-q", "--tb=short", *arguments


def tests(parts: int) -> list[Part]:
    return [
        Part(f"tests-{i + 1}-of-{parts}", pytest("--part", f"{i}/{parts}", "-k", f"not ({LARGE})"), 330)
        for i in range(parts)
    ]


DOCTOR = Part("doctor", ("-m", "rds_fast", "doctor"), 90)
LARGE_TESTS = Part("tests-large", pytest("-k", LARGE), 90)


def step(*arguments: str) -> tuple[str, ...]:
    return "bench/step.py", "--device", "cuda", *arguments


# Steps that wait for the host unless they are captured.
SMALL = ("--batch-size", "128", "--amp", "bf16", "--channels-last")
EXACT = ("--providers", "cross_entropy", "eager", "ours", "ours_fused")
BENCHES = [
    Part("kernels", ("bench/kernels.py", "--device", "cuda"), 200),
    Part("resnet18-h200", step("--preset", "resnet18-h200", "--without", "one_graph"), 200),
    Part("resnet50-h200", step("--preset", "resnet50-h200", "--without", "one_graph"), 200),
    Part("resnet18-captured", step("--preset", "resnet18-h200", "--cuda-graph", *EXACT), 60),
    Part("resnet18-small", step(*SMALL, *EXACT), 60),
    Part("resnet18-small-captured", step(*SMALL, "--cuda-graph", *EXACT), 60),
]


def run_together(parts: Iterable[Part]) -> list[Ended]:
    """Runs parts side by side; each part's output is printed when it has ended."""
    LOGS.mkdir(parents=True, exist_ok=True)
    # Plugins that happen to be installed might warn, and a warning is an error; threads would wait for one another.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    running: dict[Part, subprocess.Popen[bytes]] = {}
    ended: list[Ended] = []
    try:
        for part in parts:
            with log(part).open("wb") as output:
                running[part] = subprocess.Popen(
                    [sys.executable, *part.arguments], cwd=ROOT, env=environment, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
        while running:
            time.sleep(0.2)
            for part, process in list(running.items()):
                seconds = time.monotonic() - start
                status = process.poll()
                if status is None and seconds < part.limit:
                    continue
                del running[part]
                if status is None:
                    stop(process)
                    outcome = f"stopped after {part.limit:.0f} s"
                else:
                    outcome = f"status {status}" if status else ""
                ended.append(Ended(part, outcome, seconds))
                print(f"\n==== {part.name}: {outcome or 'passed'}, {seconds:.0f} s\n{printed(part)}", flush=True)
    finally:
        for process in running.values():
            stop(process)
    return ended


def log(part: Part) -> Path:
    return LOGS / f"{part.name}.log"


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and what it started, which it put into a session of its own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def printed(part: Part) -> str:
    return log(part).read_text(errors="replace").strip()


def summary(ended: list[Ended]) -> str:
    """How each part ended, the end of what it printed, and the tests that failed."""
    lines = ["\n==== all parts"]
    for part, outcome, seconds in ended:
        lines.append(
            f"{part.name:18} {seconds:4.0f} s  {outcome or 'passed':20} {printed(part).rpartition(chr(10))[2]}"
        )
    for part, _, _ in ended:
        lines += [line for line in printed(part).splitlines() if line.startswith(("FAILED ", "ERROR "))]
    failed = sum(bool(one.outcome) for one in ended)
    return "\n".join([*lines, f"{failed} of {len(ended)} parts failed" if failed else "all passed"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    most = max(1, min(14, (os.cpu_count() or 1) - 2))  # each holds some GiB of memory, on the host and on the GPU
    parser.add_argument("--parts", type=int, default=most, help=f"processes for the tests; default here: {most}")
    parser.add_argument("--only", choices=["tests", "benches"], help="default: the tests, then the benches")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device is present, so there is nothing to run: every test would be skipped")
        return 1
    ended = run_together([DOCTOR])
    if arguments.only != "benches":
        ended += run_together(tests(arguments.parts))
        ended += run_together([LARGE_TESTS])
    if arguments.only != "tests":
        for bench in BENCHES:
            ended += run_together([bench])
    print(summary(ended))
    return any(one.outcome for one in ended)


if __name__ == "__main__":
    sys.exit(main())
