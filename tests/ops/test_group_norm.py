"""``rds_fast.ops.group_norm``: PyTorch's contracts of layer, group and instance norm, accuracy, both derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import pytest
import torch
from threads import assert_same_bits_with_any_number_of_threads
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import rds_fast
from rds_fast.ops import group_norm as ours
from rds_fast.reference import accumulation_dtype
from tests.criteria import assert_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    """A norm of inputs of one shape, and its rows: (N, C, S) and the groups of channels."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int, int]
    groups: int = 1

    @property
    def parameters(self) -> tuple[int, ...]:
        return self.shape[-1:] if self.name == "layer_norm" else self.shape[1:2]

    def of(self, module) -> Callable[..., Tensor]:
        """The norm as a function of input, weight and bias: ours, or that of torch.nn.functional."""
        function = getattr(module, self.name)
        if self.name == "layer_norm":
            return lambda x, w=None, b=None, eps=1e-5: function(x, self.parameters, w, b, eps)
        if self.name == "group_norm":
            return lambda x, w=None, b=None, eps=1e-5: function(x, self.groups, w, b, eps)
        return lambda x, w=None, b=None, eps=1e-5: function(x, weight=w, bias=b, eps=eps)


CASES = [
    Case("layer_norm", (1, 2), (1, 2, 1)),
    Case("layer_norm", (300, 7), (300, 7, 1)),  # several blocks of samples, the last not full; less than a vector
    Case("layer_norm", (9, 5, 96), (45, 96, 1)),
    Case("layer_norm", (3, 40_001), (3, 40_001, 1)),  # rows cut into chunks; a prime number of values
    Case("group_norm", (4, 6), (4, 6, 1), 2),  # S = 1: the weight varies from value to value, from group to group
    Case("group_norm", (3, 8, 7, 7), (3, 8, 49), 4),
    Case("group_norm", (2, 6, 100, 100), (2, 6, 10_000), 2),  # a row of two chunks, each one run of a channel
    Case("group_norm", (2, 2, 20_000), (2, 2, 20_000), 1),  # runs cut into chunks
    Case("instance_norm", (4, 3, 2), (4, 3, 2), 3),
    Case("instance_norm", (2, 5, 4, 6, 3), (2, 5, 72), 5),
    Case("instance_norm", (1, 2, 40_000), (1, 2, 40_000), 2),
]
SMALL = [CASES[2]._replace(shape=(3, 2, 5), rows=(6, 5, 1)), CASES[4], CASES[5]._replace(shape=(2, 4, 3), groups=2)]
SMALL += [CASES[8]._replace(shape=(2, 3, 4))]


def identify(case: Case) -> str:
    return f"{case.name}-{'x'.join(map(str, case.shape))}"


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bias; their cotangents' u; v, a, h of the gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, w, b = draw(case.shape) * 2 + 1, 1 + draw(case.parameters) / 2, draw(case.parameters)
    return x, w, b, draw(case.shape), draw(case.shape), draw(case.parameters), draw(case.parameters)


def orders(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """y; gx, gw, gb; du, dx, dw."""
    x, w, b, u, *cotangents = (t.detach().clone().requires_grad_() for t in tensors)
    y = function(x, w, b)
    gradients = torch.autograd.grad(y, (x, w, b), u, create_graph=True)
    return [t.detach() for t in (y, *gradients, *torch.autograd.grad(gradients, (u, x, w), cotangents))]


def sizes_of_terms(case: Case, eps: float, *tensors: Tensor) -> list[Tensor]:
    """For each result of ``orders``, how large the terms of its sums are, by row or channel, in float64."""
    N, C, S = case.rows
    x, u, v = (tensors[i].double().reshape(N, C, S) for i in (0, 3, 4))
    w, b, a, h = (tensors[i].double().view(1, C, 1) for i in (1, 2, 5, 6))

    def by_row(t: Tensor) -> Tensor:
        return t.expand(N, C, S).reshape(N * case.groups, -1)

    def of_row(t: Tensor) -> Tensor:
        """Means over the rows, at each of their values."""
        return by_row(t).mean(1, keepdim=True).expand(-1, C // case.groups * S).reshape(N, C, S)

    mean = of_row(x)
    r = (of_row((x - mean).square()) + eps).rsqrt()
    unit = (x - mean) * r

    def largest(t: Tensor) -> Tensor:
        return by_row(t.abs()).amax(1)

    def summed(t: Tensor) -> Tensor:
        return t.abs().sum((0, 2))

    uw_largest, v_largest = largest(u * w), largest(v)
    return [
        largest(w) * largest(unit) + largest(b),
        largest(r) * uw_largest,
        summed(u * r * (x.abs() + mean.abs())),
        summed(u),
        largest(w) * largest(r) * v_largest + largest(a) * largest(unit) + largest(h),
        largest(r) ** 2 * uw_largest * v_largest + largest(r) * largest(a * u),
        2 * summed(u * r * (v.abs() + of_row(v).abs() + (unit * of_row(v * unit)).abs())),
    ]


def assert_all_accurate(case: Case, ours_all: list[Tensor], theirs: list[Tensor], truth: list[Tensor], scales) -> None:
    for our, their, true, scale in zip(ours_all, theirs, truth, scales, strict=True):
        rows = (scale.shape[0], -1)
        assert our.shape == true.shape
        assert_accurate(our.reshape(rows), their.reshape(rows), true.reshape(rows), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=identify)
def test_as_accurate_as_torch_at_every_order(fused_backend: str, case: Case, dtype: torch.dtype) -> None:
    tensors = inputs(case, dtype)
    truth = orders(case.of(functional), *(t.double() for t in tensors))
    theirs = orders(case.of(functional), *tensors)
    assert_all_accurate(case, orders(case.of(ours), *tensors), theirs, truth, sizes_of_terms(case, 1e-5, *tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[9]], ids=identify)
def test_float32_parameters_beside_a_16_bit_input(fused_backend: str, case: Case, dtype: torch.dtype) -> None:
    x, w, b, u, v, a, h = inputs(case, dtype)
    tensors = (x, w.float(), b.float(), u, v, a.float(), h.float())
    truth = orders(case.of(functional), *(t.double() for t in tensors))
    # PyTorch's own double backward refuses these: our float32 results are held to the 16-bit ones of PyTorch's
    theirs = [t.to(our.dtype) for t, our in zip(orders(case.of(functional), x, w, b, u, v, a, h), truth, strict=True)]
    mixed = orders(case.of(ours), *tensors)
    assert [t.dtype for t in mixed] == [dtype, dtype, torch.float32, torch.float32, dtype, dtype, torch.float32]
    theirs = [t.to(our.dtype) for t, our in zip(theirs, mixed, strict=True)]
    assert_all_accurate(case, mixed, theirs, truth, sizes_of_terms(case, 1e-5, *tensors))


@pytest.mark.parametrize("eps", [1e-5, 0.7], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=identify)
def test_gradcheck(backend: str, case: Case, eps: float) -> None:
    x, w, b, *_ = (t.requires_grad_() for t in inputs(case, torch.float64)[:3])
    function = case.of(ours)
    assert torch.autograd.gradcheck(lambda x, w, b: function(x, w, b, eps), (x, w, b))
    assert torch.autograd.gradgradcheck(lambda x, w, b: function(x, w, b, eps), (x, w, b))


@pytest.mark.parametrize("given", ["neither", "weight", "bias", "frozen"])
@pytest.mark.parametrize("case", SMALL, ids=identify)
def test_gradcheck_without_some_parameters(fused_backend: str, case: Case, given: str) -> None:
    """PyTorch's own double backward fails this for a bias without a weight."""
    x, w, b = inputs(case, torch.float64)[:3]
    function = case.of(ours)
    call = {
        "neither": (lambda x: function(x), (x,)),
        "weight": (lambda x, w: function(x, w), (x, w)),
        "bias": (lambda x, b: function(x, None, b), (x, b)),
        "frozen": (lambda x: function(x, w, b), (x,)),
    }[given]
    arguments = tuple(t.requires_grad_() for t in call[1])
    assert torch.autograd.gradcheck(call[0], arguments)
    assert torch.autograd.gradgradcheck(call[0], arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[6], CASES[9]], ids=identify)
def test_gradients_of_a_penalty(backend: str, case: Case, dtype: torch.dtype) -> None:
    """‖∇ₓ loss‖² and the loss itself, by every parameter and by x: x's node meets two cotangents."""
    x, w, b, u, *_ = inputs(case, dtype)

    def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        x, w, b, u = (t.detach().clone().requires_grad_() for t in tensors)
        loss = (function(x, w, b) * u).tanh().sum()
        (gx,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(loss + gx.double().square().sum(), (x, w, b))

    truth = gradients(case.of(functional), *(t.double() for t in (x, w, b, u)))
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.06}[dtype]
    for our, true in zip(gradients(case.of(ours), x, w, b, u), truth, strict=True):
        assert (our.double() - true).abs().max() <= tolerance * true.abs().max()


@contextmanager
def recorded() -> Iterator[list[tuple[str, bool]]]:
    """The backwards of the family that run inside, and whether each makes gradients of weight and bias."""
    calls: list[tuple[str, bool]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() in ("rds_fast::group_norm_backward", "rds_fast::group_norm_double_backward"):
                calls.append((func.name().removeprefix("rds_fast::group_norm_"), args[-2]))
            return func(*args, **(kwargs or {}))

    with Record():
        yield calls


def test_affine_gradients_are_computed_where_the_engine_asks_for_them(fused_backend: str) -> None:
    x, w, b = (t.requires_grad_() for t in inputs(CASES[2], torch.float32)[:3])
    loss = CASES[2].of(ours)(x, w, b).pow(3).sum()
    with recorded() as calls:
        (inner,) = torch.autograd.grad(loss, x, create_graph=True)
    assert calls == [("backward", False)]
    with recorded() as calls:
        outer, gw, gb = torch.autograd.grad(loss, (x, w, b), create_graph=True)
    assert calls == [("backward", True)]
    assert torch.equal(inner, outer)
    assert gw.requires_grad
    assert gb.requires_grad
    with recorded() as calls:
        torch.autograd.grad(loss, (x, w), create_graph=True)
        torch.autograd.grad(loss, b, retain_graph=True)
    assert calls == [("backward", True)] * 2
    with recorded() as calls:
        torch.autograd.grad(inner.square().sum(), x, retain_graph=True)
    assert calls == [("double_backward", False), ("backward", False)]
    with recorded() as calls:
        inner.square().sum().backward()
    assert calls == [("double_backward", True), ("backward", True)]
    assert w.grad is not None
    assert b.grad is not None


def test_the_cotangent_of_x_is_added_by_the_backward(fused_backend: str) -> None:
    """No addition of full-sized tensors, and nothing twice: the double backward's dx comes back to the same node."""
    x, w, b = (t.requires_grad_() for t in inputs(CASES[2], torch.float32)[:3])
    y = CASES[2].of(ours)(x, w, b)
    (gx,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    with torch.profiler.profile() as profile:
        (gx * gx).sum().backward(inputs=[x])
    names = [event.name for event in profile.events()]
    assert names.count("rds_fast::group_norm_double_backward") == names.count("rds_fast::group_norm_backward") == 1
    assert names.count("aten::add") + names.count("aten::add_") <= 2  # the two uses of gx, and tanh's own


@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[9]], ids=identify)
def test_a_large_mean_does_not_cost_the_variance(fused_backend: str, case: Case) -> None:
    x, w, b, u, v, a, h = inputs(case, torch.float32)
    x = x / 2 + 1e4
    truth = orders(case.of(functional), *(t.double() for t in (x, w, b, u, v, a, h)))
    # The mean itself is rounded to float32: 5e-4 of a standard deviation.
    for our, true in zip(orders(case.of(ours), x, w, b, u, v, a, h), truth, strict=True):
        assert (our - true).abs().max() <= 2e-3 * true.abs().max()


@pytest.mark.parametrize("shape", [(3, 100), (2, 20_000)], ids=str)
def test_outliers_at_the_beginning_do_not_cost_the_variance(fused_backend: str, shape: tuple[int, int]) -> None:
    """The deviations are taken from the first values, at first."""
    x = torch.randn(shape)
    x[0, :16] += 1e4
    x[1] += 1e4
    x[1, :16] = 0
    truth = functional.layer_norm(x.double(), shape[1:])
    assert (ours.layer_norm(x, shape[1:]) - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[9]], ids=identify)
def test_rows_of_zero_variance(fused_backend: str, case: Case, dtype: torch.dtype) -> None:
    _, *rest = inputs(case, dtype)
    x = torch.full(case.shape, 0.5, dtype=dtype)
    truth = orders(case.of(functional), *(t.double() for t in (x, *rest)))
    scales = sizes_of_terms(case, 1e-5, x, *rest)
    for our, true, scale in zip(orders(case.of(ours), x, *rest), truth, scales, strict=True):
        rows = (scale.shape[0], -1)
        error = (our.double() - true).reshape(rows).abs().amax(1)
        assert (error <= 4 * torch.finfo(dtype).eps * scale).all()


def test_one_value_a_row(backend: str) -> None:
    """K = 1: x̂ is 0, and so are the derivatives by x."""
    tensors = [torch.randn(5, 1), *(torch.randn(1) for _ in range(2)), *(torch.randn(5, 1) for _ in range(2))]
    results = orders(lambda x, w, b: ours.layer_norm(x, (1,), w, b), *tensors, *(torch.randn(1) for _ in range(2)))
    y, gx, gw, gb, _, dx, dw = results
    assert torch.equal(y, tensors[2].expand(5, 1))
    for zero in (gx, gw, dx, dw):  # up to what a fused multiply-add leaves of u w − u w, times r = ε^−½
        assert zero.abs().max() <= 1e-4
    torch.testing.assert_close(gb, tensors[3].sum(0))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 4, 2, 2)], ids=str)
def test_empty_inputs_as_torch(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    for call in (lambda f: f.layer_norm(x, x.shape[-1:]), lambda f: f.group_norm(x, 2)):
        try:
            expected = call(functional)
        except (RuntimeError, ValueError) as error:
            with pytest.raises(type(error)):
                call(ours)
            continue
        result = call(ours)
        assert result.shape == expected.shape
        (gx,) = torch.autograd.grad(result.sum(), x)
        assert gx.shape == x.shape


def test_long_rows(fused_backend: str) -> None:
    x = torch.randn(1, 4_000_000).mul_(3).add_(5).requires_grad_()
    w, b = (torch.randn(4_000_000).requires_grad_() for _ in range(2))
    results = []
    for module, convert in ((ours, Tensor.float), (functional, Tensor.double)):
        y = module.layer_norm(convert(x), (4_000_000,), convert(w), convert(b))
        gx, gw = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        results.append((y, gx, gw, *torch.autograd.grad(gx.square().sum(), (x, w))))
    for our, true in zip(*results, strict=True):
        assert (our - true).abs().max() <= 1e-5 * true.abs().max()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layer_norm_of_channels(backend: str, memory_format: torch.memory_format) -> None:
    """As in ConvNeXt: the channels are moved last, normalised and moved back."""
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    w, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def norm(module) -> Callable[..., Tensor]:
        return lambda x, w, b: module.layer_norm(x.permute(0, 2, 3, 1), (5,), w, b).permute(0, 3, 1, 2)

    our, their = norm(ours)(x, w, b), norm(functional)(x, w, b)
    torch.testing.assert_close(our, their)
    assert our.stride() == their.stride()
    assert torch.autograd.gradcheck(norm(ours), (x, w, b))
    assert torch.autograd.gradgradcheck(norm(ours), (x, w, b))


def test_channels_last_stays(backend: str) -> None:
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    y = ours.group_norm(x, 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, functional.group_norm(x, 2))
    assert torch.autograd.gradgradcheck(lambda x: ours.group_norm(x, 2), x)


def test_strides_and_expanded_cotangents(backend: str) -> None:
    base = torch.randn(4, 6, 10, dtype=torch.float64, requires_grad=True)
    for make in (lambda x: x[:, :, ::2], lambda x: x.transpose(1, 2), lambda x: x[:1].expand(3, -1, -1)):
        function = lambda x: ours.group_norm(make(x), 2).sum(1).square()  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, base)
        assert torch.autograd.gradgradcheck(function, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics(backend: str, momentum: float, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 5, 2).mul(2).add(1).to(dtype)
    mean, var = torch.randn(4), torch.rand(4)
    running = [(mean.clone(), var.clone()) for _ in range(2)]
    for module, (mean, var) in zip((ours, functional), running, strict=True):
        for _ in range(2):
            y = module.instance_norm(x, mean, var, momentum=momentum)
            assert y.dtype == dtype
    for our, their in zip(*running, strict=True):  # PyTorch rounds to the dtype of x on the way
        torch.testing.assert_close(our, their, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}))
    evaluated = [module.instance_norm(x, *running[1], use_input_stats=False) for module in (ours, functional)]
    assert torch.equal(*evaluated)


def test_in_place_after_the_norm(backend: str) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ours.group_norm(x, 2).mul_(2).sigmoid_(), x)


def test_an_input_changed_in_place_is_noticed(fused_backend: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    inner = x * 1
    y = ours.layer_norm(inner, (4,))
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_third_derivative_raises(fused_backend: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    (gx,) = torch.autograd.grad(ours.layer_norm(x, (4,)).pow(3).sum(), x, create_graph=True)
    (dx,) = torch.autograd.grad(gx.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_on_cpu_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 4, 6).to(dtype), torch.ones(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for call in (lambda f: f.layer_norm(x, (6,)), lambda f: f.group_norm(x, 2, w, w), lambda f: f.instance_norm(x)):
            assert call(ours).dtype == call(functional).dtype == dtype


def test_autocast_on_cuda_is_read_off_torch() -> None:
    assert ours._autocasts_to_float32("layer_norm", "cuda")
    assert ours._autocasts_to_float32("group_norm", "cuda")
    assert not ours._autocasts_to_float32("instance_norm", "cuda")
    assert not ours._autocasts_to_float32("layer_norm", "cpu")
    assert not ours._autocasts_to_float32("layer_norm", "meta")


def test_the_same_bits_with_any_number_of_threads(fused_backend: str) -> None:
    for case in (*CASES[1:4], *CASES[5:8], CASES[10]):
        tensors = inputs(case, torch.float32)
        assert_same_bits_with_any_number_of_threads(partial(orders, case.of(ours), *tensors))


BAD = {
    "a shape that is not the last": lambda f: f.layer_norm(torch.ones(2, 3), (2,)),
    "a size for a shape": lambda f: f.layer_norm(torch.ones(2, 3), 3),
    "no dimensions": lambda f: f.layer_norm(torch.ones(2, 3), ()),
    "a weight of another shape": lambda f: f.layer_norm(torch.ones(2, 3), (3,), torch.ones(2)),
    "a weight of another dtype": lambda f: f.layer_norm(torch.ones(2, 3), (3,), torch.ones(3).double()),
    "mixed parameters": lambda f: f.group_norm(torch.ones(2, 4, 2).half(), 2, torch.ones(4), torch.ones(4).half()),
    "integers": lambda f: f.layer_norm(torch.ones(2, 3, dtype=torch.int64), (3,)),
    "no tensor": lambda f: f.layer_norm([1.0, 2.0], (2,)),
    "groups that do not divide": lambda f: f.group_norm(torch.ones(2, 3, 4), 2),
    "zero groups": lambda f: f.group_norm(torch.ones(2, 3, 4), 0),
    "a vector": lambda f: f.group_norm(torch.ones(4), 2),
    "a single value a channel": lambda f: f.group_norm(torch.ones(1, 2, 1), 2),
    "bias too long": lambda f: f.group_norm(torch.ones(2, 4, 3), 2, torch.ones(4), torch.ones(5)),
    "a single value an instance": lambda f: f.instance_norm(torch.ones(2, 3, 1)),
    "no spatial dimension": lambda f: f.instance_norm(torch.ones(2, 3)),
    "no statistics": lambda f: f.instance_norm(torch.ones(2, 3, 4), use_input_stats=False),
    "one statistic": lambda f: f.instance_norm(torch.ones(2, 3, 4), torch.zeros(3)),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_those_of_torch(backend: str, name: str) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011
        BAD[name](functional)
    with pytest.raises(expected.type) as raised:
        BAD[name](ours)
    assert str(raised.value) == str(expected.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forward mode's own imports
def test_transformations_run_in_plain_torch(fused_backend: str) -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    hessian = torch.func.hessian(lambda x: ours.layer_norm(x, (4,)).pow(3).sum())(x[0])
    expected = torch.func.hessian(lambda x: functional.layer_norm(x, (4,)).pow(3).sum())(x[0])
    torch.testing.assert_close(hessian, expected)
    torch.testing.assert_close(torch.func.vmap(lambda x: ours.layer_norm(x, (4,)))(x), ours.layer_norm(x, (4,)))


def raw_calls(dtype: torch.dtype) -> dict[str, tuple]:
    x, u, v, cotangent = (torch.randn(2, 4, 3, dtype=dtype) for _ in range(4))
    accumulated = accumulation_dtype(dtype)
    w, b, a, h = (torch.randn(4, dtype=accumulated) for _ in range(4))
    mean, rstd = torch.randn(4, dtype=accumulated), torch.rand(4, dtype=accumulated) + 0.5
    return {
        "forward": ("group_norm", (x, w, b, 2, 1e-5)),
        "forward without parameters": ("group_norm", (x, None, None, 2, 1e-5)),
        "inner backward": ("group_norm_backward", (u, x, w, mean, rstd, None, 2, False)),
        "outer backward": ("group_norm_backward", (u, x, w, mean, rstd, cotangent, 2, True)),
        "double backward": ("group_norm_double_backward", (v, None, None, u, x, w, mean, rstd, 2, True)),
        "every cotangent": ("group_norm_double_backward", (v, a, h, u, x, w, mean, rstd, 2, True)),
        "without v": ("group_norm_double_backward", (None, a, None, u, x, None, mean, rstd, 2, False)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", raw_calls(torch.float32))
def test_opcheck(fused_backend: str, name: str, dtype: torch.dtype) -> None:
    operation, arguments = raw_calls(dtype)[name]
    torch.library.opcheck(getattr(torch.ops.rds_fast, operation).default, (*arguments, fused_backend))


def test_the_fused_operations_run_on_meta_tensors() -> None:
    x = torch.empty(4, 6, 3, 3, device="meta", requires_grad=True)
    w = torch.empty(6, device="meta", requires_grad=True)
    with recorded() as calls:
        (gx,) = torch.autograd.grad(ours.group_norm(x, 2, w).sum(), x, create_graph=True)
        gx.sum().backward()
    assert calls == [("backward", False), ("double_backward", True)]
    assert x.grad is not None
    assert x.grad.shape == x.shape
    with rds_fast.use_backend("reference"):
        assert ours.layer_norm(x, (3,)).shape == x.shape
