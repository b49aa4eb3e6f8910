"""The activations: both orders, in place, memory formats, and what the double backward launches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from criteria import assert_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rds_fast
from rds_fast import reference
from rds_fast.ops import activation
from tests.ops.activations import ALL, IN_PLACE, PIECEWISE_LINEAR, SMOOTH, orders

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FUSED_IN_PLACE = [name for name in IN_PLACE if name in ALL or name == "celu"]

# 17: one AVX-512 vector of float32 and a value. 100,003: several threads. 3,000,000: float32 results are streamed past
# the cache, the last not a whole chunk.
COUNTS = [1, 17, 100_003, 3_000_000]


class Operations(TorchDispatchMode):
    """Counts the operations dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket._qualified_op_name] += 1
        return function(*args, **(kwargs or {}))


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def smooth_points() -> Tensor:
    """Values on both sides of every kink and at some distance from each: 0, ±0.5, ±1, 2, 2.5, ±3, 6."""
    return torch.tensor([[-7.3, -3.4, -2.2, -1.3, -0.7], [-0.2, 0.3, 0.7, 1.4, 2.2], [2.8, 3.3, 4.9, 7.1, 21.0]]).double()


@pytest.mark.parametrize("name", ALL)
def test_gradients(name: str, backend: str) -> None:
    x = smooth_points().requires_grad_()
    if name.startswith("celu") and backend == "reference":
        pytest.skip("PyTorch's own holds 1/alpha rounded to float32")
    assert torch.autograd.gradcheck(ALL[name].ours, x)
    assert torch.autograd.gradgradcheck(ALL[name].ours, x)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_values(name: str, dtype: torch.dtype, count: int, fused_backend: str) -> None:
    if count > 1_000_000 and (dtype != torch.float32 or name not in ("gelu", "silu", "relu")):
        pytest.skip("the code that a size reaches does not depend on the function")
    x, g, v = (random(count, dtype=dtype, seed=seed) for seed in range(3))
    x = (3 * x + 0.01).clamp(-20, 20) if count > 1 else x
    ours, theirs = orders(ALL[name].ours, x, g, v), orders(ALL[name].theirs, x, g, v)
    truths = orders(ALL[name].truth, x.double(), g.double(), v.double())
    for our, their, truth in zip(ours, theirs, truths, strict=True):
        assert_accurate(our[None], their[None], truth[None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_extremes(name: str, dtype: torch.dtype, fused_backend: str) -> None:
    """Finite wherever PyTorch is, and the same there; its own infinities and NaN are not held against it."""
    x = torch.tensor([-1e30, -3e4, -90.0, -0.0, 0.0, 90.0, 3e4, 1e30], dtype=torch.float64).clamp(
        torch.finfo(dtype).min, torch.finfo(dtype).max
    )
    g, v = torch.ones(2, 8, dtype=dtype)
    theirs = orders(ALL[name].theirs, x.to(dtype), g, v)
    for our, their in zip(orders(ALL[name].ours, x.to(dtype), g, v), theirs, strict=True):
        finite = their.isfinite()
        torch.testing.assert_close(our[finite], their[finite], atol=1e-6, rtol=torch.finfo(dtype).eps * 4)
        assert not our.isnan().any()


@pytest.mark.parametrize("name", ALL)
def test_parameter_gradient_of_a_penalty(name: str, backend: str) -> None:
    """The cotangent that the alias brings back to its node is added: the weights below the activation say so."""
    first, second, data = random(6, 5, seed=1), random(3, 6, seed=2), random(8, 5, seed=3)

    def gradients(function: Any) -> tuple[Tensor, ...]:
        parameters = [first.clone().requires_grad_(), second.clone().requires_grad_()]
        x = data.clone().requires_grad_()
        logits = function(function(x @ parameters[0].T) @ parameters[1].T)
        (gx,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
        return torch.autograd.grad(logits.sum() + gx.square().sum(), [*parameters, x])

    truth = ALL[name].truth if backend != "reference" else ALL[name].theirs
    for our, true in zip(gradients(ALL[name].ours), gradients(truth), strict=True):
        torch.testing.assert_close(our, true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name: str, backend: str) -> None:
    if name == "celu" and backend == "reference":
        pytest.skip("PyTorch's own holds 1/alpha rounded to float32")
    x, g, v = smooth_points(), random(3, 5, seed=1), random(3, 5, seed=2)

    def overwrite(x: Tensor) -> Tensor:
        copy = x * 1.0  # not a leaf
        version = copy._version
        y = IN_PLACE[name].ours(copy)
        assert y is copy
        assert y._version > version
        return y

    truths = orders(IN_PLACE[name].truth, x, g, v)
    for our, truth in zip(orders(overwrite, x, g, v), truths, strict=True):
        torch.testing.assert_close(our, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_on_leaves_and_views(name: str, backend: str) -> None:
    leaf = smooth_points().requires_grad_()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        IN_PLACE[name].ours(leaf)
    assert torch.equal(leaf, smooth_points())
    with torch.no_grad():
        assert IN_PLACE[name].ours(leaf) is leaf

    if name == "celu":
        return  # a view is left to PyTorch, which holds 1/alpha rounded to float32

    def halves(function: Any, inplace: bool) -> Tensor:
        x = smooth_points().requires_grad_()
        base = x * 1.0
        if inplace:
            function(base[:, :2])
        else:
            base = torch.cat([function(base[:, :2]), base[:, 2:]], 1)
        (gx,) = torch.autograd.grad(base.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gx.square().sum(), x)[0]

    torch.testing.assert_close(halves(IN_PLACE[name].ours, True), halves(IN_PLACE[name].truth, False))


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
        torch.autograd.grad(gx.square().sum() + y.sum(), weight)
    # the outer backward is the second; the engine adds the cotangents of y alone
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
def test_memory_formats(name: str, fused_backend: str) -> None:
    """Any order in memory: the results are those of contiguous tensors, and y is laid out as PyTorch's."""
    x, g, v = (random(2, 6, 4, 3, seed=seed) for seed in range(3))
    contiguous = orders(ALL[name].ours, x, g, v)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    for layout in (channels_last, x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)):
        ours = orders(ALL[name].ours, layout, g, v)
        assert ours[0].stride() == layout.stride()
        for our, expected in zip(ours, contiguous, strict=True):
            assert torch.equal(our, expected)

    def sliced(function: Any) -> Any:
        return lambda x: function(x[:, ::2])

    g, v = g[:, ::2], v
    for layout in (x, channels_last):
        ours = orders(sliced(ALL[name].ours), layout, g, v)
        theirs = orders(sliced(ALL[name].truth), layout, g, v)
        assert ours[0].stride() == sliced(ALL[name].theirs)(layout).stride()
        for our, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)], ids=str)
def test_empty_and_scalar_inputs(name: str, shape: tuple[int, ...], backend: str) -> None:
    x, g, v = (random(*shape, seed=seed) for seed in range(3))
    for our, truth in zip(orders(ALL[name].ours, x, g, v), orders(ALL[name].truth, x, g, v), strict=True):
        torch.testing.assert_close(our, truth)


@pytest.mark.parametrize("name", ALL)
def test_autocast_keeps_the_dtype_as_pytorch(name: str, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = smooth_points().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            assert ALL[name].ours(x).dtype == ALL[name].theirs(x).dtype


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
    if name.startswith("celu"):
        pytest.skip("left to PyTorch, which holds 1/alpha rounded to float32")
    x = smooth_points()

    def second(function: Any) -> Tensor:
        inner = torch.func.grad(lambda x: function(x).sin().sum())
        return torch.func.grad(lambda x: inner(x).square().sum())(x)

    torch.testing.assert_close(second(ALL[name].ours), second(ALL[name].truth))


@pytest.mark.parametrize("name", ["gelu", "softplus", "sigmoid"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3, 3)], ids=str)
def test_opcheck(name: str, shape: tuple[int, ...], fused_backend: str) -> None:
    x, g, v = (random(*shape, seed=seed) for seed in range(3))
    arguments = (name, 1.5, 2.0, "native")
    checks = ("test_schema", "test_faketensor")  # the derivatives are autograd Functions beside the operations
    torch.library.opcheck(torch.ops.rds_fast.activation_backward, (g, x, None, *arguments), test_utils=checks)
    torch.library.opcheck(torch.ops.rds_fast.activation_backward, (g, x, v, *arguments), test_utils=checks)
    torch.library.opcheck(torch.ops.rds_fast.activation_double_backward, (v, g, x, *arguments), test_utils=checks)


def test_meta_tensors_show_the_fused_operations() -> None:
    x = torch.empty(4, 3, device="meta", requires_grad=True)
    with Operations() as operations:
        (gx,) = torch.autograd.grad(activation.silu(x * 1.0).sum(), x, create_graph=True)
        torch.autograd.grad(gx.sum(), x)
    assert operations.counts["rds_fast::activation_double_backward"] == 1


def test_unknown_kinds_and_arguments_are_refused(fused_backend: str) -> None:
    x = smooth_points().requires_grad_()
    with pytest.raises(RuntimeError, match="approximate"):
        activation.gelu(x, "cubic")
    with pytest.raises(ValueError, match="min_val"):
        activation.hardtanh(x, 1.0, -1.0)
    with pytest.raises(RuntimeError, match="alpha cannot be 0"):
        activation.celu(x, 0.0)
    with pytest.raises(RuntimeError, match="no activation of this name"):
        torch.ops.rds_fast.activation_backward(x.detach(), x.detach(), None, "cubic", 0.0, 0.0, "native")


def test_in_place_leaky_relu_of_negative_slope_is_pytorchs(fused_backend: str) -> None:
    y = activation.leaky_relu(smooth_points().requires_grad_() * 1.0, -0.1, inplace=True)
    with pytest.raises(RuntimeError, match="negative slope"):
        y.sum().backward()


def test_reference_of_hardsigmoid_is_pytorchs() -> None:
    for dtype in DTYPES:
        x = (6 * random(1000)).to(dtype)
        torch.testing.assert_close(reference.hardsigmoid(x), F.hardsigmoid(x))


def test_dtypes_without_gradient_are_pytorchs(fused_backend: str) -> None:
    integers = torch.tensor([-2, 0, 3])
    assert torch.equal(activation.relu(integers), F.relu(integers))
    assert torch.equal(activation.relu6(integers), F.relu6(integers))
    z = torch.tensor([1 + 1j], requires_grad=True)
    assert torch.equal(activation.sigmoid(z), torch.sigmoid(z))
    assert rds_fast.backends.automatic("cpu", ("cpu",)) in ("native", "reference")
