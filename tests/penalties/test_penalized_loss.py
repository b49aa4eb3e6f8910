"""The loss: its terms, its gradients, the forwards it runs, the operations it uses, and its weight."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import penalty_references as references
import pytest
import torch
from penalty_references import CLASSES, NETWORKS, assert_same_gradients, batch, cnn, gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rds_fast.penalties import schedules
from rds_fast.penalties.density import DensityPenalty, density_penalty
from rds_fast.penalties.input_gradient import InputGradientPenalty
from rds_fast.penalties.loss import LossTerms, PenalizedLoss
from rds_fast.penalties.shared import Penalty, SharedForward

EXACT = {
    "density": (DensityPenalty(p=1.5), lambda model, x, y: references.eager_density(model, x, 1.5)),
    "cross_entropy": (
        InputGradientPenalty(),
        lambda model, x, y: references.eager_input_gradient(model, x, y, "cross_entropy"),
    ),
    "target_logit": (
        InputGradientPenalty(p=1.0, power=1, of="target_logit"),
        lambda model, x, y: references.eager_input_gradient(model, x, y, "target_logit", 1.0, 1),
    ),
}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_of_the_total(network: str, name: str, fast: bool) -> None:
    penalty, truth_of = EXACT[name]
    model = NETWORKS[network]()
    x, y = batch()
    x.requires_grad_()
    terms = PenalizedLoss(penalty, 0.7, fast=fast)(model, x, y)
    assert isinstance(terms, LossTerms)
    truth = nn.functional.cross_entropy(model(x), y) + 0.7 * truth_of(model, x, y).mean()
    torch.testing.assert_close(terms.total, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.total, terms.cross_entropy + 0.7 * terms.penalty)
    torch.testing.assert_close(terms.logits, model(x))
    assert_same_gradients(gradients(terms.total, model, x), gradients(truth, model, x))


def test_gradients_of_the_finite_difference_total() -> None:
    model, (x, y) = cnn(training=True), batch()
    penalty = DensityPenalty(method="finite_difference")
    terms = PenalizedLoss(penalty, 0.7)(model, x, y)
    truth = nn.functional.cross_entropy(model(x), y) + 0.7 * penalty(model, x)
    assert_same_gradients(gradients(terms.total, model), gradients(truth, model))


def test_probabilities_and_ignored_labels() -> None:
    model, (x, y) = NETWORKS["mlp"](), batch()
    probabilities = torch.rand(6, CLASSES, dtype=torch.float64).softmax(1)
    y[2] = -100
    for labels in (y, probabilities):
        terms = PenalizedLoss(DensityPenalty())(model, x, labels)
        torch.testing.assert_close(terms.cross_entropy, nn.functional.cross_entropy(model(x), labels))
        torch.testing.assert_close(terms.penalty, density_penalty(model, x))  # of every sample, ignored or not


class OwnPenalty:
    """A penalty of one's own, with nothing but the protocol."""

    def per_sample(self, shared: SharedForward) -> Tensor:
        return shared.gradient("target_logit").flatten(1).square().mean(1)


def of_another_forward(shared: SharedForward) -> Tensor:
    """A function is a penalty too."""
    return shared.logits_at(*shared.given.differentiated).square().mean(1)


@pytest.mark.parametrize(
    ("penalty", "forwards"),
    [
        (DensityPenalty(), 1),
        (InputGradientPenalty(), 1),
        (InputGradientPenalty(of="target_logit"), 1),
        (DensityPenalty(method="finite_difference"), 2),
        (OwnPenalty(), 1),
        (lambda shared: shared.loss.square(), 1),
        (of_another_forward, 2),
    ],
)
def test_number_of_forwards(penalty: Any, forwards: int) -> None:
    model, (x, y) = NETWORKS["mlp"](), batch()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    terms = PenalizedLoss(penalty)(model, x, y)
    assert len(calls) == forwards
    torch.testing.assert_close(terms.total, terms.cross_entropy + 0.1 * terms.penalty)
    assert all(g.isfinite().all() for g in gradients(terms.total, model))


def test_gradient_accumulation() -> None:
    model, (x, y) = cnn(training=False), batch()
    loss = PenalizedLoss(DensityPenalty(), 0.5)
    whole = gradients(loss(model, x, y).total, model)
    for part in (slice(0, 3), slice(3, 6)):
        (loss(model, x[part], y[part]).total / 2).backward()
    assert_same_gradients([parameter.grad for parameter in model.parameters()], whole)
    assert x.grad is None


def test_training_lowers_the_penalty() -> None:
    model, (x, y) = references.mlp(torch.float32), batch(torch.float32, samples=32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    loss = PenalizedLoss(DensityPenalty(), 1.0)
    first = loss(model, x, y)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model, x, y).total.backward()
        optimizer.step()
    last = loss(model, x, y)
    assert last.penalty < 0.5 * first.penalty
    assert last.cross_entropy < first.cross_entropy


class Operations(TorchDispatchMode):
    """The names of this library's fused operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "rds_fast":
            self.names.append(function._opname)
        return function(*arguments, **(keywords or {}))


def test_the_fused_operations_run_once_each() -> None:
    """On the meta device, where they appear whatever was built."""
    model = NETWORKS["mlp"](torch.float32).to("meta")
    x, y = (tensor.to("meta") for tensor in batch(torch.float32))
    with Operations() as operations:
        PenalizedLoss(DensityPenalty())(model, x, y).total.backward()
    of_the_loss = [name for name in operations.names if not name.startswith("activation")]  # those are the model's
    assert sorted(of_the_loss) == [
        "cross_entropy",
        "cross_entropy_backward",
        "gradient_norm",
        "gradient_norm_backward",
        "logsumexp_backward",  # the inner pass
        "logsumexp_double_backward",
    ]
    with Operations() as operations:
        PenalizedLoss(DensityPenalty(), fast=False)(model, x, y).total.backward()
        DensityPenalty(fast=False)(model, x).backward()
        InputGradientPenalty(fast=False)(model, x, y).backward()
        density_penalty(model, x, fast=False).backward()
    assert operations.names == []


SMOOTHED = [
    DensityPenalty(),
    InputGradientPenalty(),
    InputGradientPenalty(of="target_logit"),
    DensityPenalty(method="finite_difference"),
    InputGradientPenalty(of="log_density"),
    of_another_forward,
]


@pytest.mark.parametrize("labels", ["indices", "probabilities"])
@pytest.mark.parametrize("penalty", SMOOTHED, ids=lambda penalty: getattr(penalty, "of", type(penalty).__name__))
def test_label_smoothing_is_the_cross_entropys_alone(penalty: Any, labels: str) -> None:
    model, (x, y) = cnn(training=False), batch()
    if labels == "probabilities":
        if getattr(penalty, "of", "") == "target_logit":
            pytest.skip("needs class indices")
        y = torch.rand(6, CLASSES, dtype=torch.float64).softmax(1)
    else:
        y[2] = -100
    terms = PenalizedLoss(penalty, 0.7, label_smoothing=0.3)(model, x, y)
    plain = PenalizedLoss(penalty, 0.7)(model, x, y)
    truth = nn.functional.cross_entropy(model(x), y, label_smoothing=0.3)
    torch.testing.assert_close(terms.cross_entropy, truth)
    torch.testing.assert_close(terms.penalty, plain.penalty)
    assert not torch.isclose(terms.cross_entropy, plain.cross_entropy)
    torch.testing.assert_close(terms.total, truth + 0.7 * plain.penalty)
    expected = gradients(truth + 0.7 * plain.penalty, model)
    assert_same_gradients(gradients(terms.total, model), expected)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-0.1, ValueError, r"label_smoothing is -0\.1; it must be in \[0, 1\]"),
        (1.1, ValueError, r"label_smoothing is 1\.1"),
        (math.nan, ValueError, "label_smoothing is nan"),
        ("much", TypeError, "label_smoothing is 'much', a str; it must be a Python number"),
        (torch.tensor(0.1), TypeError, "label_smoothing is a Tensor"),
    ],
)
def test_bad_label_smoothing(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PenalizedLoss(DensityPenalty(), label_smoothing=value)


def test_penalties_may_be_made_of_others() -> None:
    """From one forward; the finite difference, which runs it in its own way, must come first."""
    model, (x, y) = cnn(training=True), batch()
    fine = DensityPenalty(method="finite_difference")

    def both(shared: SharedForward) -> Tensor:
        return DensityPenalty().per_sample(shared) + 2 * InputGradientPenalty().per_sample(shared)

    def in_the_wrong_order(shared: SharedForward) -> Tensor:
        return DensityPenalty().per_sample(shared) + fine.per_sample(shared)

    truth = references.eager_density(model, x) + 2 * references.eager_input_gradient(model, x, y, "cross_entropy")
    torch.testing.assert_close(PenalizedLoss(both)(model, x, y).penalty, truth.mean())
    with pytest.raises(
        RuntimeError, match="the shared forward has run already; a penalty that needs its own kind must"
    ):
        PenalizedLoss(in_the_wrong_order)(model, x, y)


def test_weights_and_schedules() -> None:
    model, (x, y) = NETWORKS["mlp"](), batch()
    loss = PenalizedLoss(DensityPenalty(), schedules.LinearWarmup(0.8, 4))
    for step in (0, 1, 4, 9):
        terms = loss(model, x, y, step=step)
        torch.testing.assert_close(terms.total, terms.cross_entropy + min(0.8, 0.2 * step) * terms.penalty)
    assert PenalizedLoss(DensityPenalty(), lambda step: 0.3)(model, x, y, 0).total.requires_grad
    with pytest.raises(ValueError, match=r"weight is a schedule \(LinearWarmup.*step was not given; call loss\(model"):
        loss(model, x, y)
    with pytest.raises(ValueError, match=r"the weight at step 3 is -1\.0; it must be finite and not negative"):
        PenalizedLoss(DensityPenalty(), lambda step: -1.0)(model, x, y, step=3)
    with pytest.raises(TypeError, match="the weight at step 3 is 'much', a str; it must be a Python number"):
        PenalizedLoss(DensityPenalty(), lambda step: "much")(model, x, y, step=3)


def test_a_schedules_weight_may_be_a_tensor() -> None:
    """Of any precision, with the loss in its own, and no gradient for what it was computed from."""
    model, (x, y) = NETWORKS["mlp"](torch.float32), batch(torch.float32)
    source = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    terms = PenalizedLoss(DensityPenalty(), lambda step: 2 * source)(model, x, y, step=3)
    expected = PenalizedLoss(DensityPenalty(), 0.6)(model, x, y)
    assert terms.total.dtype == torch.float32
    torch.testing.assert_close(terms.total, expected.total)
    terms.total.backward()
    assert source.grad is None
    for weight in (torch.tensor([1.0]), torch.tensor(1)):
        with pytest.raises(TypeError, match=r"the weight at step 3 is a tensor of shape .* a floating-point tensor of"):
            PenalizedLoss(DensityPenalty(), lambda step, weight=weight: weight)(model, x, y, step=3)
    warm_up = schedules.LinearWarmup(lambda step: torch.tensor(0.8), 4)
    assert [float(warm_up(step)) for step in (0, 1, 9)] == pytest.approx([0.0, 0.2, 0.8])


class Curvature(Penalty):
    """A difference of two gradients and the loss, from one shared forward."""

    def per_sample(self, shared: SharedForward) -> Tensor:
        difference = shared.gradient("log_density") - shared.gradient("target_logit")
        return difference.flatten(1).norm(dim=1) + shared.loss * shared.gradient_norm("log_density", 1.0)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_penalty_of_ones_own(network: str) -> None:
    """∇ log p − ∇ f_y is the gradient of the cross-entropy; each inner pass runs once."""
    model, (x, y) = NETWORKS[network](), batch()
    norm = references.eager_input_gradient(model, x, y, "cross_entropy")
    loss = nn.functional.cross_entropy(model(x), y, reduction="none")
    truth = (norm + loss * references.eager_density(model, x, 1.0)).mean()
    expected = gradients(truth, model)
    assert_same_gradients(gradients(Curvature()(model, x, y), model), expected)
    terms = PenalizedLoss(Curvature(), 0.5)(model, x, y)
    torch.testing.assert_close(terms.penalty, truth)
    torch.testing.assert_close(terms.total, loss.mean() + 0.5 * truth)
    shared = SharedForward(model, x, y)
    assert torch.equal(shared.inputs, x)
    (by_hand,) = torch.autograd.grad(shared.logits.sum(), shared.inputs, create_graph=True)
    torch.testing.assert_close(shared.gradient(shared.logits.sum(1)), by_hand)
    assert all(getattr(shared, name) is getattr(shared, name) for name in ("logits", "loss", "log_density"))
    assert shared._inner_pass("log_density") is shared._inner_pass("log_density")


def test_weight_zero_is_cross_entropy_alone() -> None:
    model, (x, y) = cnn(training=True), batch()
    model_copy = copy.deepcopy(model)
    plain = gradients(nn.functional.cross_entropy(model_copy(x), y), model_copy)
    terms = PenalizedLoss(DensityPenalty(), 0.0)(model, x, y)
    assert terms.penalty > 0
    assert terms.total is terms.cross_entropy  # the graph of second order is not walked
    assert_same_gradients(gradients(terms.total, model), plain)


@pytest.mark.parametrize("number", [np.float32(1.5), np.float64(1.5), np.float16(1.5), np.uint8(2)], ids=repr)
def test_numbers_of_numpy(number: Any) -> None:
    """As p, power, step size and weight, alone and in a schedule, and in float16's inner pass, which divides by 2⁸."""
    model, (x, y) = NETWORKS["mlp"](torch.float32), batch(torch.float32)
    exact = float(number)
    for of_numpy, of_python in (
        (DensityPenalty(p=number, power=number), DensityPenalty(p=exact, power=exact)),
        (
            DensityPenalty(method="finite_difference", step_size=number),
            DensityPenalty(method="finite_difference", step_size=exact),
        ),
        (InputGradientPenalty(p=number, power=number), InputGradientPenalty(p=exact, power=exact)),
    ):
        ours, expected = PenalizedLoss(of_numpy, number)(model, x, y), PenalizedLoss(of_python, exact)(model, x, y)
        assert torch.equal(ours.total, expected.total)
    ours, expected = (DensityPenalty(power=power)(model.half(), x.half()) for power in (number, exact))
    assert torch.equal(ours, expected)
    assert ours > 0
    for schedule in (schedules.Constant, lambda weight: schedules.Cosine(weight, weight, 3)):
        assert schedule(number)(1) == exact
    assert schedules.Step(number, (1,), number)(1) == exact**2
    assert type(schedules.Cosine(number, number, 3)(1)) is float


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_bad_weights(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight is .*; it must be finite and not negative"):
        PenalizedLoss(DensityPenalty(), weight)


def test_bad_penalties() -> None:
    with pytest.raises(TypeError, match=r"weight is '0\.1', a str; it must be a Python number"):
        PenalizedLoss(DensityPenalty(), "0.1")
    for penalty in (None, DensityPenalty):  # the class in the place of an object
        with pytest.raises(TypeError, match=r"must have a method per_sample\(shared\), .* such as DensityPenalty\(\)"):
            PenalizedLoss(penalty)
    with pytest.raises(TypeError, match=r"or be a function of the shared forward alone"):
        PenalizedLoss(lambda model, x, y: model(x))
    for penalty in (lambda shared: shared.logits, lambda shared: shared.loss.mean(), lambda shared: None):
        with pytest.raises(
            TypeError, match=r"the penalty returned .*; it must return the penalty of each sample, \(6,"
        ):
            PenalizedLoss(penalty)(NETWORKS["mlp"](), *batch())
    for of in (lambda shared: shared.logits, lambda shared: shared.logits.sum(), lambda shared: None):
        with pytest.raises(ValueError, match=r"what is to be differentiated .* a value of each sample, \(6,\)"):
            PenalizedLoss(lambda shared, of=of: shared.gradient(of(shared)))(NETWORKS["mlp"](), *batch())
    with pytest.raises(RuntimeError, match=r"no gradient path from x .* logits computed from another tensor than x"):
        PenalizedLoss(lambda shared: shared.gradient(shared.model(shared.x).sum(1)))(NETWORKS["mlp"](), *batch())
    with pytest.raises(NotImplementedError, match=r"Penalty defines no per_sample\(shared\)"):
        Penalty()(NETWORKS["mlp"](), *batch())


def test_repr_and_equality() -> None:
    loss = PenalizedLoss(DensityPenalty(p=1.0), schedules.Cosine(0.1, 0.0, 10))
    assert eval(repr(loss), {**globals(), **vars(schedules)}) == loss
