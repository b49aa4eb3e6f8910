"""What the objectives and their savings cost: the counts of ``bench/traffic.py``, appended to the same records.

    python bench/objectives.py                     # ResNet-18 at 32² x 1024 and ResNet-50 at 224² x 256, both modes
    python bench/objectives.py --cases resnet18 --providers every_4 share_0.25

A penalty at every k-th step is counted as the mean of a step with it and k − 1 without; its saved bytes are those of
the step with it, which are the peak. A share of the batch is counted in train mode, where batch norm takes a forward
more, and in eval mode, where the batch is cut in two. The teacher of gradient matching is a network like the student.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import Results
from bench.steps import WEIGHT, Case, Loss, stock
from bench.traffic import CASES, META, METRICS, append, count_step
from rds_fast import DensityPenalty, GradientMatchingPenalty, JacobianPenalty, PenalizedLoss


class Part(NamedTuple):
    """A kind of step, and its share of all steps."""

    share: float
    loss: Loss


def penalized(network: nn.Module, penalty: Any, *, step: int = 0, **options: Any) -> Loss:
    loss = PenalizedLoss(penalty, WEIGHT, **options)

    def total(x: Tensor, y: Tensor) -> Tensor:
        return loss(network, x, y, step).total

    return total


def density(case: Case, **options: Any) -> list[Part]:
    return [Part(1.0, penalized(case.network(META), DensityPenalty(), **options))]


def every(case: Case, k: int) -> list[Part]:
    """Each on a network of its own: a second backward of one network would add its gradients to the first's."""
    with_penalty, without = (penalized(case.network(META), DensityPenalty(), every=k, step=step) for step in (0, 1))
    return [Part(1 / k, with_penalty), Part(1 - 1 / k, without)]


def matching(case: Case) -> list[Part]:
    teacher = case.network(META).requires_grad_(False)
    return [Part(1.0, penalized(case.network(META), GradientMatchingPenalty(teacher, power=2)))]


PROVIDERS: dict[str, Callable[[Case], list[Part]]] = {
    "cross_entropy": lambda case: [Part(1.0, stock(case.network(META)))],
    "ours": density,
    "every_4": partial(every, k=4),
    "every_16": partial(every, k=16),
    "share_0.25": partial(density, share=0.25),
    "share_0.5": partial(density, share=0.5),
    "jacobian_1": lambda case: [Part(1.0, penalized(case.network(META), JacobianPenalty()))],
    "gradient_matching": matching,
}


def figures(case: Case, provider: str) -> dict[str, float]:
    """Each metric of a step on average; of the saved bytes, the peak."""
    parts = PROVIDERS[provider](case)
    steps = [count_step(part.loss, *case.batch(META)) for part in parts]
    result = {}
    for metric, (_, value) in METRICS.items():
        values = [value(step) for step in steps]
        mean = sum(part.share * each for part, each in zip(parts, values, strict=True))
        result[metric] = max(values) if metric == "saved_bytes" else mean
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--modes", nargs="+", default=["train", "eval"], choices=["train", "eval"])
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    arguments = parser.parse_args()
    results = Results("traffic", META)
    for case in (CASES[name]._replace(mode=mode) for name in arguments.cases for mode in arguments.modes):
        print(f"{case.size}, {case.mode} mode\n{'':20}" + "".join(f"{metric:>24}" for metric in METRICS))
        stock_figures = figures(case, "cross_entropy")
        for provider in arguments.providers:
            values = figures(case, provider)
            cells = (f"{value:.4g} ({value / stock_figures[metric]:.2f}x)" for metric, value in values.items())
            print(f"{provider:20}" + "".join(f"{cell:>24}" for cell in cells))
            for metric, (unit, _) in METRICS.items():
                append(results, case, provider, "training_step", metric, unit, values[metric])
    print(f"appended to {results.path}")


if __name__ == "__main__":
    main()
