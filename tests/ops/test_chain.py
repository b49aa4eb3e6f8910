"""Chains of layers at every order, in each way in which a part of their derivatives may be asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rds_fast import use_backend
from rds_fast.nn.layers import _RECTIFIED, _STAGE, Layer, chain

GENERATOR = torch.Generator().manual_seed(0)


def _norm(kind: Callable[..., nn.Module] = nn.BatchNorm2d, channels: int = 4, **options: Any) -> nn.Module:
    norm = kind(channels, **options)
    for values in (*norm.parameters(), *norm.buffers()):
        if values.is_floating_point():
            values.data += 0.5 * torch.rand(values.shape, generator=GENERATOR)
    return norm


def _layers(name: str) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """The layers, and the shape of their input."""
    conv, relu = nn.Conv2d, nn.ReLU(inplace=True)
    image = (3, 4, 6, 5)
    cases: dict[str, tuple[tuple[Layer, ...], tuple[int, ...]]] = {
        "basic block": (
            (conv(4, 4, 3, padding=1), _norm(), relu, conv(4, 4, 3, padding=1), _norm(), "iadd", relu), image,
        ),
        "bottleneck": (
            (conv(4, 4, 1, bias=False), _norm(), relu, conv(4, 6, 3, padding=1), _norm(channels=6), nn.Dropout(), relu,
             conv(6, 4, 1), _norm(), "add", "relu"),
            image,
        ),
        "strided": (
            (conv(4, 4, 1), _norm(), relu, conv(4, 4, 3, 2, 1, groups=2), _norm(), "relu", conv(4, 2, 2, dilation=2)),
            image,
        ),
        "pre-activation": ((_norm(), relu, conv(4, 4, 3), _norm(), nn.Identity(), relu, conv(4, 3, 1)), image),
        "linear bottleneck": ((conv(4, 4, 1), _norm(), relu, conv(4, 4, 1), _norm(), "add"), image),
        "norms alone": ((conv(4, 4, 1), _norm(affine=False), conv(4, 4, 3, padding=1), _norm(), "relu"), image),
        "widths": (
            (conv(4, 6, 1), _norm(channels=6, affine=False), relu, conv(6, 5, 1), _norm(channels=5, affine=False), relu,
             conv(5, 2, 1)),
            image,
        ),
        "added norm": ((_norm(), "add", relu), image),
        "without norms": ((conv(4, 5, 3), relu, conv(5, 4, 2), "relu", conv(4, 4, 2), relu), image),
        "perceptron": (
            (nn.Linear(4, 5), nn.BatchNorm1d(5), relu, nn.Linear(5, 6, bias=False), relu, nn.Linear(6, 2)),
            (7, 4),
        ),
        "many rows": ((nn.Linear(4, 8), nn.Dropout(), relu, nn.Linear(8, 4)), (2, 3, 4)),
        "transposed": (
            (nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1), _norm(channels=3), relu, nn.ConvTranspose2d(3, 2, 2)),
            image,
        ),
        "1d": ((nn.Conv1d(4, 4, 3, padding="same"), _norm(nn.BatchNorm1d), relu), (3, 4, 7)),
        "3d": ((nn.Conv3d(4, 4, (1, 2, 1)), _norm(nn.BatchNorm3d), relu, nn.Conv3d(4, 2, 2)), (3, 4, 3, 4, 3)),
    }  # fmt: skip
    return cases[name]


NAMES = [
    *("basic block", "bottleneck", "strided", "pre-activation", "linear bottleneck", "norms alone", "widths"),
    *("added norm", "without norms", "perceptron", "many rows", "transposed", "1d", "3d"),
]


class Case:
    """A chain, its leaves, and what a step may ask of them. residual: "input", "other", or "" where none is added."""

    def __init__(self, name: str, training: bool, residual: str, channels_last: bool = False) -> None:
        torch.manual_seed(0)
        GENERATOR.manual_seed(0)
        layers, shape = _layers(name)
        self.model = nn.ModuleList([layer for layer in layers if isinstance(layer, nn.Module)]).double()
        for module in self.model:
            module.train(training and not isinstance(module, nn.Dropout))
        self.layers = layers
        x = torch.randn(shape, generator=GENERATOR).double()
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
            self.model.to(memory_format=torch.channels_last)
        self.x = x.requires_grad_()
        self.residual = None
        if "add" in layers or "iadd" in layers:
            self.residual = self.x if residual == "input" else torch.randn_like(x).requires_grad_()
        self.parameters = list(self.model.parameters())
        self.leaves = [
            self.x,
            *self.parameters,
            *([self.residual] if residual == "other" and self.residual is not None else []),
        ]
        self.buffers = [buffer.clone() for buffer in self.model.buffers()]

    def run(self, backend: str, ask: Callable[..., Any]) -> list[Tensor]:
        for buffer, value in zip(self.model.buffers(), self.buffers, strict=True):
            buffer.copy_(value)
        with use_backend(backend):
            y = chain(self.layers, self.x, self.residual)
        is_chain = "ChainForward" in str(y.grad_fn)
        assert is_chain == (backend == "auto")
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        results = [y, *self.model.buffers(), *ask(self, (y.sin() * weights).sum(), y)]
        return [result.detach().clone() for result in results]

    def check(self, ask: Callable[..., Any]) -> None:
        ours, truth = (self.run(backend, ask) for backend in ("auto", "reference"))
        largest = max(true.abs().max().item() for true in truth)
        for mine, true in zip(ours, truth, strict=True):
            # A bias before a batch norm has the derivative zero, as a sum of terms as large as other derivatives.
            atol = 1e-9 * max(1.0, true.abs().max().item()) + 1e-13 * largest
            torch.testing.assert_close(mine, true, rtol=1e-8, atol=atol)


def penalty(case: Case, loss: Tensor, y: Tensor) -> Any:
    (gradient,) = torch.autograd.grad(loss, case.x, create_graph=True)
    return [gradient, *torch.autograd.grad(gradient.square().sum() + loss.cos(), case.leaves)]


def penalty_alone(case: Case, loss: Tensor, y: Tensor) -> Any:
    """The result has no cotangent of its own in the last backward."""
    (gradient,) = torch.autograd.grad(loss, case.x, torch.ones_like(loss), create_graph=True)
    return torch.autograd.grad(gradient.pow(3).sum(), case.leaves, allow_unused=True, materialize_grads=True)


def of_all_gradients(case: Case, loss: Tensor, y: Tensor) -> Any:
    """Every gradient has a cotangent, and the graph is used twice."""
    gradients = torch.autograd.grad(loss, case.leaves, create_graph=True)
    of_all = torch.stack([gradient.pow(3).sum() for gradient in gradients]).sum()
    twice = [torch.autograd.grad(of_all + part, case.leaves, retain_graph=True) for part in (0, loss)]
    return [*gradients, *twice[0], *twice[1]]


def of_parameters_alone(case: Case, loss: Tensor, y: Tensor) -> Any:
    case.x.requires_grad_()
    gradients = torch.autograd.grad(loss, case.parameters, create_graph=True)
    of_all = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    return torch.autograd.grad(of_all, case.parameters[:1])


def of_some_gradients(case: Case, loss: Tensor, y: Tensor) -> Any:
    some = case.parameters[::3]
    gradients = torch.autograd.grad(loss, some, create_graph=True)
    return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), case.leaves)


ASKS = [penalty, penalty_alone, of_all_gradients, of_parameters_alone, of_some_gradients]


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name: str, training: bool, ask: Callable[..., Any]) -> None:
    Case(name, training, "input").check(ask)


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("name", ["basic block", "bottleneck", "linear bottleneck", "added norm"])
def test_a_residual_from_elsewhere(name: str, ask: Callable[..., Any]) -> None:
    Case(name, True, "other").check(ask)


@pytest.mark.parametrize("name", ["basic block", "bottleneck", "strided", "transposed"])
def test_channels_last(name: str) -> None:
    case = Case(name, True, "input", channels_last=True)
    case.check(of_all_gradients)
    y = chain(case.layers, case.x, case.residual)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["basic block", "perceptron"])
def test_frozen_parameters(name: str) -> None:
    case = Case(name, True, "input")
    for parameter in case.parameters[::2]:
        parameter.requires_grad_(False)
    case.parameters = case.parameters[1::2]
    case.leaves = [case.x, *case.parameters]
    for ask in (penalty, of_all_gradients):
        case.check(ask)


def test_stages_that_hold_the_same_numbers_are_told_apart() -> None:
    class Other(NamedTuple):
        """Equal to every other tuple of nothing."""

    first, second = _RECTIFIED, Other()
    assert first == second
    assert _STAGE(None, first).rest is first
    assert _STAGE(None, second).rest is second
