"""Losses of one's own and the density under them; weights of the samples."""

from __future__ import annotations

import functools
import math
from itertools import combinations
from typing import Any, NamedTuple

import penalty_references as references
import pytest
import torch
from penalty_references import CLASSES, NETWORKS, assert_same_gradients, batch, cnn, gradients, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import rds_fast
from rds_fast import (
    AccuracyBudget,
    AdversarialLoss,
    AttributionPenalty,
    BinaryCrossEntropy,
    DensityPenalty,
    GradientMatchingPenalty,
    InputGradientPenalty,
    JacobianPenalty,
    PenalizedLoss,
    RobustAttributionLoss,
)
from rds_fast.penalties.shared import SharedForward

CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 4.0, 0.25], dtype=torch.float64)


def focal(logits: Tensor, y: Tensor) -> Tensor:
    """(1 − p_y)² CE, Lin et al. 2017."""
    losses = F.cross_entropy(logits, y, reduction="none")
    return (1 - (-losses).exp()).square() * losses


def one_logit(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(*mlp(dtype)[:-1], nn.Linear(12, 1).to(dtype))


def eager_norm(output: Tensor, x: Tensor, power: float = 1) -> Tensor:
    return references.eager_norms(output, x, 2.0, power).mean()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_loss_of_ones_own(network: str) -> None:
    """It is what is trained, and what of="cross_entropy" means; with class indices the density is the softmax's."""
    model, (x, y) = NETWORKS[network](), batch()
    x.requires_grad_()
    losses = focal(model(x), y)
    for penalty, truth in (
        (InputGradientPenalty(), eager_norm(losses, x)),
        (DensityPenalty(), references.eager_density(model, x).mean()),
    ):
        terms = PenalizedLoss(penalty, 0.7, loss=focal)(model, x, y)
        torch.testing.assert_close(terms.cross_entropy, losses.mean())
        torch.testing.assert_close(terms.penalty, truth)
        expected = gradients(losses.mean() + 0.7 * truth, model, x, retain_graph=True)
        assert_same_gradients(gradients(terms.total, model, x), expected)


def test_the_penalties_of_labels_take_the_loss() -> None:
    """A teacher's gradient is of the loss too, and so are attributions."""
    model, teacher, (x, y) = mlp(), mlp(seed=4), batch()
    leaf = x.clone().requires_grad_()
    difference = [torch.autograd.grad(focal(m(leaf), y).sum(), leaf)[0] for m in (model, teacher)]
    matching = PenalizedLoss(GradientMatchingPenalty(teacher), loss=focal)(model, x, y).penalty
    torch.testing.assert_close(matching, (difference[0] - difference[1]).flatten(1).norm(dim=1).mean())
    bounds = (-10.0, 10.0)
    attributions = AttributionPenalty(0.1, size="sum", bounds=bounds, generator=torch.Generator().manual_seed(3))
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    terms = PenalizedLoss(attributions, loss=focal)(model, x, y)
    handle.remove()
    moved = seen[-3]  # x', x, and the loss's own x come last
    torch.testing.assert_close(terms.penalty, (focal(model(moved), y) - focal(model(x), y)).mean())


class TestBinary:
    @pytest.mark.parametrize("y_kind", ["float (N, 1)", "float (N,)", "int", "bool"])
    def test_one_logit_is_two_logits_0_and_f(self, y_kind: str) -> None:
        """Loss, log density, their gradients and penalties are those of a softmax over (0, f)."""
        model, (x, y) = one_logit(), batch()
        y = y % 2
        labels = {"float (N, 1)": y.double()[:, None], "float (N,)": y.double(), "int": y, "bool": y == 1}[y_kind]

        def two(x: Tensor) -> Tensor:
            f = model(x)
            return torch.cat([torch.zeros_like(f), f], 1)

        for penalty in (DensityPenalty(), InputGradientPenalty(power=2), DensityPenalty(method="finite_difference")):
            ours = PenalizedLoss(penalty, 0.7, loss=BinaryCrossEntropy())(model, x, labels)
            truth = PenalizedLoss(penalty, 0.7)(two, x, y)
            torch.testing.assert_close(ours.cross_entropy, truth.cross_entropy)
            torch.testing.assert_close(ours.penalty, truth.penalty)
            assert_same_gradients(gradients(ours.total, model), gradients(truth.total, model))

    def test_pytorchs_losses_of_one_logit(self) -> None:
        """Whatever the loss of one logit is, the density is the sigmoid classifier's; (N, 1) is taken for (N,)."""
        model, (x, y) = one_logit(), batch()
        labels = (y % 2).double()
        expected = PenalizedLoss(DensityPenalty(), loss=BinaryCrossEntropy())(model, x, labels)
        for loss, y in (
            (nn.BCEWithLogitsLoss(reduction="none"), labels[:, None]),
            (functools.partial(F.binary_cross_entropy_with_logits, reduction="none"), labels[:, None]),
            (lambda f, y: F.binary_cross_entropy_with_logits(f[:, 0], y, reduction="none"), labels),
        ):
            ours = PenalizedLoss(DensityPenalty(), loss=loss)(model, x, y)
            torch.testing.assert_close(ours.total, expected.total)

    def test_independent_labels(self) -> None:
        """Σ log(1 + exp fᵢ), which is the log of the sum over all 2^C labellings."""
        model, x = mlp(), batch()[0]
        labels = torch.randint(2, (6, CLASSES), generator=torch.Generator().manual_seed(1)).double()
        leaf = x.clone().requires_grad_()
        f = model(leaf)
        every = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * CLASSES)
        density = torch.logsumexp(f @ every.T, 1)
        losses = F.binary_cross_entropy_with_logits(f, labels, reduction="none").sum(1)
        torch.testing.assert_close(losses, density - (labels * f).sum(1))
        truth = losses.mean() + 0.7 * eager_norm(density, leaf)
        ours = PenalizedLoss(DensityPenalty(), 0.7, loss=BinaryCrossEntropy())(model, x, labels)
        torch.testing.assert_close(ours.total, truth)
        assert_same_gradients(gradients(ours.total, model), gradients(truth, model))

        def stated(logits: Tensor, y: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1)

        with pytest.raises(
            ValueError, match=r"log density of x under the loss .* is not known: its labels are no class"
        ):
            PenalizedLoss(DensityPenalty(), loss=stated)(model, x, labels)
        stated.log_density = BinaryCrossEntropy().log_density
        torch.testing.assert_close(
            PenalizedLoss(DensityPenalty(), 0.7, loss=stated)(model, x, labels).total, ours.total
        )
        stated.log_density = rds_fast.logsumexp
        softmax = PenalizedLoss(DensityPenalty(), loss=stated)(model, x, labels).penalty
        torch.testing.assert_close(softmax, DensityPenalty()(model, x))

    def test_far_from_zero(self) -> None:
        """PyTorch's softplus is linear from 20 on: of second derivative 0 where it is 2e-9."""
        f = torch.tensor([[25.0], [-800.0], [800.0]], dtype=torch.float64, requires_grad=True)
        density = BinaryCrossEntropy().log_density(f)
        torch.testing.assert_close(density, torch.logaddexp(f[:, 0], torch.zeros(3, dtype=f.dtype)), rtol=1e-14, atol=0)
        (first,) = torch.autograd.grad(density.sum(), f, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), f)
        s = torch.sigmoid(f)
        torch.testing.assert_close(second, s * torch.sigmoid(-f), rtol=1e-10, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_mixed_precision(self, dtype: torch.dtype) -> None:
        model, (x, y) = one_logit(torch.float32), batch(torch.float32, samples=16)
        truth = PenalizedLoss(DensityPenalty(), loss=BinaryCrossEntropy())(one_logit(), x.double(), y % 2)
        with torch.autocast("cpu", dtype=dtype):
            terms = PenalizedLoss(DensityPenalty(), loss=BinaryCrossEntropy())(model, x, y % 2)
        assert terms.total.dtype == torch.float32
        assert terms.total.item() == pytest.approx(truth.total.item(), rel=0.02)

    def test_errors(self) -> None:
        model, (x, y) = mlp(), batch()
        for labels, error, message in (
            (y, ValueError, r"y has shape \(6,\) and the logits \(6, 5\); .* a label for each logit, \(N, C\), or"),
            (torch.full((6, 5), 1.5), ValueError, r"y holds a label outside \[0, 1\]"),
            (None, TypeError, r"y is a NoneType; a binary cross-entropy needs"),
        ):
            with pytest.raises(error, match=message):
                PenalizedLoss(DensityPenalty(), loss=BinaryCrossEntropy())(model, x, labels)
        with pytest.raises(ValueError, match=r"y has shape \(6,\) and the logits \(6,\); a binary cross-entropy needs"):
            BinaryCrossEntropy()(torch.zeros(6), torch.zeros(6))

        def stated(logits: Tensor, y: Any) -> Tensor:
            return logits.sum(1)

        for density, given in ((lambda logits: logits.sum(), r"shape \(\)"), (lambda logits: None, "NoneType")):
            stated.log_density = density  # type: ignore[attr-defined]
            with pytest.raises(ValueError, match=f"the loss's log_density returned {given} for logits"):
                PenalizedLoss(DensityPenalty(), loss=stated)(model, x, y)


ONE_LOGIT = {
    "penalized": PenalizedLoss(InputGradientPenalty(of="target_logit")),
    "density": DensityPenalty(),
    "finite difference": DensityPenalty(method="finite_difference"),
    "cross-entropy": InputGradientPenalty(),
    "matching": GradientMatchingPenalty(lambda x: x[:, :1, 0, 0]),
    "attribution": AttributionPenalty(0.1, path_steps=2, attack_steps=1, bounds=(-9.0, 9.0)),
    "adversarial": AdversarialLoss(0.1, bounds=(-9.0, 9.0)),
    "robust attribution": RobustAttributionLoss(0.5, 0.1, path_steps=2, attack_steps=1, bounds=(-9.0, 9.0)),
    "given logits": lambda model, x, y: rds_fast.density_penalty_from_logits(model(x.requires_grad_()), x),
    "log density": lambda model, x, y: rds_fast.log_density(model, x),
    "integrated gradients": lambda model, x, y: rds_fast.integrated_gradients(model, x, y, 0.0),
}


@pytest.mark.parametrize("call", ONE_LOGIT.values(), ids=ONE_LOGIT.keys())
def test_one_logit_is_refused_where_a_softmax_is_taken(call: Any) -> None:
    x, _ = batch()
    message = (
        r"logits have shape \(\d+, 1\), one logit a sample, .*loss=rds_fast\.BinaryCrossEntropy\(\)\), or return two"
    )
    for y in (torch.zeros(6, dtype=torch.int64), torch.ones(6, 1, dtype=torch.float64)):
        with pytest.raises(ValueError, match=message):
            call(one_logit(), x, y)


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(reduction="none"), functools.partial(F.cross_entropy, reduction="none")]
)
def test_pytorchs_cross_entropy_of_one_logit_is_refused_too(loss: Any) -> None:
    x, y = batch()
    for labels in (torch.zeros_like(y), torch.rand(6, 1, dtype=torch.float64)):
        with pytest.raises(ValueError, match="one logit a sample, and a softmax over one class is 1"):
            PenalizedLoss(DensityPenalty(), loss=loss)(one_logit(), x, labels)


def test_where_no_softmax_is_taken_one_logit_is_welcome() -> None:
    model, (x, y) = one_logit(), batch()
    zeros = torch.zeros_like(y)
    assert JacobianPenalty()(model, x) > 0
    assert InputGradientPenalty(of="target_logit")(model, x, zeros) > 0
    assert rds_fast.integrated_gradients(model, x, zeros, 0.0, of="target_logit").abs().sum() > 0


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (nn.CrossEntropyLoss, TypeError, r"loss is <class .*; it must be a callable of \(logits, y\)"),
        ("focal", TypeError, "loss is 'focal'"),
        (nn.CrossEntropyLoss(), ValueError, r"with reduction='mean'; PenalizedLoss needs the loss of each sample"),
        (
            lambda f, y: F.cross_entropy(f, y),
            ValueError,
            r"the loss returned a tensor of shape \(\) and torch\.float64",
        ),
        (
            lambda f, y: f.square(),
            ValueError,
            r"shape \(6, 5\) .* logits of shape \(6, 5\); it must return the loss of",
        ),
        (lambda f, y: f.argmax(1), ValueError, r"shape \(6,\) and torch\.int64"),
        (lambda f, y: None, ValueError, "the loss returned NoneType"),
    ],
)
def test_losses_that_are_none(loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PenalizedLoss(DensityPenalty(), loss=loss)(mlp(), *batch())


def test_label_smoothing_beside_a_loss() -> None:
    with pytest.raises(
        ValueError, match=r"label_smoothing is 0\.1 beside a loss of your own, which it would not change"
    ):
        PenalizedLoss(DensityPenalty(), loss=focal, label_smoothing=0.1)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("labels", ["indices", "ignored"])
def test_class_weights_are_pytorchs(labels: str, fast: bool) -> None:
    """Σ w ℓ / Σ w over the samples that count, with w the weight of the class; the penalty's mean is weighted alike."""
    model, (x, y) = cnn(training=False), batch()
    weight = CLASS_WEIGHTS[y]
    if labels == "ignored":
        y[2] = -100
    x.requires_grad_()
    terms = PenalizedLoss(DensityPenalty(), 0.7, fast=fast)(model, x, y, sample_weight=weight)
    truth = F.cross_entropy(model(x), y, weight=CLASS_WEIGHTS)
    torch.testing.assert_close(terms.cross_entropy, truth)
    penalty = (references.eager_density(model, x) * weight).sum() / weight.sum()
    torch.testing.assert_close(terms.penalty, penalty)
    assert_same_gradients(gradients(terms.total, model, x), gradients(truth + 0.7 * penalty, model, x))
    skipped = PenalizedLoss(DensityPenalty(), every=2, fast=fast)(model, x, y, 1, sample_weight=weight)
    torch.testing.assert_close(skipped.total, truth)


@pytest.mark.parametrize("loss", [None, focal])
@pytest.mark.parametrize("penalty", [DensityPenalty(), InputGradientPenalty(), JacobianPenalty(projections=None)])
def test_a_weight_is_a_count(penalty: Any, loss: Any) -> None:
    """A sample of weight 2 is as if it were there twice, one of weight 0 as if it were not."""
    model, (x, y) = mlp(), batch()
    repeated = torch.tensor([0, 2, 2, 3, 4, 4, 4, 5])
    counts = repeated.bincount(minlength=6).double()
    criterion = PenalizedLoss(penalty, 0.7, loss=loss)
    weighted = criterion(model, x, y, sample_weight=counts)
    expected = criterion(model, x[repeated], y[repeated])
    for ours, truth in zip(weighted[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, truth)
    assert_same_gradients(gradients(weighted.total, model), gradients(expected.total, model))


@pytest.mark.parametrize("network", ["mlp", "cnn-train"])
def test_a_weighted_share_is_unbiased(network: str) -> None:
    """The mean of the penalty over all pairs of 4 samples is that of the whole batch."""
    model, (x, y) = NETWORKS[network](), batch(samples=4)
    weight = torch.tensor([1.0, 5.0, 0.5, 2.0], dtype=torch.float64)
    seen: list[Tensor] = []

    def of_labels(shared: SharedForward) -> Tensor:
        """A number of each sample, whatever else is in the batch."""
        seen.append(shared.x)
        return shared.x.flatten(1).norm(dim=1)

    loss = PenalizedLoss(of_labels, share=0.5, generator=torch.Generator().manual_seed(0))
    found: dict[tuple[int, ...], Tensor] = {}
    while len(found) < len(list(combinations(range(4), 2))):
        terms = loss(model, x, y, sample_weight=weight)
        drawn = tuple(sorted(int((x == row).flatten(1).all(1).nonzero()) for row in seen[-1]))
        found[drawn] = terms.penalty
        torch.testing.assert_close(
            terms.cross_entropy, (F.cross_entropy(model(x), y, reduction="none") * weight).sum() / weight.sum()
        )
    truth = PenalizedLoss(of_labels)(model, x, y, sample_weight=weight).penalty
    torch.testing.assert_close(torch.stack(list(found.values())).mean(), truth)


def test_a_weight_does_not_change_the_losses_precision() -> None:
    model, (x, y) = mlp(torch.float32), batch(torch.float32)
    terms = PenalizedLoss(DensityPenalty())(model, x, y, sample_weight=torch.ones(6, dtype=torch.float64))
    assert [term.dtype for term in terms] == [torch.float32] * 4
    torch.testing.assert_close(terms.total, PenalizedLoss(DensityPenalty())(model, x, y).total)


def test_the_losses_under_attack_are_weighted() -> None:
    model, (x, y) = mlp(), batch()
    weight = torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, 0.0])
    for loss in (
        AdversarialLoss(0.1, bounds=(-9.0, 9.0)),
        RobustAttributionLoss(0.5, 0.1, path_steps=2, attack_steps=1, bounds=(-9.0, 9.0)),
    ):
        terms = loss(model, x, y, sample_weight=weight)
        torch.testing.assert_close(terms.cross_entropy, F.cross_entropy(terms.logits[2:3], y[2:3]))
        torch.testing.assert_close(terms.total, terms.cross_entropy + 0.5 * terms.penalty)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(5), ValueError, r"sample_weight has shape \(5,\); it must be \(6,\), a weight of each sample"),
        (torch.ones(6, 1), ValueError, r"sample_weight has shape \(6, 1\)"),
        (torch.ones(6, dtype=torch.int64), TypeError, r"sample_weight is torch\.int64; .* such as weight\.float\(\)"),
        ([1.0] * 6, TypeError, "sample_weight is a list; it must be a floating-point torch.Tensor"),
        (-torch.ones(6), ValueError, "sample_weight holds a negative number or NaN"),
        (torch.full((6,), math.nan), ValueError, "sample_weight holds a negative number or NaN"),
        (torch.ones(6, device="meta"), ValueError, "sample_weight is on meta and x on cpu; move one to the other's"),
    ],
)
def test_wrong_weights(weight: Any, error: type[Exception], message: str) -> None:
    for loss in (
        PenalizedLoss(DensityPenalty()),
        AdversarialLoss(0.1, bounds=(-9.0, 9.0)),
        RobustAttributionLoss(0.5, 0.1, bounds=(-9.0, 9.0)),
    ):
        with pytest.raises(error, match=message):
            loss(mlp(), *batch(), sample_weight=weight)


def test_an_accuracy_budget_of_one_logit() -> None:
    model, (x, y) = one_logit(), batch()
    budget = AccuracyBudget(0.9)
    terms = PenalizedLoss(DensityPenalty(), budget, loss=BinaryCrossEntropy())(model, x, y % 2, step=0)
    with pytest.raises(ValueError, match="the accuracy of one logit a sample is not known here"):
        budget.update(terms, y % 2)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_small_binary_loss_keeps_its_precision(label: float) -> None:
    """log(1 + exp f) − f is 0 in float32 from 17 on, where the loss is not."""
    logits = torch.tensor([[20.0 if label else -20.0]], requires_grad=True)
    loss = BinaryCrossEntropy()(logits, torch.tensor([label]))
    torch.testing.assert_close(loss, torch.tensor([20.0]).neg().exp().log1p())
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert abs(gradient.item()) == pytest.approx(math.exp(-20.0), rel=1e-5)


def test_sums_of_16_bit_weights_and_losses_do_not_overflow() -> None:
    model, (x, y) = mlp(), batch()
    loss = PenalizedLoss(DensityPenalty())
    truth, terms = loss(model, x, y), loss(model, x, y, sample_weight=torch.full((6,), 3e4, dtype=torch.float16))
    torch.testing.assert_close(terms.total, truth.total)
    logits = torch.tensor([[0.0, 100.0]], dtype=torch.float16).expand(1000, 2)
    terms = PenalizedLoss(lambda shared: shared.loss)(lambda x: x, logits, torch.zeros(1000, dtype=torch.int64))
    assert terms.cross_entropy == 100.0


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_several_labels_a_sample_are_cut_with_a_share() -> None:
    """As mixing samples has them: two labels and how much there is of each."""
    model, (x, y) = mlp(), batch()
    mixed = {"labels": Pair(y, y.flip(0)), "part": torch.rand(6, dtype=torch.float64)}

    def loss(logits: Tensor, y: Any) -> Tensor:
        first, second = (
            F.cross_entropy(logits, labels, reduction="none") for labels in (y["labels"].first, y["labels"].second)
        )
        return y["part"] * first + (1 - y["part"]) * second

    terms = PenalizedLoss(InputGradientPenalty(), loss=loss, share=0.5)(model, x, mixed)
    torch.testing.assert_close(terms.cross_entropy, loss(model(x), mixed).mean())
    with pytest.raises(ValueError, match="y has type list; it must have a row for each of the 6 samples of x"):
        PenalizedLoss(InputGradientPenalty(), loss=loss, share=0.5)(model, x, [mixed])
