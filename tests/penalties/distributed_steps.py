"""Training steps of a small network, for ``test_distributed.py``; as a program, one process of two.

python distributed_steps.py RANK FILE_TO_MEET_AT FILE_FOR_THE_GRADIENTS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from rds_fast import (
    AdversarialLoss,
    DensityPenalty,
    InputGradientPenalty,
    PenalizedLoss,
    density_penalty_from_logits,
    fast_double_backward,
)
from rds_fast.nn import fuse

PROCESSES = 2
LOSSES: dict[str, Callable[[], PenalizedLoss]] = {
    "exact": lambda: PenalizedLoss(DensityPenalty(), 0.5),
    "finite difference": lambda: PenalizedLoss(DensityPenalty(method="finite_difference"), 0.5),
    "input gradient": lambda: PenalizedLoss(InputGradientPenalty(), 0.5),
    "share": lambda: PenalizedLoss(DensityPenalty(), 0.5, share=0.5),  # two forwards before the backward
}


def network(*, fused: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double()
    return fuse(model) if fused else model


def batch(rank: int, part: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * rank + part)
    return torch.randn(4, 3, 6, 6, generator=generator).double(), torch.randint(5, (4,), generator=generator)


def gradients(name: str, model: nn.Module, rank: int) -> list[Tensor]:
    """After two steps, the second of two accumulated batches; which samples share draws is seeded alike."""
    loss = LOSSES[name]()
    torch.manual_seed(rank)
    for parts in ((0,), (1, 2)):
        model.zero_grad()
        for part in parts:
            last = part == parts[-1]
            alone = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if alone else nullcontext():
                loss(model, *batch(rank, part)).total.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


SHARDED: dict[str, Any] = {
    **LOSSES,
    "adversarial": lambda: AdversarialLoss(0.1, steps=2, random_start=False, bounds=(-10.0, 10.0)),
}
FIRST_ORDER = ("finite difference", "adversarial")


def trained(name: str, model: nn.Module, ranks: list[int]) -> list[Tensor]:
    """The parameters after two steps of the optimiser, each on the batches of all the ranks."""
    loss = SHARDED[name]()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1)
    for part in range(2):
        optimizer.zero_grad()
        for rank in ranks:
            torch.manual_seed(rank)
            (loss(model, *batch(rank, part)).total / len(ranks)).backward()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        optimizer.step()
    whole = [parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter for parameter in parameters]
    return [parameter.detach().clone() for parameter in whole]


def sharded() -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = network()
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def mode_alone(model: nn.Module, x: Tensor) -> None:
    with fast_double_backward():
        model(x.clone().requires_grad_())


def messages(*calls: Callable[[], Any]) -> list[str]:
    """What each call raises."""
    said = []
    for call in calls:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            said.append(str(error))
        else:
            said.append("nothing")
    return said


def main(rank: int, meeting: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=PROCESSES)
    found: dict[Any, Any] = {}
    for name in LOSSES:
        for fused in (False, True):
            # Between two forwards PyTorch 2.11 writes into the buffers that the first has saved, unless told not to.
            one_forward = name in ("exact", "input gradient")
            model = DistributedDataParallel(
                network(fused=fused), find_unused_parameters=fused, broadcast_buffers=one_forward
            )
            found[name, fused] = gradients(name, model, rank)
    static = DistributedDataParallel(network(), static_graph=True)
    x, y = batch(rank, 0)
    x.requires_grad_()
    found["static graph"] = messages(
        lambda: PenalizedLoss(DensityPenalty(), 0.5)(static, x, y),
        lambda: DensityPenalty(method="finite_difference")(nn.Sequential(static), x),
        lambda: density_penalty_from_logits(static(x), x),
    )
    for name in SHARDED:
        model = sharded()
        if name not in FIRST_ORDER:
            model.set_reshard_after_backward(False)
        found["sharded", name] = trained(name, model, [rank])
    older = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    partly = sharded()
    partly.set_reshard_after_backward(False)
    partly[0].set_reshard_after_backward(True)
    found["freed weights"] = messages(
        *(
            lambda model=model: PenalizedLoss(DensityPenalty(), 0.5)(model, x, y)
            for model in (sharded(), older, partly)
        ),
        *(lambda model=model: mode_alone(model, x.detach()) for model in (sharded(), older)),
        lambda: density_penalty_from_logits(sharded()(x), x),
    )
    torch.save(found, results)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
