"""Activations inside a network, caught by hooks: their gradients are eager PyTorch's."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rds_fast
from rds_fast import fast_double_backward
from rds_fast.nn import fuse

pytestmark = pytest.mark.skipif(
    rds_fast.backends.failure("native", "cpu") is not None,
    reason=f"native: {rds_fast.backends.failure('native', 'cpu')}",
)

X = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Its children are called as modules, so that hooks see them."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.activation1 = activation()
        self.convolution2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.activation2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation1(self.norm1(self.convolution1(x)))
        return self.activation2(self.norm2(self.convolution2(hidden)) + x)


def network(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),  # straight into a convolution, which then need not keep its result
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        activation(),
        Residual(activation),
        Residual(activation),
        nn.AvgPool2d(2),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.LayerNorm(36),
        nn.Linear(36, 3),
    ).double()


def derivatives(model: nn.Module, names: list[str], *, fast: bool, of: str, retain: bool) -> dict[str, Tensor]:
    """The gradient of a loss of second order with respect to the outputs of the modules of these names."""
    model = copy.deepcopy(model)
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            outputs[name] = output
            if retain:
                output.retain_grad()

        return hook

    for name, module in model.named_modules():
        if name in names:
            module.register_forward_hook(keep(name))
    x = X.clone().requires_grad_()
    with fast_double_backward() if fast else nullcontext():
        logits = model(x)
    wrt = {"x": [x], "parameters": list(model.parameters()), "activations": list(outputs.values())}[of]
    first = torch.autograd.grad(logits.logsumexp(1).sum() + logits.sin().sum(), wrt, create_graph=True)
    loss = torch.stack([gradient.square().sum() for gradient in first]).sum() + F.softplus(logits).sum()
    if not retain:
        found = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(outputs, found, strict=True))
    loss.backward()
    return {name: output.grad for name, output in outputs.items() if output.grad is not None}


# What a module outputs that is itself fused away (a batch norm before its ReLU) exists in the plain network alone.
PLAIN = [name for name, module in network().named_modules() if name]
FUSED = ["0", "1", "2", "5", "5.convolution1", "5.convolution2", "6", "6.convolution2", "7", "8", "10", "11"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("retain", [False, True], ids=["grad", "retain_grad"])
@pytest.mark.parametrize("of", ["x", "parameters", "activations"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_gradients_of_activations(fused: bool, of: str, retain: bool, training: bool) -> None:
    for activation in (nn.ReLU,) if fused else (nn.ReLU, nn.SiLU):
        model = network(activation).train(training)
        names = FUSED if fused else PLAIN
        truth = derivatives(model, names, fast=False, of=of, retain=retain)
        ours = derivatives(fuse(model) if fused else model, names, fast=True, of=of, retain=retain)
        assert list(ours) == list(truth)
        floor = 1e-10 * max(float(tensor.abs().max()) for tensor in truth.values())
        wrong = [n for n in truth if float((ours[n] - truth[n]).abs().max()) > floor]
        assert not wrong, f"{activation.__name__}: {wrong}"
