"""Convolutions under ``fast_double_backward``: right at every order, and no more work than is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fast_layers import Calls, fast
from torch import Tensor, nn
from torch.nn import functional

from rds_fast import backends, fast_double_backward

pytestmark = pytest.mark.skipif(
    backends.failure("native", "cpu") is not None, reason=f"native: {backends.failure('native', 'cpu')}"
)

aten = torch.ops.aten

# function, input's shape, weight's shape, arguments
CONVOLUTIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": (functional.conv1d, (2, 3, 7), (4, 3, 3), {"padding": 1}),
    "2d": (functional.conv2d, (2, 3, 5, 6), (4, 3, 3, 2), {}),
    "3d": (functional.conv3d, (2, 2, 4, 3, 4), (3, 2, 2, 2, 2), {"stride": (1, 2, 1)}),
    "strided": (functional.conv2d, (2, 3, 7, 7), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
    # (8 − 3) is odd: the last column is never read, and its gradient must be 0
    "strided, a remainder": (functional.conv2d, (2, 2, 8, 8), (2, 2, 3, 3), {"stride": 2}),
    "dilated": (functional.conv2d, (2, 2, 7, 7), (2, 2, 3, 3), {"dilation": 2, "padding": (2, 1)}),
    "grouped": (functional.conv2d, (2, 4, 5, 5), (6, 2, 3, 3), {"groups": 2}),
    "depthwise": (functional.conv2d, (2, 3, 5, 5), (3, 1, 3, 3), {"groups": 3, "padding": 1}),
    "pointwise": (functional.conv2d, (2, 3, 4, 4), (5, 3, 1, 1), {}),
    "same": (functional.conv2d, (2, 2, 5, 5), (2, 2, 3, 3), {"padding": "same"}),
    # an even kernel: one zero more after the input than before it
    "same, even": (functional.conv2d, (2, 2, 5, 5), (2, 2, 2, 4), {"padding": "same"}),
    "same, dilated": (functional.conv1d, (2, 2, 9), (2, 2, 4), {"padding": "same", "dilation": 3}),
    "valid": (functional.conv2d, (2, 2, 5, 5), (2, 2, 3, 3), {"padding": "valid"}),
    "unbatched": (functional.conv2d, (2, 5, 5), (3, 2, 3, 3), {"padding": 1}),
    "transposed 1d": (functional.conv_transpose1d, (2, 3, 5), (3, 2, 3), {"stride": 2}),
    "transposed 2d": (
        functional.conv_transpose2d,
        (2, 4, 4, 4),
        (4, 3, 3, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
    ),
    "transposed 3d": (functional.conv_transpose3d, (1, 2, 3, 2, 3), (2, 2, 2, 2, 2), {"dilation": 2}),
    "transposed, unbatched": (functional.conv_transpose2d, (2, 4, 4), (2, 3, 3, 3), {}),
}


def tensors(name: str, bias: bool) -> tuple[Callable[..., Tensor], list[Tensor]]:
    function, input_shape, weight_shape, arguments = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (input_shape, weight_shape)]
    if bias:
        transposed = "transpose" in function.__name__
        channels = weight_shape[1] * arguments.get("groups", 1) if transposed else weight_shape[0]
        leaves.append(torch.randn(channels, generator=generator, dtype=torch.float64))

    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return function(x, weight, bias, **arguments)

    return call, [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # PyTorch's own function
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_derivatives(name: str, bias: bool) -> None:
    function, leaves = tensors(name, bias)
    ours = fast(function)(*leaves)
    assert ours.grad_fn is not None
    torch.testing.assert_close(ours, function(*leaves))
    assert torch.autograd.gradcheck(fast(function), leaves)
    assert torch.autograd.gradgradcheck(fast(function), leaves)


def cubic(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([gradient.pow(3).sum() for gradient in gradients]).sum()


# Not "transposed 2d": with an output padding PyTorch's own third derivative fails.
@pytest.mark.parametrize("name", ["2d", "grouped", "transposed 3d"])
def test_third_derivative(name: str) -> None:
    function, leaves = tensors(name, bias=True)
    results = []
    for run in (function, fast(function)):
        gradients = torch.autograd.grad(run(*leaves).sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(cubic(gradients), leaves, create_graph=True)
        results.append(torch.autograd.grad(cubic(second), leaves))
    torch.testing.assert_close(results[0], results[1])


def test_only_the_input_gradient_is_computed_where_only_it_is_asked_for() -> None:
    """And the next call of the same graph gets the weight's gradient."""
    function, (x, weight, bias) = tensors("2d", bias=True)
    y = fast(function)(x, weight, bias).sin().sum()
    with Calls() as inner:
        torch.autograd.grad(y, x, create_graph=True)
    assert not inner.of(aten.convolution_backward.default)
    (transposed,) = inner.of(aten.convolution.default)  # of g, for which x need not be there
    assert transposed[6]
    ours = torch.autograd.grad(y, [x, weight, bias], create_graph=True)
    theirs = torch.autograd.grad(function(x, weight, bias).sin().sum(), [x, weight, bias])
    torch.testing.assert_close(ours, theirs)
    y.backward()
    torch.testing.assert_close([x.grad, weight.grad, bias.grad], list(theirs))


def test_the_inputs_of_backward_decide_as_well() -> None:
    function, (x, weight, bias) = tensors("2d", bias=True)
    with Calls() as calls:
        fast(function)(x, weight, bias).sum().backward(inputs=[bias])
    assert [args[-1] for args in calls.of(aten.convolution_backward.default)] == [[False, False, True]]
    assert x.grad is None
    assert weight.grad is None
    assert bias.grad is not None


def test_double_backward_uses_the_weight_gradient_routine() -> None:
    """PyTorch's own convolves v with a kernel as large as the feature map."""
    function, (x, weight) = tensors("2d", bias=False)
    largest = {}
    for name, run in {"ours": fast(function), "PyTorch's": function}.items():
        (gradient,) = torch.autograd.grad(run(x, weight).sin().sum(), x, create_graph=True)
        with Calls() as calls:
            torch.autograd.grad(gradient.square().sum(), weight)
        kernels = [args[1].shape[2:].numel() for args in calls.of(aten.convolution.default)]
        largest[name] = max(kernels)
    assert largest["ours"] == weight.shape[2:].numel()
    assert largest["PyTorch's"] > largest["ours"]


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 2), (1, 2)], ids=str)
def test_frozen_tensors(frozen: tuple[int, ...]) -> None:
    function, leaves = tensors("2d", bias=True)
    for index in frozen:
        leaves[index].requires_grad_(False)
    free = [leaf for leaf in leaves if leaf.requires_grad]
    results = []
    for run in (function, fast(function)):
        gradients = torch.autograd.grad(run(*leaves).sin().sum(), free, create_graph=True)
        results.append([*gradients, *torch.autograd.grad(cubic(gradients), free)])
    torch.testing.assert_close(results[0], results[1])


def test_autocast_casts_as_pytorch_does() -> None:
    function, leaves = tensors("2d", bias=True)
    leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    results = []
    for run in (function, fast(function)):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(*leaves)
        assert y.dtype == torch.bfloat16
        gradients = torch.autograd.grad(y.float().sin().sum(), leaves, create_graph=True)
        results.append([y, *gradients, *torch.autograd.grad(gradients[0].square().sum(), leaves[1])])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)  # bfloat16: three digits of 8 bits


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (functional.conv2d, {"padding": "same", "stride": 2}, "strided"),
        (functional.conv2d, {"padding": "half"}, "half"),
        (functional.conv1d, {}, r"\[4, 3, 3, 2\]|conv1d"),
    ],
)
def test_pytorchs_own_errors(function: Callable[..., Tensor], arguments: dict[str, Any], message: str) -> None:
    x, weight = torch.randn(2, 3, 5, 6, requires_grad=True), torch.randn(4, 3, 3, 2)
    with fast_double_backward(), pytest.raises((RuntimeError, ValueError), match=message):
        function(x, weight, **arguments)


def test_empty_batch() -> None:
    x = torch.randn(0, 3, 5, 6, requires_grad=True)
    weight = torch.randn(4, 3, 3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(fast(functional.conv2d)(x, weight).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), weight)
    assert torch.equal(second, torch.zeros_like(weight))


class Named(torch.autograd.Function):
    """A user's function, whose node has an attribute that hides one of a node's methods."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.name = "mine"
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def test_a_neighbouring_node_whose_name_is_hidden() -> None:
    layer, x = nn.Conv1d(2, 3, 2), torch.randn(1, 2, 5, requires_grad=True)
    with fast_double_backward():
        y = layer(Named.apply(x))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), layer.weight)
    expected = torch.func.grad(lambda w: 2 * _input_gradient(2 * x.detach(), w, layer.bias).sum())(layer.weight)
    torch.testing.assert_close(second, expected)


def _input_gradient(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.func.grad(lambda x: torch.conv1d(x, weight, bias).square().sum())(x)


def test_numbers_of_numpy() -> None:
    """PyTorch's own functions take them."""
    numpy = pytest.importorskip("numpy")
    x, weight = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(4, 3, 2, 2)
    two = numpy.int64(2)
    functions: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: functional.conv2d(x, weight, stride=two, padding=(two, numpy.int32(1))),
        lambda x: functional.max_pool2d(x, two, dilation=two),
        lambda x: functional.avg_pool2d(x, two, (two, 1)),
        lambda x: functional.adaptive_avg_pool2d(x, (two, None)),
        lambda x: functional.leaky_relu(x, numpy.float32(0.5)),
        lambda x: functional.hardtanh(x, numpy.float32(-0.5), two),
        lambda x: functional.elu(x, numpy.float32(0.5)),
        lambda x: functional.softplus(x, numpy.float32(0.5), two),
    )
    for function in functions:
        torch.testing.assert_close(fast(function)(x), function(x))
