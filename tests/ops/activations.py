"""The activations under test: ours, PyTorch's, and the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rds_fast.ops import activation

Function = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    ours: Function
    theirs: Function
    truth: Function  # of float64


def celu(x: Tensor) -> Tensor:
    """PyTorch's own derivative of it holds 1/alpha rounded to float32."""
    return torch.where(x > 0, x, 0.7 * torch.expm1(x.clamp(max=0) / 0.7))


def hardsigmoid(x: Tensor) -> Tensor:
    return F.hardtanh(x, -3.0, 3.0) / 6 + 0.5


def case(ours: Function, theirs: Function, truth: Function | None = None) -> Case:
    return Case(ours, theirs, truth or theirs)


SMOOTH = {
    "gelu": case(activation.gelu, F.gelu),
    "gelu_tanh": case(lambda x: activation.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": case(activation.silu, F.silu),
    "mish": case(activation.mish, F.mish),
    "softplus": case(activation.softplus, F.softplus),
    # within the range of the tests it turns linear
    "softplus(2, 5)": case(lambda x: activation.softplus(x, 2.0, 5.0), lambda x: F.softplus(x, 2.0, 5.0)),
    "hardswish": case(activation.hardswish, F.hardswish),
    "elu": case(activation.elu, F.elu),
    "elu(0.7)": case(lambda x: activation.elu(x, 0.7), lambda x: F.elu(x, 0.7)),
    "selu": case(activation.selu, F.selu),
    "celu(0.7)": case(lambda x: activation.celu(x, 0.7), lambda x: F.celu(x, 0.7), celu),
    "sigmoid": case(activation.sigmoid, torch.sigmoid),
    "tanh": case(activation.tanh, torch.tanh),
}
PIECEWISE_LINEAR = {
    "relu": case(activation.relu, F.relu),
    "leaky_relu": case(activation.leaky_relu, F.leaky_relu),
    "leaky_relu(-0.3)": case(lambda x: activation.leaky_relu(x, -0.3), lambda x: F.leaky_relu(x, -0.3)),
    "hardtanh": case(activation.hardtanh, F.hardtanh),
    "hardtanh(-0.5, 2)": case(lambda x: activation.hardtanh(x, -0.5, 2.0), lambda x: F.hardtanh(x, -0.5, 2.0)),
    "relu6": case(activation.relu6, F.relu6),
    # PyTorch's has no second derivative; the same of its own operations has
    "hardsigmoid": case(activation.hardsigmoid, hardsigmoid),
}
ALL = SMOOTH | PIECEWISE_LINEAR

# Their derivatives, PyTorch's and ours, are those at the rounded result.
INVERSES = {"sigmoid": torch.logit, "tanh": torch.atanh}

# In place; those of SMOOTH have no in-place form where they are missing.
IN_PLACE: dict[str, Case] = {
    "relu": case(lambda x: activation.relu(x, True), F.relu),
    "leaky_relu": case(lambda x: activation.leaky_relu(x, 0.2, True), lambda x: F.leaky_relu(x, 0.2)),
    "hardtanh": case(lambda x: activation.hardtanh(x, -0.5, 2.0, True), lambda x: F.hardtanh(x, -0.5, 2.0)),
    "relu6": case(lambda x: activation.relu6(x, True), F.relu6),
    "hardsigmoid": case(lambda x: activation.hardsigmoid(x, True), hardsigmoid),
    "silu": case(lambda x: activation.silu(x, True), F.silu),
    "mish": case(lambda x: activation.mish(x, True), F.mish),
    "hardswish": case(lambda x: activation.hardswish(x, True), F.hardswish),
    "elu": case(lambda x: activation.elu(x, 0.7, True), lambda x: F.elu(x, 0.7)),
    "selu": case(lambda x: activation.selu(x, True), F.selu),
    "celu": case(lambda x: activation.celu(x, 0.7, True), celu),
    "sigmoid": case(lambda x: activation.sigmoid(x, True), torch.sigmoid),
    "tanh": case(lambda x: activation.tanh(x, True), torch.tanh),
}


def orders(function: Function, x: Tensor, g: Tensor, v: Tensor) -> list[Tensor]:
    """y, gx, dg and dx, by autograd."""
    x, g = (t.detach().clone().requires_grad_() for t in (x, g))
    y = function(x)
    (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
    double = torch.autograd.grad(gx, (g, x), v, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (y, gx, *double)]


def true_orders(name: str, x: Tensor, g: Tensor, v: Tensor) -> list[Tensor]:
    """The same in float64."""
    truth = ALL[name].truth
    y, *derivatives = orders(truth, x.double(), g.double(), v.double())
    if name in INVERSES and x.dtype in (torch.bfloat16, torch.float16):
        x = INVERSES[name](ALL[name].theirs(x).double())
        derivatives = orders(truth, x, g.double(), v.double())[1:]
    return [y, *derivatives]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def smooth_points() -> Tensor:
    """Values on both sides of every kink and at some distance from each: 0, ±0.5, ±1, 2, 2.5, ±3, 6."""
    return torch.tensor(
        [[-7.3, -3.4, -2.2, -1.3, -0.7], [-0.2, 0.3, 0.7, 1.4, 2.2], [2.8, 3.3, 4.9, 7.1, 21.0]]
    ).double()
