"""A chain in what training does with a model: accumulation, autocast, checkpoints of activations, averages."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rds_fast
from rds_fast import fast_double_backward
from rds_fast.nn import fuse
from rds_fast.training.models import _torchvision_models as torchvision_models

X = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 1])
LOSS = rds_fast.PenalizedLoss(rds_fast.DensityPenalty(), 0.5)


class Network(nn.Module):
    """A stem, a residual block that is called twice, and a head. ``around``: how the block is called."""

    def __init__(self, around: Callable[..., Tensor] = lambda block, x: block(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = torchvision_models().resnet.BasicBlock(4, 4)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = self.around(self.block, x)
        return self.head(x)


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    plain = Network(**options).double()
    fused = fuse(plain)
    assert type(fused.block).__name__ == "FusedBasicBlock"
    assert type(fused.stem).__name__ == "FusedSequential"
    return plain, fused


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_same(results: list[Any], rtol: float = 1e-8) -> None:
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * max(1e-4, expected.abs().max().item()))


def test_accumulated_steps_of_a_block_called_twice() -> None:
    results = []
    for model in pair():
        for part in (slice(0, 2), slice(2, 4)):
            LOSS(model, X[part], Y[part]).total.backward()
        results.append([*gradients(model), *model.buffers()])
    assert_same(results)


def test_one_graph_differentiated_twice_and_in_parts() -> None:
    results = []
    for model in pair():
        x = X.clone().requires_grad_()
        with fast_double_backward():
            logits = model(x)
        (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), x, create_graph=True)
        penalty = gradient.square().sum()
        some = [model.block.conv2.weight, model.stem[1].bias]
        found = torch.autograd.grad(penalty, some, retain_graph=True)
        again = torch.autograd.grad(penalty + logits.square().sum(), list(model.parameters()), retain_graph=True)
        of_x = torch.autograd.grad(penalty, x, retain_graph=True)
        (penalty + logits.square().sum()).backward()
        results.append([*found, *again, *of_x, *gradients(model)])
        torch.testing.assert_close(gradients(model), list(again))
    assert_same(results)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_checkpointed_blocks(training: bool) -> None:
    results = []
    for model in pair(around=lambda block, x: checkpoint(block, x, use_reentrant=False)):
        LOSS(model.train(training), X, Y).total.backward()
        results.append(gradients(model))
    assert_same(results)


def test_tensors_saved_on_the_cpu() -> None:
    results = []
    for model in pair():
        with torch.autograd.graph.save_on_cpu():
            total = LOSS(model, X, Y).total
        total.backward()
        results.append(gradients(model))
    assert_same(results)


def test_frozen_layers() -> None:
    results = []
    for model in pair():
        for parameter in itertools.chain(model.stem.parameters(), model.block.bn1.parameters()):
            parameter.requires_grad_(False)
        LOSS(model, X, Y).total.backward()
        results.append(gradients(model))
    assert len(results[0]) == 6
    assert_same(results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaled_gradient(dtype: torch.dtype) -> None:
    """As close to float64 as the plain layers are, or nearly: a chain rounds less often."""
    plain, fused = pair()
    LOSS(plain, X, Y).total.backward()
    truth = torch.cat([gradient.flatten() for gradient in gradients(plain)])
    errors = []
    for model in (plain, fused):
        model = copy.deepcopy(model).float()
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            total = LOSS(model, X.float(), Y).total
        (128 * total).backward()
        found = torch.cat([gradient.flatten() for gradient in gradients(model)]).double() / 128
        errors.append(float((found - truth).norm() / truth.norm()))
    assert errors[1] < max(1.5 * errors[0], torch.finfo(dtype).eps)


def test_a_parametrised_convolution_is_called_for_itself() -> None:
    results = []
    for model in pair():
        nn.utils.parametrizations.weight_norm(model.block.conv1)
        LOSS(model, X, Y).total.backward()
        results.append(gradients(model))
    assert_same(results)


def test_averaged_models_stay_fused() -> None:
    _, fused = pair()
    averaged = torch.optim.swa_utils.AveragedModel(fused)
    averaged.update_parameters(fused)
    assert type(averaged.module.block) is type(fused.block)
    torch.testing.assert_close(averaged.eval()(X), fused.eval()(X))


def test_a_parameter_changed_between_two_backwards_raises() -> None:
    _, fused = pair()
    total = LOSS(fused, X, Y).total
    total.backward(retain_graph=True)
    with torch.no_grad():
        fused.block.bn1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
