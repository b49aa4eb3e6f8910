"""The activations under autograd: what each order launches, and every way to differentiate them is right or raises."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rds_fast.ops import activation
from tests.ops.activations import ALL, PIECEWISE_LINEAR, SMOOTH, random, smooth_points


class Operations(TorchDispatchMode):
    """Counts the operations dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket._qualified_op_name] += 1
        return function(*args, **(kwargs or {}))


def test_overwritten_values_are_noticed(fused_backend: str) -> None:
    for name, case in ALL.items():
        x = smooth_points().requires_grad_() * 1.0
        y = case.ours(x)
        # both what the derivative may be computed from; PyTorch's own keeps one of them
        x.mul_(2)
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        assert name in ALL


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_piecewise_linear_functions_write_no_zeros(name: str, fused_backend: str) -> None:
    """One operation a backward, one a double backward, and any order after it."""
    x, g = smooth_points().float().requires_grad_(), random(3, 5, dtype=torch.float32, seed=1).requires_grad_()
    z = x * 1.0
    y = ALL[name].ours(z)
    with Operations() as first:
        (gz,) = torch.autograd.grad(y, z, g, create_graph=True)
    with Operations() as second:
        dg, dz = torch.autograd.grad(gz, (g, z), torch.ones_like(x), allow_unused=True, create_graph=True)
    assert dz is None
    backward = [operation for operation in first.counts if operation.endswith("_backward")]
    assert len(backward) == 1
    assert first.counts[backward[0]] == second.counts[backward[0]] == 1
    assert not {name for name in first.counts + second.counts if "zeros" in name or "add" in name}
    v = torch.ones_like(x, requires_grad=True)
    (dg,) = torch.autograd.grad(gz, g, v, create_graph=True)
    assert torch.equal(torch.autograd.grad(dg, v, torch.ones_like(x))[0], dg)  # linear in v


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_launch_one_kernel_an_order(name: str, fused_backend: str) -> None:
    weight = smooth_points().requires_grad_()
    x = weight * 1.0
    y = ALL[name].ours(x)
    with Operations() as operations:
        (gx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        torch.autograd.grad([gx, y], weight, [torch.ones_like(x)] * 2)
    # the outer backward is the second, and it adds the double backward's dx to its own
    assert operations.counts["rds_fast::activation_backward"] == 2
    assert operations.counts["rds_fast::activation_double_backward"] == 1
    assert not [name for name in operations.counts if "zeros" in name or "add" in name]


@pytest.mark.parametrize("name", SMOOTH)
def test_third_derivative_raises(name: str, fused_backend: str) -> None:
    x = smooth_points().requires_grad_()
    (gx,) = torch.autograd.grad(ALL[name].ours(x).sum(), x, create_graph=True)
    (ggx,) = torch.autograd.grad(gx.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(ggx.sum(), x)


@pytest.mark.parametrize("name", ALL)
def test_batched_cotangents(name: str, fused_backend: str) -> None:
    """``is_grads_batched`` runs the backwards under vmap."""
    x, batch = smooth_points().requires_grad_(), random(4, 3, 5, seed=1)
    g = random(3, 5, seed=2).requires_grad_()
    y = ALL[name].ours(x)
    (gx,) = torch.autograd.grad(y, x, batch, is_grads_batched=True, retain_graph=True)
    for row, cotangent in zip(gx, batch, strict=True):
        assert torch.equal(row, torch.autograd.grad(y, x, cotangent, retain_graph=True)[0])
    (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
    (dg,) = torch.autograd.grad(gx, g, batch, is_grads_batched=True, retain_graph=True)
    for row, cotangent in zip(dg, batch, strict=True):
        assert torch.equal(row, torch.autograd.grad(gx, g, cotangent, retain_graph=True)[0])


@pytest.mark.parametrize("name", ALL)
def test_transformations_of_torch_func(name: str, backend: str) -> None:
    x = smooth_points()

    def second(function: Any) -> Tensor:
        inner = torch.func.grad(lambda x: function(x).sin().sum())
        return torch.func.grad(lambda x: inner(x).square().sum())(x)

    torch.testing.assert_close(second(ALL[name].ours), second(ALL[name].truth))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own imports
@pytest.mark.parametrize("name", ALL)
def test_forward_mode(name: str, backend: str) -> None:
    x, tangent = smooth_points(), random(3, 5, seed=1)
    ours = torch.func.jvp(ALL[name].ours, (x,), (tangent,))
    for our, truth in zip(ours, torch.func.jvp(ALL[name].truth, (x,), (tangent,)), strict=True):
        torch.testing.assert_close(our, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["relu", "gelu", "hardsigmoid"])
def test_compiled(name: str) -> None:
    def squares(x: Tensor) -> Tensor:
        return ALL[name].ours(x * 1.0).square()

    results = []
    for function in (squares, torch.compile(squares, backend="aot_eager", fullgraph=True)):
        x = smooth_points().requires_grad_()
        function(x).sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["relu", "gelu", "sigmoid", "hardsigmoid"])
def test_graphs_are_freed_without_the_garbage_collector(name: str, fused_backend: str) -> None:
    x = smooth_points().requires_grad_()
    gc.disable()
    try:
        y = ALL[name].ours(x)
        (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        nodes = [weakref.ref(y.grad_fn), weakref.ref(gx.grad_fn)]
        del y, gx
        assert [node() for node in nodes] == [None, None]
    finally:
        gc.enable()


def test_meta_tensors_show_the_fused_operations() -> None:
    x = torch.empty(4, 3, device="meta", requires_grad=True)
    with Operations() as operations:
        (gx,) = torch.autograd.grad(activation.silu(x * 1.0).sum(), x, create_graph=True)
        torch.autograd.grad(gx.sum(), x)
    assert operations.counts["rds_fast::activation_double_backward"] == 1
