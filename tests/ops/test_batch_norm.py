"""Batch norm with residual and ReLU: every derivative against plain float64 PyTorch, and what is kept for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rds_fast import backends, fast_double_backward, use_backend
from rds_fast.nn import fuse
from rds_fast.ops.batch_norm import batch_norm

pytestmark = pytest.mark.skipif(
    backends.failure("native", "cpu") is not None, reason=f"native: {backends.failure('native', 'cpu')}"
)

SHAPES = {
    "2d": (4, 6, 5, 3),
    "1d": (3, 6, 7),
    "3d": (2, 6, 2, 3, 2),
    "no spatial dimension": (9, 6),
    "one sample": (1, 6, 4, 4),
    "one value a plane": (8, 6, 1, 1),
}


def composite(
    input: Tensor, mean: Any, var: Any, weight: Any, bias: Any, *options: Any, residual: Tensor | None, relu: bool
) -> Tensor:
    y = functional.batch_norm(input, mean, var, weight, bias, *options)
    y = y if residual is None else y + residual
    return torch.relu(y) if relu else y


class Case:
    """One batch norm, its leaves, and every derivative that a training step may ask for."""

    def __init__(self, shape: tuple[int, ...], affine: bool, residual: bool, channels_last: bool, eps: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.eps = eps
        channels = shape[1]
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        self.x = x.requires_grad_()
        self.affine = [torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(2 * affine)]
        self.residual = torch.randn_like(x) if residual else None
        self.leaves = [self.x, *self.affine, *([self.residual] if residual else [])]  # type: ignore[list-item]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def run(self, function: Callable[..., Tensor], training: bool, relu: bool) -> list[Tensor]:
        channels = self.x.shape[1]
        mean, var = torch.full((channels,), 0.3).double(), torch.full((channels,), 1.7).double()
        weight, bias = self.affine or (None, None)
        y = function(self.x, mean, var, weight, bias, training, 0.2, self.eps, residual=self.residual, relu=relu)
        loss = (y.sin() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
        gradients = torch.autograd.grad(loss, self.leaves, create_graph=True)
        of_all = torch.stack([gradient.pow(3).sum() for gradient in gradients]).sum()
        second = torch.autograd.grad(of_all + loss, self.leaves, retain_graph=True)
        (inner,) = torch.autograd.grad(loss, self.x, create_graph=True)
        penalised = torch.autograd.grad(inner.square().sum() + loss.cos(), self.leaves)
        return [y, mean, var, *gradients, *second, *penalised]


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [*SHAPES, "channels-last"])
def test_derivatives(name: str, training: bool, affine: bool, residual: bool, relu: bool) -> None:
    shape = SHAPES.get(name, SHAPES["2d"])
    case = Case(shape, affine, residual, name == "channels-last", eps=0.3)
    ours, truth = (case.run(function, training, relu) for function in (batch_norm, composite))
    assert isinstance(ours[0].grad_fn, torch.autograd.function.BackwardCFunction)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9 * max(1.0, true.abs().max().item()))


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 10.0])
def test_epsilon_far_from_the_variance(eps: float) -> None:
    case = Case(SHAPES["2d"], True, False, False, eps)
    ours, truth = (case.run(function, True, True) for function in (batch_norm, composite))
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-8 * max(1.0, true.abs().max().item()))


def test_channel_with_zero_variance() -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    x[:, 1] = 7.0
    x.requires_grad_()
    results = []
    for function in (functional.batch_norm, batch_norm):
        y = function(x, None, None, training=True, eps=0.1)
        (gradient,) = torch.autograd.grad(y.exp().sum(), x, create_graph=True)
        results.append([y, gradient, *torch.autograd.grad(gradient.pow(3).sum(), x)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradcheck(training: bool, residual: bool) -> None:
    case = Case((3, 2, 3, 2), True, residual, False, eps=0.3)
    mean, var = torch.zeros(2).double(), torch.ones(2).double()

    def call(*leaves: Tensor) -> Tensor:
        x, weight, bias, *rest = leaves
        return batch_norm(x, mean.clone(), var.clone(), weight, bias, training, 0.1, 0.3, residual=(rest or [None])[0])

    assert torch.autograd.gradcheck(call, case.leaves)
    assert torch.autograd.gradgradcheck(call, case.leaves)


def test_third_derivative_raises() -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(batch_norm(x, None, None, training=True).exp().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"third derivative of batch norm.*reference"):
        torch.autograd.grad(second.pow(3).sum(), x)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_running_statistics_are_pytorchs(kind: type[nn.Module], momentum: float | None) -> None:
    rank = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[kind]  # type: ignore[index]
    ours, theirs = kind(3, momentum=momentum), kind(3, momentum=momentum)
    for _ in range(3):
        x = torch.randn(4, 3, *[5] * rank) * 3 + 2
        with fast_double_backward():
            y = ours(x.requires_grad_())
        torch.testing.assert_close(y, theirs(x))
    for (name, mine), buffer in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, buffer, msg=name)


def test_statistics_of_another_dtype() -> None:
    """A model in bfloat16 has its running statistics in bfloat16 too."""
    x = torch.randn(16, 3, 4, 4).bfloat16().requires_grad_()
    buffers = [torch.zeros(3).bfloat16(), torch.ones(3).bfloat16()]
    weight = torch.ones(3).bfloat16().requires_grad_()
    y = batch_norm(x, *buffers, weight, None, True, 0.5)
    (gradient,) = torch.autograd.grad(y.float().exp().sum(), weight)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(buffers[0].float(), 0.5 * x.float().mean((0, 2, 3)), rtol=0.01, atol=0.01)


def test_statistics_changed_after_the_forward_do_not_matter() -> None:
    """The backward in eval mode is that of the statistics which the forward used."""
    x = torch.randn(4, 3, 5, requires_grad=True)
    mean, var = torch.zeros(3), torch.full((3,), 4.0)
    y = batch_norm(x, mean, var, eps=1e-5)
    batch_norm(x, mean, var, training=True)
    assert not var.eq(4.0).any()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, (4.0 + 1e-5) ** -0.5))


def test_pytorchs_own_errors() -> None:
    x = torch.randn(1, 3, requires_grad=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(x, None, None, training=True)
    with pytest.raises(ValueError, match="residual is"):
        batch_norm(x, None, None, training=True, residual=torch.randn(3))
    with pytest.raises(RuntimeError, match="running_mean"):
        batch_norm(torch.randn(4, 3, 5), torch.zeros(2), torch.zeros(2), training=True)
    empty = batch_norm(torch.randn(0, 3, 5), torch.zeros(3), torch.ones(3), training=True)
    assert empty.shape == (0, 3, 5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_any_memory_format(channels_last: bool) -> None:
    """The cotangents come as they come: expanded, transposed, in the other format."""
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    results = []
    for function in (functional.batch_norm, batch_norm):
        y = function(x, None, None, training=True)
        transposed = (y.transpose(2, 3) * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))).sin()
        (gradient,) = torch.autograd.grad(transposed.sum() + y.mean().exp(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.transpose(2, 3).pow(3).sum(), x)
        results.append([y, gradient, second])
    torch.testing.assert_close(results[1], results[0])
    assert results[1][0].is_contiguous(memory_format=torch.channels_last) == channels_last


def raw_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    x, u, v = (torch.randn(3, 4, 5, 2) for _ in range(3))
    weight, bias, mean, var = torch.randn(4), torch.randn(4), torch.randn(4), torch.rand(4) + 0.5
    y = torch.relu(x)
    raw = torch.ops.rds_fast
    return [
        (raw.batch_norm.default, (x, weight, bias, None, None, None, 0.1, 1e-5, True, "native")),
        (raw.batch_norm.default, (x, None, None, u, mean.clone(), var.clone(), 0.1, 1e-5, False, "native")),
        (raw.batch_norm_inference.default, (x, mean, var, weight, None, u, 1e-5, True, "native")),
        (raw.batch_norm_backward.default, (u, v, x, y, weight, bias, mean, var, None, True, 1e-5, True, "native")),
        (raw.batch_norm_backward.default, (u, None, x, None, None, bias, mean, var, v, False, 1e-5, True, "native")),
        (
            raw.batch_norm_double_backward.default,
            (v, weight, bias, v, u, x, y, weight, bias, mean, var, True, 1e-5, True, True, "native"),
        ),
        (
            raw.batch_norm_double_backward.default,
            (v, None, None, None, u, x, None, weight, bias, mean, var, False, 1e-5, False, False, "native"),
        ),
        (
            raw.batch_norm_input_gradient.default,
            (u, x, weight, bias, mean, var, torch.randn(2, 4), True, 1e-5, True, "native"),
        ),
    ]


@pytest.mark.parametrize("number", range(8))
def test_opcheck(number: int) -> None:
    operator, arguments = raw_calls()[number]
    torch.library.opcheck(operator, arguments)


def differentiate(operator: Any, first: Tensor, *rest: Any) -> None:
    result = operator(first.clone().requires_grad_(), *rest)
    (result if isinstance(result, Tensor) else result[0]).sum().backward()


def test_raw_operations_refuse_to_be_differentiated() -> None:
    for operator, arguments in raw_calls():
        with pytest.raises(RuntimeError, match="no derivative of its own"):
            differentiate(operator, *arguments)


def kept_storages(loss: Callable[[], Tensor], model: nn.Module) -> int:
    """The number of distinct four-dimensional storages, parameters aside, that the graph of a loss keeps.

    Not counted are single values: the one that stands for a tensor's place in the graph, or the cotangent of a sum.
    """
    storages = {}

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = func(*args, **(kwargs or {}))
            for result in tree_leaves(results):
                if isinstance(result, Tensor) and result.dim() == 4 and result.numel() > 1:
                    storage = result.untyped_storage()
                    if storage.nbytes() > result.element_size():
                        storages[storage._cdata] = StorageWeakRef(storage)
            return results

    with Watching():
        graph = loss()
    assert graph.requires_grad
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage()._cdata, None)
    return sum(not storage.expired() for storage in storages.values())


def test_what_a_chain_keeps() -> None:
    """What convolutions write, in both directions: what batch norm writes is computed again."""
    chain = fuse(
        nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3))
        )
    )
    x = torch.randn(3, 3, 9, 9, requires_grad=True)

    def penalty() -> Tensor:
        with fast_double_backward():
            y = chain(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return gradient.square().sum()

    results, gradients_of_inputs, its_input = 2, 3, 1  # the last result's cotangent is one value, for all of the sum
    assert kept_storages(penalty, chain) == results + gradients_of_inputs + its_input


@torch.no_grad()
def doubled_in_place(gradient: Tensor) -> None:
    gradient.mul_(2)


def given_other_memory(gradient: Tensor) -> None:
    gradient.data = 2 * gradient.data


@pytest.mark.parametrize("hook", [doubled_in_place, given_other_memory, lambda gradient: 2 * gradient])
def test_a_hook_that_changes_the_gradient(hook: Any) -> None:
    first, norm = nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double()
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    results = []
    for fast in (True, False):
        with fast_double_backward() if fast else use_backend("reference"):
            h = first(x)
            h.register_hook(hook)
            y = norm(h)
        (gradient,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), [*first.parameters(), *norm.parameters()]))
    torch.testing.assert_close(*results)


def test_a_residual_on_another_device() -> None:
    with pytest.raises(ValueError, match=r"residual is .* on meta; it must be as the input, .* on cpu"):
        batch_norm(torch.ones(3, 2), None, None, training=True, residual=torch.ones(3, 2, device="meta"))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_cotangents_that_are_not_contiguous(training: bool) -> None:
    """A sum of gγ has an expanded cotangent, and the gradient of every second weight a strided one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    statistics = torch.zeros(3).double(), torch.ones(3).double()
    results = []
    for function in (batch_norm, functional.batch_norm):
        y = function(x, *statistics, weight[::2], bias[::2], training)
        gradients = torch.autograd.grad(y.sin().sum(), (weight, bias), create_graph=True)
        of_squares = sum(gradient.square().sum() for gradient in gradients)
        seconds = torch.autograd.grad(of_squares, (x, weight), retain_graph=True)
        whole = function(x, *statistics, weight[:3], bias[:3], training)
        sums = sum(g.sum() for g in torch.autograd.grad(whole.sin().sum(), (weight, bias), create_graph=True))
        results.append([*seconds, *torch.autograd.grad(sums, (x, weight, bias))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_running_statistics_have_no_gradient() -> None:
    """PyTorch's error, in the place of a zero."""
    x, mean = torch.randn(5, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'running_mean'"):
        batch_norm(x, mean, torch.ones(3)).sum().backward()
