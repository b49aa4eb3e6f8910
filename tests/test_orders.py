"""The reference at every order up to three, in every nesting of reverse and forward mode, against finite differences.

A third derivative of a fused operation raises and names the reference; so the reference has to be right there, for all
that runs under ``fast_double_backward`` and for the functions of rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp

import rds_fast
from rds_fast.ops.batch_norm import batch_norm
from tests.ops.activations import ALL, IN_PLACE

Function = Callable[[Tensor], Tensor]
Cases = dict[str, tuple[tuple[int, ...], Function]]

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


MEAN, VARIANCE = random(4), random(4).square() + 0.1
KERNEL, TRANSPOSED, BIAS = random(4, 2, 3, 3), random(2, 4, 3, 3), random(4)
TARGET = torch.tensor([0, 3, -100])
MASKED = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]) > 0


def affine(norm: Callable[..., Tensor], *shape: int) -> tuple[tuple[int, ...], Function]:
    """A norm as a function of its input, weight and bias at once: two rows after those of the input."""
    rows = math.prod(shape) // 4

    def function(x: Tensor) -> Tensor:
        return norm(x[:rows].reshape(shape), x[rows], x[rows + 1])

    return (rows + 2, 4), function


def running() -> tuple[Tensor, Tensor]:
    return MEAN.clone(), VARIANCE.clone()


NORMS: Cases = {
    "batch norm": affine(lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), 5, 4),
    "batch norm without parameters": ((5, 4), lambda x: F.batch_norm(x, *running(), training=True, eps=0.1)),
    "batch norm of images": affine(lambda x, w, b: F.batch_norm(x, *running(), w, b, training=True), 2, 4, 1, 2),
    "batch norm in eval mode": affine(lambda x, w, b: F.batch_norm(x, *running(), w, b), 2, 4, 1, 2),
    "batch norm, sum and ReLU": affine(
        lambda x, w, b: batch_norm(x, None, None, w, b, training=True, residual=x.sin(), relu=True), 5, 4
    ),
    "layer norm": affine(lambda x, w, b: F.layer_norm(x, (4,), w, b), 3, 4),
    "layer norm over two dimensions": ((2, 3, 2), lambda x: F.layer_norm(x, (3, 2), x[0].cos())),
    "group norm": affine(lambda x, w, b: F.group_norm(x, 2, w, b), 2, 4, 2),
    "instance norm": affine(lambda x, w, b: F.instance_norm(x, *running(), w, b, eps=0.1), 2, 4, 3),
    "instance norm in eval mode": affine(lambda x, w, b: F.instance_norm(x, *running(), w, b, False), 2, 4, 3),
}
LAYERS: Cases = {
    "convolution": ((2, 2, 4, 4), lambda x: F.conv2d(x, KERNEL, BIAS, 2, 1)),
    "convolution's weight": ((2, 3, 3), lambda x: F.conv2d(x.sin()[None], x[None], padding=1)),
    "transposed convolution": ((2, 2, 3, 3), lambda x: F.conv_transpose2d(x, TRANSPOSED, BIAS, 2, 1)),
    "max pool": ((2, 5, 5), lambda x: F.max_pool2d(x, 3, 2, 1)),
    "adaptive max pool": ((2, 5, 5), lambda x: F.adaptive_max_pool2d(x, (2, 3))),
    "average pool": ((2, 5, 5), lambda x: F.avg_pool2d(x, 3, 2, 1)),
    "adaptive average pool": ((2, 5, 5), lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
    "concatenation": ((3, 4), lambda x: torch.cat([x, x.sin()], 1)),
    "attention": ((2, 3, 4), lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos())),
    "causal attention": ((2, 3, 4), lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos(), is_causal=True)),
    "masked attention": ((3, 4), lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos(), x[:, :3])),
    "softmax": ((3, 4), lambda x: F.softmax(x, 1)),
    "log-softmax": ((3, 4), lambda x: F.log_softmax(x, 1)),
}
ACTIVATIONS: Cases = {name: ((4, 5), case.ours) for name, case in ALL.items()}
for _name in ("celu", "hardsigmoid", "silu"):
    ACTIVATIONS[f"{_name} in place"] = ((4, 5), lambda x, name=_name: IN_PLACE[name].ours(x * 1.0))
ROWS: Cases = {
    "logsumexp": ((3, 4), lambda x: rds_fast.logsumexp(x, 1)),
    "logsumexp of all": ((3, 4), lambda x: rds_fast.logsumexp(x, (0, 1))),
    "logsumexp with -inf": ((3, 4), lambda x: rds_fast.logsumexp(x.masked_fill(MASKED, -math.inf))),
    "cross-entropy": ((3, 4), lambda x: torch.cat(rds_fast.cross_entropy_with_logsumexp(x, TARGET))),
    "smooth cross-entropy": (
        (3, 4),
        lambda x: torch.cat(rds_fast.cross_entropy_with_logsumexp(x, TARGET, label_smoothing=0.1)),
    ),
    "cross-entropy's target": ((3, 4), lambda x: rds_fast.cross_entropy_with_logsumexp(x, x.sin().square())[0]),
}
for _p, _power in ((1.0, 3.0), (1.5, 1.0), (2.0, 0.5), (2.0, 1.0), (2.0, 2.0), (2.0, 3.0), (3.0, 2.0), (math.inf, 2.0)):
    ROWS[f"{_p:g}-norm to the {_power:g}"] = (
        (3, 4),
        lambda x, p=_p, power=_power: rds_fast.gradient_norm(x, p, power=power),
    )
CASES = NORMS | LAYERS | ACTIVATIONS | ROWS

# r, a reverse pass, or f, a forward one; the innermost first
WAYS = ["".join(way) for order in (1, 2, 3) for way in itertools.product("rf", repeat=order)]


class Scalar:
    """A scalar of the results of one case, and the directions in which it is differentiated one after the other."""

    def __init__(self, name: str) -> None:
        shape, self.function = CASES[name]
        generator = torch.Generator().manual_seed(1)
        self.x, *self.directions = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))

    def __call__(self, x: Tensor) -> Tensor:
        with rds_fast.fast_double_backward():
            y = self.function(x)
        return (y.sin() * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    def by_autograd(self, x: Tensor, order: int) -> Tensor:
        x = x.detach().requires_grad_()
        value = self(x)
        for v in self.directions[:order]:
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * v).sum()
        return value.detach()

    def by_differences(self, order: int, h: float = 1e-3) -> Tensor:
        """Of the derivative before, by autograd, with an error of h⁴."""
        v = self.directions[order - 1]
        at = {n: self.by_autograd(self.x + n * h * v, order - 1) for n in (-2, -1, 1, 2)}
        return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)

    def by(self, way: str) -> Tensor:
        function: Function = self
        for step, v in zip(way, self.directions, strict=False):
            function = (_reverse if step == "r" else _forward)(function, v)
        return function(self.x)

    def by_dual_numbers(self) -> Tensor:
        """A reverse pass over a forward one, by autograd alone."""
        x = self.x.clone().requires_grad_()
        with forward_ad.dual_level():
            value = forward_ad.unpack_dual(self(forward_ad.make_dual(x, self.directions[0]))).tangent
            (gradient,) = torch.autograd.grad(value, x)
        return (gradient * self.directions[1]).sum()


def _reverse(function: Function, v: Tensor) -> Function:
    return lambda x: (grad(function)(x) * v).sum()


def _forward(function: Function, v: Tensor) -> Function:
    return lambda x: jvp(function, (x,), (v,))[1]


def assert_near(value: Tensor, truth: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forward mode's own imports
@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_right_at_every_order(name: str) -> None:
    with rds_fast.use_backend("reference"):
        scalar = Scalar(name)
        orders = {order: scalar.by_autograd(scalar.x, order) for order in (1, 2, 3)}
        for order, value in orders.items():
            assert_near(value, scalar.by_differences(order))
        for way in WAYS:
            assert_near(scalar.by(way), orders[len(way)], 1e-9)
        try:
            value = scalar.by_dual_numbers()
        except RuntimeError as error:  # of PyTorch's SiLU and Mish, and of its log-sum-exp and softmax
            assert any(reason in str(error) for reason in ("forward AD", "inplace operation"))  # noqa: PT017
        else:
            assert_near(value, orders[2], 1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(rds_fast.backends.failure("native", "cpu") is not None, reason="needs the native kernels")
@pytest.mark.parametrize("name", CASES)
def test_what_is_fused_is_right_or_names_the_reference(name: str) -> None:
    with rds_fast.use_backend("reference"):
        scalar = Scalar(name)
        truth = scalar.by_autograd(scalar.x, 3)
    try:
        value = scalar.by_autograd(scalar.x, 3)
    except RuntimeError as error:
        assert "third derivative" in str(error)  # noqa: PT017
        assert "rds_fast.use_backend('reference')" in str(error)  # noqa: PT017
    else:
        assert_near(value, truth, 1e-9)
    second = scalar.by_autograd(scalar.x, 2)
    assert_near(scalar.by("fr"), second, 1e-9)
    if not name.startswith(("silu", "mish")):  # which PyTorch cannot do there, and says so
        with torch.no_grad():
            assert_near(scalar.by("ff"), second, 1e-9)


@pytest.mark.parametrize("name", ["batch norm", "layer norm", "gelu", "relu", "convolution", "logsumexp"])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tangent_that_comes_after_the_forward(name: str, graph: bool) -> None:
    """A backward on fused operations is right or raises; on the reference it is right."""
    scalar = Scalar(name)

    def check(backend: str) -> None:
        x = scalar.x.clone().requires_grad_()
        with rds_fast.use_backend(backend), rds_fast.fast_double_backward():
            y = scalar.function(x)
        u, tangent = y.detach().sin(), y.detach().cos()

        def backward(u: Tensor) -> Tensor:
            return torch.autograd.grad(y, x, u, create_graph=graph, retain_graph=True)[0]

        with forward_ad.dual_level():
            by_dual_numbers = forward_ad.unpack_dual(backward(forward_ad.make_dual(u, tangent))).tangent
        truth = backward(tangent)  # the backward is linear
        torch.testing.assert_close(by_dual_numbers, truth)
        torch.testing.assert_close(jvp(backward, (u,), (tangent,))[1], truth)

    check("reference")
    try:
        check("auto")
    except RuntimeError as error:
        assert "was given a tangent of forward mode" in str(error)  # noqa: PT017
