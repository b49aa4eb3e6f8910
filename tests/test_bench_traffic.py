"""The rules by which bench/traffic.py counts, on networks small enough to count by hand."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from torch import Tensor, nn

import rds_fast.ops
from bench.counting import Count, Traffic
from bench.objectives import PROVIDERS, figures
from bench.one_graph import loss_of_parameters
from bench.steps import LOSSES, Case, penalized
from bench.traffic import CASES, DEVICES, count_case, count_step
from rds_fast.ops.costs import COSTS, Cost, cost

FLOAT = 4  # bytes


def tensor(*shape: int, grad: bool = False) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=grad)


# x (2, 3, 8, 8) to (2, 4, 8, 8) by 3×3, padding 1: two FLOPs for each of 27 products of each output value
X, WEIGHT, BIAS, Y = 2 * 3 * 64, 4 * 3 * 9, 4, 2 * 4 * 64
FORWARD = 2 * 27 * Y


def test_convolution_reads_its_arguments_and_writes_its_result() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1, device="meta")
    with Traffic() as traffic:
        layer(tensor(2, 3, 8, 8))
    assert traffic.calls == [("aten::convolution", Count(FORWARD, FLOAT * (X + WEIGHT + BIAS + Y), 1, 1))]


def test_convolution_backward_costs_a_forward_for_each_gradient_asked_for() -> None:
    x, layer = tensor(2, 3, 8, 8, grad=True), nn.Conv2d(3, 4, 3, padding=1, device="meta")
    y = layer(x)
    both, one = Traffic(), Traffic()
    with both:
        torch.autograd.grad(y, [x, layer.weight, layer.bias], tensor(2, 4, 8, 8), retain_graph=True)
    with one:
        torch.autograd.grad(y, x, tensor(2, 4, 8, 8))
    assert both.total == Count(2 * FORWARD, FLOAT * (Y + X + WEIGHT + X + WEIGHT + BIAS), 1, 1)
    assert one.total == Count(FORWARD, FLOAT * (Y + X + WEIGHT + X), 1, 1)


def test_double_backward_of_a_convolution_is_two_forwards_more() -> None:
    """w∗v and the weight gradient, here by PyTorch's composite: a convolution whose kernel is the feature map."""
    x, layer = tensor(2, 3, 8, 8, grad=True), nn.Conv2d(3, 4, 3, padding=1, bias=False, device="meta")
    u = tensor(2, 4, 8, 8, grad=True)
    (gx,) = torch.autograd.grad(layer(x), x, u, create_graph=True)
    with Traffic() as traffic:
        torch.autograd.grad(gx, [u, layer.weight], tensor(2, 3, 8, 8))
    assert traffic.total.flops == 2 * FORWARD


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 8, 3, groups=4, device="meta"),  # grouped: the formula of torch.utils.flop_counter forgets them
        nn.Conv2d(4, 8, 3, stride=2, dilation=2, padding=2, device="meta"),
        nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2, device="meta"),
    ],
    ids=["grouped", "strided-dilated", "transposed"],
)
def test_both_gradients_of_any_convolution_cost_twice_its_forward(layer: nn.Module) -> None:
    x = tensor(2, 4, 9, 9, grad=True)
    with Traffic() as forward:
        y = layer(x)
    with Traffic() as backward:
        torch.autograd.grad(y, [x, layer.weight], torch.empty_like(y))
    assert backward.total.flops == 2 * forward.total.flops > 0


def test_batch_norm_reads_its_large_inputs_twice() -> None:
    x, layer = tensor(2, 3, 8, 8, grad=True), nn.BatchNorm2d(3, device="meta")
    forward, backward = Traffic(), Traffic()
    with forward:
        y = layer(x)
    with backward:
        torch.autograd.grad(y, [x, layer.weight, layer.bias], torch.empty_like(y))
    channel, counter = 3, 2 * 8  # num_batches_tracked, int64, read and written
    # x twice, weight, bias, both running statistics; y, mean, inverse deviation
    assert dict(forward.calls)["aten::native_batch_norm"].bytes == FLOAT * (2 * X + 4 * channel + X + 2 * channel)
    assert dict(forward.calls)["aten::add_"].bytes == counter
    # cotangent and x twice, weight, both running statistics, mean, inverse deviation; three gradients
    assert backward.total == Count(0, FLOAT * (4 * X + 5 * channel + X + 2 * channel), 1, 1)


def test_batch_norm_with_the_running_statistics_reads_its_input_once() -> None:
    layer = nn.BatchNorm2d(3, device="meta").eval()
    with Traffic() as traffic:
        layer(tensor(2, 3, 8, 8))
    # its meta version allocates the batch's statistics all the same
    assert traffic.total.bytes == FLOAT * (X + 4 * 3 + X + 2 * 3)


def test_what_is_written_in_place_is_read_and_written() -> None:
    x, other = tensor(10), tensor(10)
    for operation, passes in [
        (lambda: x.relu(), 2),
        (lambda: x.relu_(), 2),
        (lambda: x + other, 3),
        (lambda: x.add_(other), 3),
        (lambda: x * x, 2),  # one tensor, read once
        (lambda: x.mul_(x), 2),
        (lambda: x.zero_(), 1),
        (lambda: x.copy_(other), 2),
        (lambda: torch.add(x, other, out=tensor(10)), 3),
        (lambda: torch.zeros_like(x), 2),
    ]:
        with Traffic() as traffic:
            operation()
        assert traffic.total.bytes == passes * 10 * FLOAT
        assert traffic.total.operations == 1


def test_views_and_allocations_count_nothing() -> None:
    x = tensor(4, 6)
    with Traffic() as traffic:
        x.view(24).reshape(2, 12).t()[1:].unsqueeze(0).expand(3, -1, -1).detach()
        torch.empty_like(x)
        x.contiguous()
    assert traffic.calls == []


def test_an_expanded_tensor_counts_the_elements_that_exist() -> None:
    with Traffic() as traffic:
        tensor(1, 6).expand(5, 6).clone()
    assert traffic.total.bytes == FLOAT * (6 + 30)


def test_a_fused_operation_counts_by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tensor(5, 7)
    plain, declared = Traffic(), Traffic()
    with plain:
        torch.ops.rds_fast.logsumexp(x.bfloat16(), False, "native")
    monkeypatch.setitem(COSTS, "logsumexp", Cost(launches=3, reads={"x": 2}, writes={1: 4}))
    with declared:
        torch.ops.rds_fast.logsumexp(x.bfloat16(), False, "native")
    # bfloat16 (5, 7) to a bfloat16 (5,) and the float32 (5, 1) that the backward takes
    assert plain.by_name()["rds_fast::logsumexp"] == Count(0, 35 * 2 + 5 * 2 + 5 * 4, 1, 1)
    assert declared.by_name()["rds_fast::logsumexp"] == Count(0, 2 * 35 * 2 + 5 * 2 + 4 * 5 * 4, 1, 3)


class _Stashing(torch.autograd.Function):
    """Keeps a tensor on ctx, outside the saved tensors."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.stashed = torch.cat([x, x])
        return x * 2

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g * 2


def test_saved_bytes_are_the_storages_that_only_the_graph_keeps() -> None:
    x, weight = tensor(5, 6), tensor(6, 7, grad=True)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        h = (x @ weight).relu()  # the product is not saved, its positive part is
        h = h.view(7, 5).view(5, 7)  # not a second storage
        return _Stashing.apply(h).sum()  # nor the double; the stash of twice its size is

    assert count_step(loss, x, x).saved == FLOAT * (35 + 70)


def test_saved_bytes_are_not_those_released() -> None:
    weight = tensor(6, 7, grad=True)
    with Traffic() as traffic:
        loss = (tensor(5, 6) @ weight).exp().sum()
        before = traffic.alive(loss)
        loss.backward()
        after = traffic.alive(loss, weight.grad)
    # the input, which the weight gradient needs, and exp's result
    assert (before, after) == (FLOAT * (30 + 35), 0)


@pytest.mark.parametrize(
    ("provider", "expected"),
    [("cross_entropy", (3.4e12, 26e9, 163, 2.4e9)), ("eager", (7.0e12, 167e9, 2084, 4.8e9))],
)
def test_plain_steps_of_resnet18_cost_what_the_design_says(
    provider: str, expected: tuple[float, float, float, float]
) -> None:
    step = count_case(CASES["resnet18"], [provider])[provider]
    count = step.count
    assert (count.flops, count.bytes, count.operations, step.saved) == pytest.approx(expected, rel=0.02)
    # It cannot be less than the longer of the two, nor more than their sum.
    times = count.bytes / DEVICES["H200"].bytes_per_second, count.flops / DEVICES["H200"].flops_per_second
    assert max(times) <= step.floor(DEVICES["H200"]) <= sum(times)


def test_every_provider_counts_the_same_twice() -> None:
    case = Case("cnn", 28, 4)
    first, second = (count_case(case, list(LOSSES)) for _ in range(2))
    assert first.keys() == LOSSES.keys()
    for provider, step in first.items():
        assert step.traffic.calls == second[provider].traffic.calls
        assert step.saved == second[provider].saved


# FLOPs, bytes, operations and saved bytes, as multiples of the stock cross-entropy step's. A step that costs more than
# this has lost what bench/NOTES.md accounts for.
MOST = {
    "ours": (2.03, 2.40, 2.33, 2.01),
    "ours_fused": (2.03, 2.02, 1.80, 1.28),
    "cross_entropy_fused": (1.0, 0.82, 0.75, 0.86),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_penalised_step_costs(case: str) -> None:
    steps = count_case(CASES[case], ["cross_entropy", *MOST])
    stock = steps.pop("cross_entropy")
    for provider, step in steps.items():
        figures = [(s.count.flops, s.count.bytes, s.count.operations, s.saved) for s in (step, stock)]
        for ours, theirs, most in zip(*figures, MOST[provider], strict=True):
            assert ours <= most * theirs, provider


@pytest.mark.parametrize("name", COSTS)
def test_the_table_names_operations_and_their_arguments(name: str) -> None:
    for module in pkgutil.iter_modules(rds_fast.ops.__path__, "rds_fast.ops."):
        importlib.import_module(module.name)
    schema = getattr(torch.ops.rds_fast, name).default._schema
    arguments = [argument.name for argument in schema.arguments]
    short, long = tensor(300, 4, 5), tensor(2, 20000, 3)
    for given, flag in ((short, True), (short, False), (long, True), (long, False)):
        values = {"groups": 1, "training": flag, "affine_gradient": flag, "weight_gradient": flag}
        values |= {"y": given if flag else None}
        declared = cost(name, {argument: values.get(argument, given) for argument in arguments})
        assert declared.reads.keys() <= set(arguments)
        assert all(number in range(len(schema.returns)) for number in declared.writes)
        assert declared.launches >= 1


def test_the_step_as_one_graph_has_the_gradient_of_the_penalised_step() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)  # torch.func cannot track them
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Softplus(), nn.Flatten(), nn.Linear(144, 5)).double()
    x, y = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 3])
    parameters = dict(network.named_parameters())
    gradients = torch.func.grad(loss_of_parameters(network))(parameters, x, y)
    penalized(network, fast=False)(x, y).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_objectives_cost_what_they_say() -> None:
    """Without batch norm, on the CNN: r a penalised step's arithmetic over a plain one's."""
    case = Case("cnn", 28, 8)
    flops = {provider: figures(case, provider)["flops"] for provider in PROVIDERS}
    plain = flops["cross_entropy"]
    r = flops["ours"] / plain
    for k in (4, 16):
        assert flops[f"every_{k}"] / plain == pytest.approx(1 + (r - 1) / k, rel=1e-12)
    for share in (0.25, 0.5):
        assert flops[f"share_{share}"] / plain == pytest.approx(1 + share * (r - 1), rel=1e-12)
    assert figures(case, "every_4")["saved_bytes"] >= figures(case, "ours")["saved_bytes"]
