"""``rds_fast.gradient_norm``: values, both derivatives, zeros, extremes and shapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rds_fast
from rds_fast import reference
from tests.criteria import assert_accurate

INF = math.inf
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ORDERS = [1.0, 1.5, 2.0, 3.0, INF]
POWERS = [1.0, 2.0, 0.5, 3.0]
SIZES = [
    (1, 1),  # one value: |x|
    (64, 3),  # many short rows
    (9, 784),  # a digit
    (5, 3_073),  # a CIFAR image and one more: no vector width divides it
    (2, 150_528),  # an ImageNet image: within-row parallelism
]


def derivatives(function, x: Tensor, g: Tensor, v: Tensor) -> list[Tensor]:
    x, g = x.detach().requires_grad_(), g.detach().requires_grad_()
    result = function(x)
    (gx,) = torch.autograd.grad(result, x, g, create_graph=True)
    dg, dx = torch.autograd.grad(gx, (g, x), v, allow_unused=True)
    return [t.detach() for t in (result, gx, dg, torch.zeros_like(x) if dx is None else dx)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("p", "power"), [(1.0, 1.0), (1.0, 2.0), (1.5, 0.5), (2.0, 1.0), (2.0, 2.0), (3.0, 1.0), (INF, 1.0), (INF, 2.0)]
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_accurate_as_torch_at_every_order(
    fused_backend: str, size: tuple[int, int], p: float, power: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    # magnitudes in [0.25, 2): away from zero, where a 16-bit rounding of the input would change a high derivative
    sign = torch.randint(2, size, generator=generator) * 2 - 1
    x = (sign * (0.25 + 1.75 * torch.rand(size, generator=generator))).to(dtype)
    g = torch.randn(size[0], generator=generator).to(dtype)
    v = torch.randn(size, generator=generator).to(dtype)
    ours = derivatives(lambda t: rds_fast.gradient_norm(t, p, power=power), x, g, v)
    theirs = derivatives(lambda t: torch.linalg.vector_norm(t, p, dim=1) ** power, x, g, v)
    truth = derivatives(lambda t: reference.gradient_norm(t, p, power), x.double(), g.double(), v.double())
    norm, gx, dg, dx = range(4)
    n = reference.gradient_norm(x.double(), p)
    u = truth[gx] / (g.double() * power * n ** (power - 1))[:, None]
    uv = (u * v.double()).abs().sum(1)
    # the size of the terms of dx = g k n^(k−2) ((p−1) w v + (k−p) u Σ u v); for p = inf, (p−1) w is 0
    curvature = 0.0 if p == INF else p - 1
    order = 1.0 if p == INF else p
    terms = curvature * v.double().abs() * 8 + abs(power - order) * u.abs() * uv[:, None]  # w <= 8 in this range
    scales = {dg: power * n ** (power - 1) * uv, dx: g.double().abs() * power * n ** (power - 2) * terms.amax(1)}
    for index in (norm, gx, dg, dx):
        assert_accurate(ours[index], theirs[index].nan_to_num(), truth[index], scales.get(index))


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("p", ORDERS)
def test_gradcheck(backend: str, p: float, power: float) -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rds_fast.gradient_norm(x, p, power=power), x)
    assert torch.autograd.gradgradcheck(lambda x: rds_fast.gradient_norm(x, p, power=power), x)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("p", ORDERS)
def test_zero_rows_and_zero_coordinates(backend: str, p: float, power: float) -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    x[0] = 0
    x[1, ::2] = 0
    g, v = torch.rand(3, dtype=torch.float64) + 0.5, torch.randn(3, 5, dtype=torch.float64)
    result, gx, dg, dx = derivatives(lambda t: rds_fast.gradient_norm(t, p, power=power), x, g, v)
    assert result[0] == 0
    assert not gx[0].any()
    assert dg[0] == 0
    torch.testing.assert_close(dx[0], 2 * g[0] * v[0] if p == 2 and power == 2 else torch.zeros(5).double())
    for tensor in (result, gx, dg, dx):
        assert tensor.isfinite().all()
    expected = derivatives(lambda t: reference.gradient_norm(t, p, power), x, g, v)
    for our, true in zip((result, gx, dg, dx), expected, strict=True):
        torch.testing.assert_close(our, true, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42], ids=["large", "small", "subnormal"])
def test_nothing_overflows_where_the_result_is_representable(backend: str, p: float, scale: float) -> None:
    x = torch.tensor([[3.0, -4.0, 0.0], [1.0, 1.0, 1.0]]) * scale
    x.requires_grad_()
    norm = rds_fast.gradient_norm(x, p)
    truth = torch.linalg.vector_norm(x.detach().double(), p, dim=1)
    torch.testing.assert_close(norm.double(), truth, rtol=1e-5, atol=2e-45)
    (u,) = torch.autograd.grad(norm.sum(), x, create_graph=True)
    true_u = derivatives(lambda t: reference.gradient_norm(t, p), x.double(), torch.ones(2).double(), x.double())[1]
    # a subnormal norm is itself rounded to a multiple of 1.4e-45, up to 1e-3 of it here, and u takes its power p − 1
    torch.testing.assert_close(u.double(), true_u, rtol=5e-3 if scale == 1e-42 else 1e-5, atol=1e-6)


def test_infinite_and_nan_coordinates_as_torch(backend: str) -> None:
    x = torch.tensor([[1.0, INF], [-INF, 0.0], [math.nan, 1.0], [math.nan, INF]])
    for p in ORDERS:
        torch.testing.assert_close(rds_fast.gradient_norm(x, p), torch.linalg.vector_norm(x, p, dim=1), equal_nan=True)


def test_ties_share_the_gradient_of_the_maximum(backend: str) -> None:
    x = torch.tensor([[2.0, -2.0, 1.0, 2.0]], requires_grad=True)
    (u,) = torch.autograd.grad(rds_fast.gradient_norm(x, INF).sum(), x)
    torch.testing.assert_close(u, torch.tensor([[1 / 3, -1 / 3, 0.0, 1 / 3]]))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0,), (5,), (2, 3, 4, 5)], ids=str)
def test_shapes(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    norm = rds_fast.gradient_norm(x)
    assert norm.shape == shape[:1]
    torch.testing.assert_close(norm, x.reshape(shape[0], math.prod(shape[1:])).norm(dim=1))
    norm.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(0, 3, 1, 2),
        lambda x: x[:, :, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[:1].expand(4, -1, -1, -1),
    ],
    ids=["channels last", "permuted", "strided", "batch inside", "expanded"],
)
def test_memory_layouts(backend: str, make) -> None:
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: rds_fast.gradient_norm(make(x), 3.0), x)
    torch.testing.assert_close(rds_fast.gradient_norm(make(x)), make(x).flatten(1).norm(dim=1))


@pytest.mark.parametrize(
    ("gradient", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "gradient is a list"),
        (
            torch.ones(2, 2, dtype=torch.int64),
            {},
            TypeError,
            "torch.int64; gradient_norm needs a floating-point tensor",
        ),
        (torch.tensor(1.0), {}, ValueError, r"shape \(N, ...\)"),
        (torch.ones(2, 2), {"p": 0.5}, ValueError, r"p is 0.5; .* must be in \[1, inf\]"),
        (torch.ones(2, 2), {"p": math.nan}, ValueError, "p is nan"),
        (torch.ones(2, 2), {"p": "2"}, TypeError, "p is '2', a str; it must be a Python number .*math.inf"),
        (torch.ones(2, 2), {"power": 0}, ValueError, "power is 0; it must be positive and finite"),
        (torch.ones(2, 2), {"power": INF}, ValueError, "power is inf"),
    ],
)
def test_bad_input(gradient, options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rds_fast.gradient_norm(gradient, **options)


@settings(deadline=None, max_examples=60)
@given(
    row=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40),
    p=st.sampled_from(ORDERS),
    factor=st.floats(0.001, 1000),
)
def test_properties(row: list[float], p: float, factor: float) -> None:
    """Homogeneity, order invariance, and Euler's identity x·∇‖x‖ = ‖x‖."""
    x = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    norm = rds_fast.gradient_norm(x, p)
    torch.testing.assert_close(rds_fast.gradient_norm(x * factor, p), norm * factor, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(rds_fast.gradient_norm(x.flip(1), p), norm, rtol=1e-12, atol=1e-300)
    (u,) = torch.autograd.grad(norm.sum(), x)
    torch.testing.assert_close((u * x).sum(1), norm, rtol=1e-10, atol=1e-300)


def test_compiled_with_several_orders() -> None:
    """From the second p on, the compiler takes it for an argument."""
    torch.compiler.reset()
    compiled = torch.compile(lambda x, p: rds_fast.gradient_norm(x, p), fullgraph=True, backend="eager")
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for p in (2.0, 3.0, 1.0, 1.5, math.inf):
        torch.testing.assert_close(compiled(x, p), torch.linalg.vector_norm(x, p, dim=1))
