"""The finite difference: its value, its gradient, and what it must leave alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import penalty_references as references
import pytest
import torch
from penalty_references import NETWORKS, assert_same_gradients, batch, cnn, gradients
from torch import Tensor, nn

from rds_fast.penalties.density import DensityPenalty, density_penalty
from rds_fast.penalties.loss import PenalizedLoss
from rds_fast.penalties.shared import SharedForward

ORDERS = [1.0, 1.5, 2.0, math.inf]


def dual_direction(gradient: Tensor, p: float) -> Tensor:
    """Written out: the direction of unit dual norm that the gradient grows along fastest."""
    rows = gradient.flatten(1)
    if p == 1.0:
        direction = rows.sign()
    elif p == math.inf:
        largest = rows.abs().argmax(1, keepdim=True)
        direction = torch.zeros_like(rows).scatter(1, largest, rows.gather(1, largest).sign())
    else:
        direction = rows.sign() * (rows.abs() / rows.norm(p, dim=1, keepdim=True)) ** (p - 1)
    return direction.view_as(gradient)


def eager_taylor(model: nn.Module, x: Tensor, p: float, power: float, step_size: float) -> Tensor:
    """|l(x + h d) − l(x)|^power / h^power with d constant; the second forward runs on a copy's statistics."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    base = torch.logsumexp(model(x), 1)
    (gradient,) = torch.autograd.grad(base.sum(), x, retain_graph=True)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    moved = torch.func.functional_call(model, buffers, (x + step_size * dual_direction(gradient, p),))
    return (((torch.logsumexp(moved, 1) - base).abs() / step_size) ** power).mean()


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("network", ["mlp", "cnn-eval"])
def test_it_approaches_the_exact_penalty(network: str, p: float) -> None:
    """The error is of the first order in h: a step a hundred times smaller, an error about a hundred times smaller."""
    model, x = NETWORKS[network](), batch()[0]
    exact = density_penalty(model, x, p=p)
    coarse, fine = (
        (density_penalty(model, x, p=p, method="finite_difference", step_size=h) - exact).abs().item() / exact.item()
        for h in (1e-3, 1e-5)
    )
    assert fine < 1e-5
    assert fine < 0.03 * coarse


@pytest.mark.parametrize("power", [1, 2, 0.5])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_its_gradient_is_that_of_the_taylor_form(network: str, p: float, power: float) -> None:
    model = NETWORKS[network]()
    x, _ = batch()
    x.requires_grad_()
    truth_model = copy.deepcopy(model)
    truth = eager_taylor(truth_model, x, p, power, 1e-2)
    ours = density_penalty(model, x, p=p, power=power, method="finite_difference", step_size=1e-2)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=0)
    assert_same_gradients(gradients(ours, model, x), gradients(truth, truth_model, x), 1e-8)


class RunningMaximum(nn.Module):
    """A module of one's own that updates a buffer in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.largest.copy_(torch.maximum(self.largest, x.detach().abs().amax() + self.largest))
        return x


class NoisyStatistics(nn.BatchNorm2d):
    """A subclass that does not obey track_running_stats."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_statistics_are_those_of_a_plain_step(method: str) -> None:
    """Running means and variances, counts of batches and foreign buffers; in eval mode untouched.

    Bit for bit with finite differences, whose forward is PyTorch's. The exact penalty's batch norm sums in another
    order, so there float32 may differ in its last bits, as two roundings do.
    """
    last_bits = (
        {"rtol": 4 * torch.finfo(torch.float32).eps, "atol": 1e-7} if method == "exact" else {"rtol": 0, "atol": 0}
    )
    model = nn.Sequential(
        RunningMaximum(),
        NoisyStatistics(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
        *cnn(torch.float32, training=True),
    )
    plain = copy.deepcopy(model)
    x, y = batch(torch.float32)
    buffers = dict(model.named_buffers())
    for _ in range(2):
        nn.functional.cross_entropy(plain(x), y).backward()
        PenalizedLoss(DensityPenalty(method=method))(model, x, y).total.backward()
    for name, expected in plain.named_buffers():
        torch.testing.assert_close(buffers[name], expected, **last_bits, msg=name)
        assert buffers[name] is model.get_buffer(name), name
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    PenalizedLoss(DensityPenalty(method=method))(model.eval(), x, y).total.backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_statistics_come_back_after_an_error() -> None:
    class FailsTheSecondTime(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("out of memory, say")
            return x

    model = nn.Sequential(RunningMaximum(), *cnn(training=True), FailsTheSecondTime())
    buffers = dict(model.named_buffers())
    with pytest.raises(RuntimeError, match="out of memory, say"):
        density_penalty(model, batch()[0], method="finite_difference")
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert model[2].track_running_stats


def test_there_is_no_graph_of_second_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner pass is asked for no graph, and its parameters' gradients never need one: nothing is saved in it."""
    asked: list[bool] = []
    saved_in_pass: list[int] = []
    grad = torch.autograd.grad

    def spy(*arguments: Any, **keywords: Any) -> Any:
        saved: list[Tensor] = []
        asked.append(keywords.get("create_graph", False))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            result = grad(*arguments, **keywords)
        saved_in_pass.append(len(saved))
        return result

    monkeypatch.setattr(torch.autograd, "grad", spy)
    model, (x, y) = NETWORKS["cnn-train"](), batch()
    PenalizedLoss(DensityPenalty(method="finite_difference"))(model, x, y)
    assert asked == [False, False]  # of l with respect to x, and of the norm: the dual direction
    assert saved_in_pass == [0, 0]
    PenalizedLoss(DensityPenalty())(model, x, y)
    assert asked[2:] == [True]  # the spy sees a second order where there is one
    assert saved_in_pass[2] > 0


def test_both_forwards_draw_the_same_random_numbers() -> None:
    """Another dropout mask in the second forward would be divided by h; and the generator ends as after one forward."""
    model = references.mlp()
    model = nn.Sequential(*model[:3], nn.Dropout(0.5), *model[3:])
    x, _ = batch()
    torch.manual_seed(5)
    exact = density_penalty(model, x)
    after_one_forward = torch.get_rng_state()
    torch.manual_seed(5)
    ours = density_penalty(model, x, method="finite_difference", step_size=1e-6)
    assert torch.equal(torch.get_rng_state(), after_one_forward)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=0)


def test_rows_of_zero_gradient_stay_zero_among_coupled_samples() -> None:
    """Batch norm moves every sample's logits when one input moves; a sample without direction still has penalty 0."""

    class IgnoresSomeInputs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(torch.tensor([[False], [True], [True]]), x, 0.5)

    torch.manual_seed(0)
    model = nn.Sequential(IgnoresSomeInputs(), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.logsumexp(model(leaf), 1).sum(), leaf)
    assert not gradient[0].any()
    each = density_penalty(model, x, method="finite_difference", reduction="none")
    assert each[0] == 0
    assert (each[1:] > 0).all()


def test_it_leaves_autocast() -> None:
    """Under bf16 autocast its value is the float32 one, and so are the logits of the shared forward."""
    model = cnn(torch.float32, training=True)
    x, y = batch(torch.float32)
    loss = PenalizedLoss(DensityPenalty(method="finite_difference"))
    outside = loss(copy.deepcopy(model), x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(model, x, y)
        assert torch.is_autocast_enabled("cpu")
    assert inside.logits.dtype == torch.float32
    torch.testing.assert_close(inside.total, outside.total)


def test_16_bit_is_refused() -> None:
    model, x = references.mlp(torch.bfloat16), batch(torch.bfloat16)[0]
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16, too coarse .* use float32 or float64 throughout, or"):
        density_penalty(model, x, method="finite_difference")
    casting = nn.Sequential(nn.Flatten(), *model[1:])
    casting.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16(),))
    with pytest.raises(ValueError, match=r"the logits are torch\.bfloat16, too coarse"):
        density_penalty(casting, x.float(), method="finite_difference")


def test_given_logits_need_the_exact_method() -> None:
    model, x = NETWORKS["mlp"](), batch()[0].requires_grad_()
    with pytest.raises(RuntimeError, match="the shared forward has run already; a penalty that needs its own kind"):
        DensityPenalty(method="finite_difference").per_sample(SharedForward.of_logits(model(x), x))
