"""The gradients of the penalties with respect to the parameters and to x, against eager float64."""

from __future__ import annotations

import math

import penalty_references as references
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from penalty_references import CLASSES, NETWORKS, assert_same_gradients, batch, gradients
from torch import nn

from rds_fast.penalties.density import DensityPenalty, density_penalty, density_penalty_from_logits, log_density
from rds_fast.penalties.input_gradient import InputGradientPenalty
from rds_fast.penalties.shared import SharedForward

ORDERS = [1.0, 1.5, 2.0, math.inf]
POWERS = [1, 2, 0.5]


@pytest.mark.parametrize(
    ("p", "power", "fast"),
    [*((p, power, True) for p in ORDERS for power in POWERS), *((p, 1, False) for p in ORDERS)],
)
@pytest.mark.parametrize("network", NETWORKS)
def test_density(network: str, p: float, power: float, fast: bool) -> None:
    model = NETWORKS[network]()
    x, _ = batch()
    x.requires_grad_()
    ours = density_penalty(model, x, p=p, power=power, reduction="none", fast=fast)
    truth = references.eager_density(model, x, p, power)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=0)
    assert_same_gradients(gradients(ours.mean(), model, x), gradients(truth.mean(), model, x))


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("of", ["cross_entropy", "target_logit"])
@pytest.mark.parametrize("network", NETWORKS)
def test_input_gradient(network: str, of: str, p: float, power: float) -> None:
    model = NETWORKS[network]()
    x, y = batch()
    x.requires_grad_()
    ours = InputGradientPenalty(p=p, power=power, of=of)(model, x, y)
    truth = references.eager_input_gradient(model, x, y, of, p, power).mean()
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=0)
    assert_same_gradients(gradients(ours, model, x), gradients(truth, model, x))


def test_input_gradient_of_probabilities() -> None:
    """The cross-entropy of two mixed labels is the mixture of theirs."""
    model = NETWORKS["mlp"]()
    x, y = batch()
    other = y.roll(1)
    one_hot = nn.functional.one_hot
    mixed = 0.7 * one_hot(y, CLASSES).double() + 0.3 * one_hot(other, CLASSES).double()
    leaf = x.clone().requires_grad_()
    log_p = torch.log_softmax(model(leaf), 1)
    truth = references.eager_norms(-0.7 * log_p[range(6), y] - 0.3 * log_p[range(6), other], leaf, 2.0, 1).mean()
    ours = InputGradientPenalty()(model, x, mixed)
    assert_same_gradients(gradients(ours, model), gradients(truth, model))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("of", ["cross_entropy", "target_logit"])
def test_ignored_rows_have_no_penalty(of: str, fast: bool) -> None:
    """The mean is over all rows: what the others add to it, and to the gradients, is as if the ignored were zeros."""
    model, (x, y) = NETWORKS["mlp"](), batch()
    penalty = InputGradientPenalty(of=of, power=1, fast=fast)
    kept = [0, 1, 3, 5]
    truth = penalty.per_sample(SharedForward(model, x[kept], y[kept])).sum() / 6
    y[[2, 4]] = -100
    ours = penalty(model, x, y)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(ours, model), gradients(truth, model))
    each = penalty.per_sample(SharedForward(model, x, y))
    assert each[2] == each[4] == 0
    leaf = x.clone().requires_grad_()
    given = penalty.per_sample(SharedForward.of_logits(model(leaf), leaf, y)).mean()
    torch.testing.assert_close(given, truth, rtol=1e-12, atol=0)
    all_ignored = penalty(model, x, torch.full_like(y, -100))
    assert all_ignored == 0
    assert all((g == 0).all() for g in gradients(all_ignored, model))


@pytest.mark.parametrize("penalty", [DensityPenalty(), InputGradientPenalty(), InputGradientPenalty(of="target_logit")])
def test_of_given_logits_is_the_same_penalty(penalty: DensityPenalty | InputGradientPenalty) -> None:
    model = NETWORKS["mlp"]()
    x, y = batch()
    leaf = x.clone().requires_grad_()
    shared = penalty.per_sample(SharedForward.of_logits(model(leaf), leaf, y)).mean()
    alone = penalty(model, x, y)
    assert_same_gradients(gradients(shared, model), gradients(alone, model), 1e-14)


def test_reductions() -> None:
    model = NETWORKS["mlp"]()
    x, _ = batch()
    each = density_penalty(model, x, reduction="none")
    assert each.shape == (6,)
    torch.testing.assert_close(density_penalty(model, x), each.mean())
    torch.testing.assert_close(density_penalty(model, x, reduction="sum"), each.sum())
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(density_penalty_from_logits(model(leaf), leaf, reduction="sum"), each.sum())
    torch.testing.assert_close(DensityPenalty()(model, x), each.mean())


def test_log_density() -> None:
    model = NETWORKS["mlp"]()
    x, _ = batch()
    with torch.no_grad():  # a value needs no gradient
        torch.testing.assert_close(log_density(model, x), torch.logsumexp(model(x), 1))
    x.requires_grad_()
    (ours,) = torch.autograd.grad(log_density(model, x).sum(), x)
    (truth,) = torch.autograd.grad(torch.logsumexp(model(x), 1).sum(), x)
    torch.testing.assert_close(ours, truth)


def test_frozen_parameters() -> None:
    """The others get the gradient that they would have had; with all frozen, x still gets its own."""
    model, x = NETWORKS["cnn-eval"](), batch()[0]
    all_gradients = gradients(density_penalty(model, x), model)
    model[0].requires_grad_(False)
    frozen = sum(1 for _ in model[0].parameters())
    assert_same_gradients(gradients(density_penalty(model, x), model), all_gradients[frozen:], 1e-14)
    model.requires_grad_(False)
    exact = density_penalty(model, x)  # for its value, x and all parameters being constants
    torch.testing.assert_close(
        density_penalty(model, x, method="finite_difference", step_size=1e-6), exact, rtol=1e-5, atol=0
    )
    x.requires_grad_()
    ours, truth = density_penalty(model, x), references.eager_density(model, x).mean()
    assert_same_gradients(gradients(ours, model, x), gradients(truth, model, x))


def test_the_inner_pass_leaves_no_trace_on_x() -> None:
    model, (x, y) = NETWORKS["mlp"](), batch()
    density_penalty(model, x).backward()
    assert not x.requires_grad
    assert x.grad is None

    leaf = x.clone().requires_grad_()
    leaf.grad = torch.full_like(leaf, 3.0)
    calls: list[torch.Tensor] = []
    leaf.register_hook(calls.append)
    between = leaf * 1.0
    between.retain_grad()
    for penalty in (DensityPenalty(), DensityPenalty(method="finite_difference"), InputGradientPenalty()):
        penalty(model, leaf, y)
        penalty(model, between, y)
    assert torch.equal(leaf.grad, torch.full_like(leaf, 3.0))
    assert between.grad is None
    assert not calls


def test_a_later_backward_fills_x_grad_as_of_any_loss() -> None:
    model, x = NETWORKS["mlp"](), batch()[0]
    x.requires_grad_()
    (expected,) = torch.autograd.grad(references.eager_density(model, x).mean(), x)
    density_penalty(model, x).backward()
    assert_same_gradients([x.grad], [expected])


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("p", ORDERS)
def test_zero_gradients(p: float, power: float, method: str) -> None:
    """Rows that a dead unit cuts off from the logits: penalty 0 and no NaN, where eager gives NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-1.0)
    x = torch.randn(5, 4, dtype=torch.float64) * 3
    x[1] = x[3] = 0.0  # all units are off
    each = density_penalty(model, x, p=p, power=power, method=method, reduction="none")
    assert each[1] == each[3] == 0
    assert (each[[0, 2, 4]] > 0).all()
    ours = gradients(each.sum(), model)
    assert all(g.isfinite().all() for g in ours)
    kept = density_penalty(model, x[[0, 2, 4]], p=p, power=power, method=method, reduction="sum")
    assert_same_gradients(ours, gradients(kept, model), 1e-9)


def test_empty_batches() -> None:
    """No sample: the mean is NaN, as PyTorch's is, and "none" is empty."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert density_penalty(model, x[:0], reduction="none").shape == (0,)
    assert density_penalty(model, x[:0]).isnan()


def test_nan_is_not_hidden() -> None:
    model, x = NETWORKS["mlp"](), batch()[0]
    x[2, 0, 0, 0] = math.nan
    for method in ("exact", "finite_difference"):
        each = density_penalty(model, x, method=method, reduction="none")
        assert each.isnan().tolist() == [False, False, True, False, False, False]


@settings(max_examples=15, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 10**6), p=st.sampled_from(ORDERS))
def test_a_shift_of_all_logits_changes_nothing(shift: float, seed: int, p: float) -> None:
    """p(x) is defined up to a factor: a constant added to all logits leaves the penalty and its gradients."""
    model, x = references.mlp(seed=seed), batch(seed=seed)[0]
    before = density_penalty(model, x, p=p)
    before_gradients = gradients(before, model)
    with torch.no_grad():
        model[-1].bias += shift
    after = density_penalty(model, x, p=p)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=0)
    assert_same_gradients(gradients(after, model), before_gradients, 1e-9)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(6)), network=st.sampled_from(sorted(NETWORKS)), of_labels=st.booleans())
def test_a_permuted_batch_permutes_the_penalties(order: list[int], network: str, of_labels: bool) -> None:
    model, (x, y) = NETWORKS[network](), batch()
    penalty = InputGradientPenalty() if of_labels else DensityPenalty()
    before = penalty.per_sample(SharedForward(model, x, y))
    after = penalty.per_sample(SharedForward(model, x[order], y[order]))
    torch.testing.assert_close(after, before[order], rtol=1e-9, atol=1e-12)
