"""The activations: both orders, in place, and memory formats."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from criteria import assert_accurate
from threads import assert_same_bits_with_any_number_of_threads
from torch import Tensor

from rds_fast import reference
from rds_fast.ops import activation
from tests.ops.activations import ALL, IN_PLACE, SMOOTH, orders, random, smooth_points, true_orders

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# 17: one AVX-512 vector of float32 and a value. 100,003: work for several threads. 3,000,000: float32 results are
# streamed past the cache, the last not a whole chunk.
COUNTS = [1, 17, 100_003, 3_000_000]


@pytest.mark.parametrize("name", ALL)
def test_gradients(name: str, backend: str) -> None:
    x = smooth_points().requires_grad_()
    assert torch.autograd.gradcheck(ALL[name].ours, x)
    assert torch.autograd.gradgradcheck(ALL[name].ours, x)


@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [(name, dtype, count) for name in ALL for dtype in DTYPES for count in COUNTS[:3]]
    + [(name, torch.float32, COUNTS[3]) for name in ("gelu", "silu")],
    ids=str,
)
def test_values(name: str, dtype: torch.dtype, count: int, fused_backend: str) -> None:
    x, g, v = (random(count, dtype=dtype, seed=seed) for seed in range(3))
    x = (3 * x + 0.01).clamp(-20, 20) if count > 1 else x
    ours, theirs = orders(ALL[name].ours, x, g, v), orders(ALL[name].theirs, x, g, v)
    for our, their, truth in zip(ours, theirs, true_orders(name, x, g, v), strict=True):
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


@pytest.mark.parametrize("name", SMOOTH)
def test_infinities_and_nan(name: str, fused_backend: str) -> None:
    """As PyTorch; but NaN has the derivative NaN, where PyTorch's vectors and its remainders differ."""
    x = torch.tensor([-torch.inf, torch.inf, torch.nan] * 11)  # whole vectors and a part
    g, v = torch.ones(2, 33)
    y, gx, dg, dx = orders(ALL[name].ours, x, g, v)
    true_y, true_gx, *_ = orders(ALL[name].theirs, x, g, v)
    nan = x.isnan()
    torch.testing.assert_close(y, true_y, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gx[~nan], true_gx[~nan], equal_nan=True)
    torch.testing.assert_close(dg, gx, equal_nan=True)
    assert gx[nan].isnan().all()
    assert not dx[~nan].any()  # where PyTorch's composition is partly NaN


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

    for our, true in zip(gradients(ALL[name].ours), gradients(ALL[name].truth), strict=True):
        torch.testing.assert_close(our, true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name: str, backend: str) -> None:
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


@pytest.mark.parametrize("name", ["gelu", "softplus", "sigmoid"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3, 3)], ids=str)
def test_opcheck(name: str, shape: tuple[int, ...], fused_backend: str) -> None:
    x, g, v = (random(*shape, seed=seed) for seed in range(3))
    arguments = (name, 1.5, 2.0, "native")
    checks = ("test_schema", "test_faketensor")  # the derivatives are autograd Functions beside the operations
    torch.library.opcheck(torch.ops.rds_fast.activation_backward, (g, x, None, *arguments), test_utils=checks)
    torch.library.opcheck(torch.ops.rds_fast.activation_backward, (g, x, v, *arguments), test_utils=checks)
    torch.library.opcheck(torch.ops.rds_fast.activation_double_backward, (v, g, x, *arguments), test_utils=checks)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_with_any_number_of_threads(dtype: torch.dtype, fused_backend: str) -> None:
    """Of the derivatives: the results, and so what is computed from those of sigmoid and tanh, are PyTorch's."""
    names = [name for name in SMOOTH if name not in ("sigmoid", "tanh")]
    for name, count in [(name, COUNTS[2]) for name in names] + [("gelu", COUNTS[3])]:
        arguments = ALL[name].ours, *(random(count, dtype=dtype, seed=seed) for seed in range(3))
        assert_same_bits_with_any_number_of_threads(lambda arguments=arguments: orders(*arguments)[1:])


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_lower_capability(capability: str, fused_backend: str) -> None:
    """The values again in a process of its own: the capability is chosen once, when the library is first used."""
    order = ("default", "avx2", "avx512")
    best = torch.ops.rds_fast_native.cpu_capability()
    if order.index(best) <= order.index(capability):
        pytest.skip(f"this CPU's best capability is {best}: tested above")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    command += ["-k", "test_values or test_extremes or test_infinities or test_memory_formats"]
    environment = os.environ | {"RDS_FAST_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
