"""FLOPs, bytes, operations, launches and saved bytes of one training step, counted on the meta device.

    python bench/traffic.py                        # ResNet-18 at 32² x 1024 and ResNet-50 at 224² x 256
    python bench/traffic.py --cases resnet50 --providers eager ours --top 15
    python bench/traffic.py --model vgg11_bn --image-size 224 --batch-size 64

Nothing runs, so the figures are the same on every machine. The rules of counting stand in ``bench/counting.py``. The
network and its input are bfloat16 throughout (with ``--float32-norms`` but for the parameters and buffers of batch
norm, as mixed precision keeps them), in train mode, channels-last; the step is forward, penalty and backward,
without the optimiser. Saved bytes are the storages alive when the loss is there and its backward is not yet called,
that the step created: not parameters, buffers, the input or the loss. The peak is the most of them at any time.

The floor is the time that a device of nominal figures needs at least: for each operation alone its bytes at the full
bandwidth or its FLOPs at the full rate of dense bfloat16, whichever is longer. No device reaches them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.counting import Count, Traffic
from bench.measure import Results
from bench.steps import LOSSES, Case, NotAvailable, attempt

META = torch.device("meta")
PROVIDERS = ("cross_entropy", "eager", "ours", "ours_fused", "cross_entropy_fused")
CASES = {
    "resnet18": Case("resnet18", 32, 1024, torch.bfloat16, channels_last=True),
    "resnet50": Case("resnet50", 224, 256, torch.bfloat16, channels_last=True),
}


class Device(NamedTuple):
    """Nominal figures, from the maker's data sheet."""

    bytes_per_second: float
    flops_per_second: float  # dense bfloat16


DEVICES = {"H100": Device(3.35e12, 989e12), "H200": Device(4.8e12, 989e12)}

METRICS: dict[str, tuple[str, Callable[[Step], float]]] = {
    "flops": ("FLOP", lambda step: step.count.flops),
    "bytes": ("B", lambda step: step.count.bytes),
    "operations": ("1", lambda step: step.count.operations),
    "launches": ("1", lambda step: step.count.launches),
    "saved_bytes": ("B", lambda step: step.saved),
    "peak_bytes": ("B", lambda step: step.traffic.peak),
}


class Step(NamedTuple):
    """One step, counted."""

    traffic: Traffic
    count: Count
    saved: int

    def floor(self, device: Device) -> float:
        """The least seconds on a device of these figures."""
        return sum(
            max(count.bytes / device.bytes_per_second, count.flops / device.flops_per_second)
            for _, count in self.traffic.calls
        )


def count_step(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Step:
    """Counts forward, penalty and backward. Only the loss is held between them, so only its graph keeps storages."""
    with Traffic() as traffic:
        total = loss(x, y)
        saved = traffic.alive(total)
        total.backward()
    return Step(traffic, traffic.total, saved)


def count_case(case: Case, providers: list[str]) -> dict[str, Step]:
    """Each provider's step; one that is not available is said so and left out."""
    steps = {}
    for provider in providers:
        loss = LOSSES[provider](case.network(META))
        try:
            steps[provider] = attempt(provider, partial(count_step, loss, *case.batch(META)))
        except NotAvailable as reason:
            print(f"{provider:20} not available: {reason}")
    return steps


def append(results: Results, case: Case, provider: str, operation: str, metric: str, unit: str, value: float) -> None:
    results.append(
        numpy.array([value]),
        operation=operation,
        provider=provider,
        mode=case.mode,
        metric=metric,
        unit=unit,
        size=case.size,
        dtype=case.precision,
    )


def print_steps(steps: dict[str, Step], device_name: str) -> None:
    """The figures, with the ratio to the stock cross-entropy step beside each."""
    device = DEVICES[device_name]
    stock = steps.get("cross_entropy")

    def cell(value: float, stock_value: float | None, form: str) -> str:
        return f"{value:{form}}" + (f" ({value / stock_value:5.2f}x)" if stock_value else "")

    names = ("TFLOP", "GB moved", "operations", "launches", "GB saved", "GB at the peak", f"ms floor {device_name}")
    print(f"{'':20}" + "".join(f"{name:>18}" for name in names))
    for provider, step in steps.items():
        figures = [
            cell(metric(step) * scale, stock and metric(stock) * scale, form)
            for (_, metric), (scale, form) in zip(
                METRICS.values(),
                [(1e-12, ".2f"), (1e-9, ".1f"), (1, ".0f"), (1, ".0f"), (1e-9, ".2f"), (1e-9, ".2f")],
                strict=True,
            )
        ]
        figures.append(cell(step.floor(device) * 1e3, stock and stock.floor(device) * 1e3, ".1f"))
        print(f"{provider:20}" + "".join(f"{figure:>18}" for figure in figures))


def print_operations(provider: str, step: Step, top: int, by: str) -> None:
    """The first operations by a field of their count."""
    print(f"\n{provider}: the first {top} operations by {by}")
    names = sorted(step.traffic.by_name().items(), key=lambda item: -getattr(item[1], by))
    for name, count in names[:top]:
        share = count.bytes / step.count.bytes
        print(
            f"  {name:44}{count.bytes * 1e-9:10.2f} GB {share:6.1%}{count.operations:7} calls"
            f"{count.launches:7} launches{count.flops * 1e-12:8.2f} TFLOP"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--model", help="a case of one's own: one of rds_fast's or torchvision's models, by its name")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--mode", choices=["train", "eval"], default="train")
    parser.add_argument("--float32-norms", action="store_true", help="batch norm's parameters in float32")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=LOSSES)
    parser.add_argument("--top", type=int, default=0, help="also list the first N operations")
    parser.add_argument("--by", default="bytes", choices=Count._fields, help="the order of --top")
    parser.add_argument("--device", default="H200", choices=DEVICES, help="whose nominal figures the floor takes")
    arguments = parser.parse_args()
    own = Case(arguments.model, arguments.image_size, arguments.batch_size, torch.bfloat16, channels_last=True)
    cases = [own] if arguments.model else [CASES[name] for name in arguments.cases]
    results = Results("traffic", META)
    for case in cases:
        case = case._replace(mode=arguments.mode, float32_norms=arguments.float32_norms)
        print(f"{case.size}, {case.precision}, {case.mode} mode, torch {torch.__version__}")
        steps = count_case(case, arguments.providers)
        print_steps(steps, arguments.device)
        for provider, step in steps.items():
            for metric, (unit, value) in METRICS.items():
                append(results, case, provider, "training_step", metric, unit, value(step))
            if arguments.top:
                print_operations(provider, step, arguments.top, arguments.by)
        print()
    print(f"appended to {results.path}")


if __name__ == "__main__":
    main()
