"""Builds, tests and measures on a GPU, to the end whatever fails on the way.

    python tests/gpu/everything.py            # ``make gpu``
    python tests/gpu/everything.py --only tests --output FOLDER --deadline 540

The build comes first; where the compiler fails, what could be built goes on to the tests. The tests make Triton compile
some two thousand kernels at about a second each, so they run in as many parts side by side as there are processors.
Each part is a process: a fault on the device ends a process's CUDA context, and with it every test that the process
had yet to run. The tests of more than 2³¹ elements follow in a part of their own, since together with others they might
not find the memory. Then the benches, one at a time, with nothing beside them, in the order of what they tell.

A part that takes longer than it may is interrupted, so that it still names what failed, and killed 10 s later. With a
deadline, a part for which too little is left is passed over by name. The log of each part is in build/gpu. With
``--output``, one log of all parts and the benches' CSVs are copied there as soon as a part ends. The last lines say how
every part ended and name the tests that failed. The exit status is 0 if every part succeeded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
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
RESULTS = ROOT / "bench" / "results"
LARGE = "more_than_two_to_the_31 or more_elements_than_32_bits"
NAMED = 60  # tests that failed, in the summary; the log has all
GRACE = 10  # seconds from the interrupt to the kill


class Part(NamedTuple):
    """A command, the seconds that it may take, and those below which it is not worth a start."""

    name: str
    arguments: tuple[str, ...]
    limit: float
    least: float


class Ended(NamedTuple):
    """How a part ended: ``outcome`` is empty where it succeeded."""

    part: Part
    outcome: str
    seconds: float


def pytest(*arguments: str) -> tuple[str, ...]:
    return "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider", "-v", "--tb=short", *arguments


def tests(parts: int) -> list[Part]:
    return [
        Part(f"tests-{i + 1}-of-{parts}", pytest("--part", f"{i}/{parts}", "-k", f"not ({LARGE})"), 330, 60)
        for i in range(parts)
    ]


BUILD = Part("build", ("setup.py", "--quiet", "build_ext", "--inplace"), 300, 20)
DOCTOR = Part("doctor", ("-m", "rds_fast", "doctor"), 90, 20)
LARGE_TESTS = Part("tests-large", pytest("-k", LARGE), 90, 30)


def step(*arguments: str) -> tuple[str, ...]:
    return "bench/step.py", "--device", "cuda", *arguments


# Steps that wait for the host unless they are captured.
SMALL = ("--batch-size", "128", "--amp", "bf16", "--channels-last")
EXACT = ("--providers", "cross_entropy", "eager", "ours", "ours_fused")
RESNET50 = ("--preset", "resnet50-h200")
BENCHES = [
    Part("kernels", ("bench/kernels.py", "--device", "cuda"), 200, 60),
    Part("resnet18-small-captured", step(*SMALL, "--cuda-graph", *EXACT), 60, 25),
    Part("resnet18-small", step(*SMALL, *EXACT), 60, 20),
    Part("resnet18-captured", step("--preset", "resnet18-h200", "--cuda-graph", *EXACT), 60, 25),
    Part("resnet18", step("--preset", "resnet18-h200", "--without", "one_graph"), 120, 30),
    Part("resnet50", step(*RESNET50, "--without", "one_graph", "eager"), 150, 40),
    # cuDNN's search tries every algorithm for a weight gradient whose kernel is the whole feature map, which takes long
    Part("resnet50-eager", step(*RESNET50, "--providers", "cross_entropy", "eager", "--no-cudnn-benchmark"), 150, 40),
]


class Run:
    """All parts: what is left of the time, how the parts ended, and where their output goes."""

    def __init__(self, deadline: float | None, output: Path | None) -> None:
        self.end = time.monotonic() + deadline if deadline else float("inf")
        self.output = output
        self.ended: list[Ended] = []
        LOGS.mkdir(parents=True, exist_ok=True)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)

    def side_by_side(self, parts: Iterable[Part], reserve: float = 0) -> None:
        """Runs the parts at once, and leaves ``reserve`` seconds of the time for what follows them."""
        # Plugins that happen to be installed might warn, and a warning is an error; threads would wait for one another.
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
        if len(parts := list(parts)) > 1:
            environment["OMP_NUM_THREADS"] = "1"
        start = time.monotonic()
        left = self.end - start - reserve - GRACE
        running: dict[Part, subprocess.Popen[bytes]] = {}
        try:
            for part in parts:
                if left < part.least:
                    self.finish(Ended(part, f"passed over: {max(left, 0):.0f} s left", 0))
                    continue
                with log(part).open("wb") as file:
                    running[part] = subprocess.Popen(
                        [sys.executable, *part.arguments], cwd=ROOT, env=environment, stdout=file,
                        stderr=subprocess.STDOUT, start_new_session=True,
                    )  # fmt: skip
            while running:
                time.sleep(0.2)
                seconds = time.monotonic() - start
                late = [part for part in running if running[part].poll() is None and seconds > min(part.limit, left)]
                stop([running[part] for part in late])
                for part in [part for part in running if running[part].poll() is not None]:
                    status = running.pop(part).returncode
                    outcome = f"stopped after {seconds:.0f} s" if part in late else f"status {status}" if status else ""
                    self.finish(Ended(part, outcome, seconds))
        finally:
            stop(list(running.values()))

    def finish(self, one: Ended) -> None:
        self.ended.append(one)
        heading = f"\n==== {one.part.name}: {one.outcome or 'passed'}, {one.seconds:.0f} s\n"
        text = printed(one)
        shown = (line for line in text.splitlines() if not (" PASSED " in line or " SKIPPED " in line))
        print(heading + "\n".join(shown), flush=True)
        if self.output is not None:
            with (self.output / "log.txt").open("a") as file:
                file.write(heading + text + "\n")
            for csv in RESULTS.glob("*/*.csv"):
                if csv.stat().st_mtime > STARTED:
                    shutil.copy(csv, self.output / csv.name)

    def failed(self) -> int:
        return sum(bool(one.outcome) for one in self.ended)

    def summary(self) -> str:
        """How each part ended, the end of what it printed, and the tests that failed."""
        lines = ["\n==== all parts"]
        for one in self.ended:
            last = printed(one).rpartition("\n")[2]
            lines.append(f"{one.part.name:24} {one.seconds:4.0f} s  {one.outcome or 'passed':28} {last}")
        failures = [
            line for one in self.ended for line in printed(one).splitlines() if line.startswith(("FAILED ", "ERROR "))
        ]
        lines += failures[:NAMED]
        if len(failures) > NAMED:
            lines.append(f"and {len(failures) - NAMED} more tests failed, which the logs name")
        lines.append(f"{self.failed()} of {len(self.ended)} parts failed" if self.failed() else "all passed")
        return "\n".join(lines)


STARTED = time.time()


def log(part: Part) -> Path:
    return LOGS / f"{part.name}.log"


def printed(one: Ended) -> str:
    """What the part wrote; nothing where it never started, though an earlier run's log may be there."""
    return log(one.part).read_text(errors="replace").strip() if one.seconds else ""


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Interrupts processes and what they started, each in a session of its own; kills what is there 10 s later."""
    for number, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
        end = None if wait is None else time.monotonic() + wait
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(None if end is None else max(0.1, end - time.monotonic()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    most = max(1, min(14, (os.cpu_count() or 1) - 2))  # each holds some GiB of memory, on the host and on the GPU
    parser.add_argument("--parts", type=int, default=most, help=f"processes for the tests; default here: {most}")
    names = ["tests", "benches", *(bench.name for bench in BENCHES)]
    parser.add_argument("--only", nargs="+", choices=names, default=["tests", "benches"], help="default: tests benches")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="gets the log and the CSVs as each part ends")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="for everything; default: none")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device is present, so there is nothing to run: every test would be skipped")
        return 1
    run = Run(arguments.deadline, arguments.output)
    run.side_by_side([BUILD])
    run.side_by_side([DOCTOR])
    if "tests" in arguments.only:
        run.side_by_side(tests(arguments.parts), reserve=LARGE_TESTS.least + GRACE)
        run.side_by_side([LARGE_TESTS])
    for bench in BENCHES:
        if not {"benches", bench.name}.isdisjoint(arguments.only):
            run.side_by_side([bench])
    print(run.summary())
    if run.output is not None:
        with (run.output / "log.txt").open("a") as file:
            file.write(run.summary() + "\n")
    return bool(run.failed())


if __name__ == "__main__":
    sys.exit(main())
