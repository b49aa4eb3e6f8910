"""Models at random statistics, and how a fused one is compared with the plain one at every order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import rds_fast.nn.layers
from rds_fast.ops.batch_norm import BatchNorm

Compare = Callable[[nn.Module, nn.Module, Tensor], None]


def randomised(model: nn.Module) -> nn.Module:
    """In float64, with batch norms that are not the identity."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                if values is not None:
                    values.data += 0.4 * (torch.rand(values.shape, generator=generator, dtype=values.dtype) - 0.3)
    return model.double()


def _derivatives(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, the gradient of its log-sum-exp in x, and the derivatives of both in x and in every parameter."""
    x = x.clone().requires_grad_()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(11)  # the same dropout
        output = model(x)
    (gradient,) = torch.autograd.grad(output.flatten(1).logsumexp(1).sum(), x, create_graph=True)
    loss = gradient.flatten(1).norm(dim=1).sum() + output.square().mean()
    inputs = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    derivatives = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [output, gradient, *(torch.zeros(()) if d is None else d for d in derivatives)]


def _assert_equal_at_every_order(plain: nn.Module, fused: nn.Module, x: Tensor) -> None:
    derivatives = _derivatives(plain, x)
    largest = max(1.0, *(float(derivative.detach().abs().max()) for derivative in derivatives))
    for expected, actual in zip(derivatives, _derivatives(fused, x), strict=True):
        scale = float(expected.detach().abs().max())
        # A bias before a batch norm has the derivative zero, as a sum of terms that are as large as other derivatives.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7 * scale + 1e-12 * largest)
    states = plain.state_dict(), fused.state_dict()
    assert list(states[0]) == list(states[1])
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.fixture
def assert_equal() -> Compare:
    """Output, first and second derivatives and, after them, running statistics."""
    return _assert_equal_at_every_order


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the batch norms of chains were called with, one by one: "relu", "add", "add relu"."""
    seen: list[str] = []
    original = rds_fast.nn.layers.run

    def recording(chain, *arguments):
        for stage in chain.stages:
            adds = stage is chain.stages[-1] and chain.residual >= 0
            if isinstance(stage.rest, BatchNorm):
                seen.append(" ".join(["add"] * adds + ["relu"] * stage.rest.relu))
        return original(chain, *arguments)

    monkeypatch.setattr(rds_fast.nn.layers, "run", recording)
    return seen


@pytest.fixture
def random_model() -> Callable[[nn.Module], nn.Module]:
    return randomised
