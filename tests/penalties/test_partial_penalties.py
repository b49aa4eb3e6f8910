"""A penalty at every k-th step and on a share of the batch: unbiased, right in its gradients, and as cheap as said."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import penalty_references as references
import pytest
import torch
from penalty_references import CLASSES, NETWORKS, assert_same_gradients, batch, cnn, gradients, mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.counting import Count, Traffic
from rds_fast.nn import fuse
from rds_fast.penalties.density import DensityPenalty
from rds_fast.penalties.input_gradient import InputGradientPenalty
from rds_fast.penalties.jacobian import JacobianPenalty
from rds_fast.penalties.loss import PenalizedLoss
from rds_fast.penalties.matching import GradientMatchingPenalty
from rds_fast.penalties.model_state import samples_interact
from rds_fast.penalties.shared import Penalty, SharedForward
from rds_fast.training.normalization import NormalizedModel


@dataclass(frozen=True, kw_only=True)
class Recording(InputGradientPenalty):
    """Remembers the inputs that it was given."""

    seen: list[Tensor] = field(default_factory=list)

    def per_sample(self, shared: SharedForward) -> Tensor:
        self.seen.append(shared.x)
        return super().per_sample(shared)


class OfLogits(Penalty):
    """A penalty that is none of a gradient."""

    def per_sample(self, shared: SharedForward) -> Tensor:
        return shared.logits.square().mean(1)


class ForwardOfItsOwn(Penalty):
    """One that takes nothing from the shared forward."""

    def per_sample(self, shared: SharedForward) -> Tensor:
        return shared.logits_at(shared.x).square().mean(1)


def rows_of(part: Tensor, whole: Tensor) -> tuple[int, ...]:
    """Which rows of ``whole`` those of ``part`` are."""
    return tuple(sorted(int((whole == row).flatten(1).all(1).nonzero()) for row in part))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_is_unbiased_over_its_steps(network: str) -> None:
    model, (x, y) = NETWORKS[network](), batch()
    loss, whole = PenalizedLoss(DensityPenalty(), 0.7, every=3), PenalizedLoss(DensityPenalty(), 0.7)
    terms = [loss(model, x, y, step) for step in range(3, 6)]
    mean = [torch.stack(parts).mean(0) for parts in zip(*(gradients(t.total, model) for t in terms), strict=True)]
    truth = whole(model, x, y)
    assert_same_gradients(mean, gradients(truth.total, model), 1e-12)
    torch.testing.assert_close(terms[0].penalty, 3 * truth.penalty)
    torch.testing.assert_close(terms[0].total, terms[0].cross_entropy + 0.7 * terms[0].penalty)
    for skipped in terms[1:]:
        assert skipped.penalty == 0
        assert skipped.penalty.dtype == terms[0].penalty.dtype
        assert skipped.total is skipped.cross_entropy
        torch.testing.assert_close(skipped.logits, terms[0].logits)
        torch.testing.assert_close(skipped.cross_entropy, truth.cross_entropy)


def test_every_needs_the_step() -> None:
    model, (x, y) = mlp(), batch()
    with pytest.raises(ValueError, match=r"every is 2 and step was not given; call loss\(model, x, y, step=step\)"):
        PenalizedLoss(DensityPenalty(), every=2)(model, x, y)
    assert PenalizedLoss(DensityPenalty(), 0.0, every=2)(model, x, y, 4).penalty > 0  # reported, at weight 0 too


@pytest.mark.parametrize("network", ["mlp", "cnn-train"])
def test_the_subset_is_uniform(network: str) -> None:
    """All 6 pairs of 4 samples, each within 4 standard deviations of a sixth of the draws."""
    model, (x, y), draws = NETWORKS[network](), batch(samples=4), 180
    penalty = Recording()
    loss = PenalizedLoss(penalty, share=0.5, generator=torch.Generator().manual_seed(0))
    for _ in range(draws):
        loss(model, x, y)
    counts = Counter(rows_of(part, x) for part in penalty.seen)
    assert set(counts) == set(combinations(range(4), 2))
    deviation = (draws * 1 / 6 * 5 / 6) ** 0.5
    assert all(abs(count - draws / 6) < 4 * deviation for count in counts.values())


def all_subsets(loss: PenalizedLoss, model: nn.Module, x: Tensor, y: Tensor, drawn: int) -> list[list[Tensor]]:
    """The gradients of the total for each subset, each once; drawn until none is missing."""
    found: dict[tuple[int, ...], list[Tensor]] = {}
    wanted = set(combinations(range(len(x)), drawn))
    for _ in range(40 * len(wanted)):
        total = loss(model, x, y).total
        found.setdefault(rows_of(loss.penalty.seen[-1], x), gradients(total, model))
        if set(found) == wanted:
            return list(found.values())
    raise AssertionError(f"never drawn: {wanted - set(found)}")


@pytest.mark.parametrize("labels", ["indices", "ignored", "probabilities"])
@pytest.mark.parametrize("network", ["mlp", "cnn-eval"])
def test_the_mean_over_all_subsets_is_the_whole(network: str, labels: str) -> None:
    model, (x, y) = NETWORKS[network](), batch(samples=4)
    if labels == "ignored":
        y[1] = -100
    elif labels == "probabilities":
        y = torch.rand(4, CLASSES, dtype=torch.float64).softmax(1)
    loss = PenalizedLoss(Recording(), 0.7, share=0.5, label_smoothing=0.1, generator=torch.Generator().manual_seed(1))
    each = all_subsets(loss, model, x, y, 2)
    mean = [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)]
    truth = PenalizedLoss(InputGradientPenalty(), 0.7, label_smoothing=0.1)(model, x, y).total
    assert_same_gradients(mean, gradients(truth, model), 1e-12)


PENALTIES = {
    "density": (DensityPenalty(), 2),
    "finite difference": (DensityPenalty(method="finite_difference"), 3),
    "jacobian": (JacobianPenalty(projections=None), 2),
    "matching": (GradientMatchingPenalty(mlp(seed=4)), 2),
    "of logits": (OfLogits(), 2),
    "own forward": (ForwardOfItsOwn(), 3),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("network", NETWORKS)
def test_one_draw(network: str, name: str) -> None:
    """Its cross-entropy is the batch's, its penalty that of the samples drawn, its logits in the order of x.

    The other forward is of the samples left, or of all where batch norm couples them; the penalty's is of those drawn.
    """
    penalty, forwards = PENALTIES[name]
    model, (x, y) = NETWORKS[network](), batch()
    y[2] = -100
    seen = torch.randperm(6, generator=torch.Generator().manual_seed(5))[:2]
    reference = copy.deepcopy(model)
    terms_whole = gradients_of_total(reference, penalty, x, y, seen)
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda module, arguments, output: sizes.append(len(output)))
    generator = torch.Generator().manual_seed(5)
    terms = PenalizedLoss(penalty, 0.7, share=1 / 3, label_smoothing=0.1, generator=generator)(model, x, y)
    handle.remove()
    if network == "cnn-train":
        assert sizes == [6] + [2] * (1 if name == "own forward" else forwards - 1)
    else:
        assert sizes == [2] * (forwards - 1) + [4]
    assert_same_gradients(gradients(terms.total, model), terms_whole)
    torch.testing.assert_close(terms.cross_entropy, cross_entropy(reference(x), y, label_smoothing=0.1))
    torch.testing.assert_close(terms.logits, reference(x))
    torch.testing.assert_close(terms.penalty, penalty(reference, x[seen], y[seen]))


def gradients_of_total(model: nn.Module, penalty: Any, x: Tensor, y: Tensor, seen: Tensor) -> list[Tensor]:
    plain = gradients(cross_entropy(model(x), y, label_smoothing=0.1), model)
    return [a + 0.7 * b for a, b in zip(plain, gradients(penalty(model, x[seen], y[seen]), model), strict=True)]


@pytest.mark.parametrize("penalty", [DensityPenalty(), OfLogits(), ForwardOfItsOwn()], ids=["density", "logits", "own"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_running_statistics_move_once(penalty: Any, share: float) -> None:
    """By the whole batch, as in a plain step."""
    model, (x, y) = cnn(training=True), batch()
    plain = copy.deepcopy(model)
    plain(x)
    PenalizedLoss(penalty, share=share)(model, x, y).total.backward()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("training", [True, False])
def test_a_fused_model(training: bool) -> None:
    """Has the gradients and the running statistics of its original."""
    model, (x, y) = cnn(training=training, activation=nn.ReLU), batch()
    fused = fuse(model)
    results = []
    for one in (model, fused):
        loss = PenalizedLoss(DensityPenalty(), 0.7, share=0.5, generator=torch.Generator().manual_seed(5))
        results.append(gradients(loss(one, x, y).total, one))
    assert_same_gradients(results[1], results[0])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, fused.state_dict()[name])


def test_gradient_with_respect_to_x() -> None:
    model, (x, y) = mlp(), batch()
    x.requires_grad_()
    seen = torch.randperm(6, generator=torch.Generator().manual_seed(5))[:3]
    ours = PenalizedLoss(DensityPenalty(), 0.7, share=0.5, generator=torch.Generator().manual_seed(5))(model, x, y)
    truth = cross_entropy(model(x), y) + 0.7 * references.eager_density(model, x)[seen].mean()
    assert_same_gradients(gradients(ours.total, model, x), gradients(truth, model, x))


@pytest.mark.parametrize(("share", "drawn"), [(1e-9, 1), (0.2, 1), (0.25, 2), (0.7, 4), (0.99, 6), (1, 6)])
def test_number_of_samples(share: float, drawn: int) -> None:
    """max(1, round(share · 6)), halves to even."""
    penalty = Recording()
    PenalizedLoss(penalty, share=share)(mlp(), *batch())
    assert [len(part) for part in penalty.seen] == [drawn]


def test_the_drawn_samples_follow_from_the_generator() -> None:
    """From PyTorch's own where none is given; nothing is drawn for a whole batch or a step without penalty."""
    model, (x, y) = mlp(), batch()
    state = torch.get_rng_state()
    for loss, step in (
        (PenalizedLoss(DensityPenalty(), share=0.5, every=2), 1),
        (PenalizedLoss(DensityPenalty()), 0),
        (PenalizedLoss(DensityPenalty(), share=0.5, generator=torch.Generator()), 0),
    ):
        loss(model, x, y, step)
        assert torch.equal(torch.get_rng_state(), state)
    loss = PenalizedLoss(DensityPenalty(), share=0.5)
    first = loss(model, x, y)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert torch.equal(loss(model, x, y).total, first.total)


def test_channels_last_inputs_stay_so() -> None:
    penalty = Recording()
    x, y = batch()
    PenalizedLoss(penalty, share=0.5)(mlp(), x.contiguous(memory_format=torch.channels_last), y)
    assert penalty.seen[0].is_contiguous(memory_format=torch.channels_last)


def test_errors() -> None:
    model, (x, y) = mlp(), batch()
    loss = PenalizedLoss(DensityPenalty(), share=0.5)
    with pytest.raises(ValueError, match=r"y has shape \(5,\); it must have a row for each of the 6 samples of x"):
        loss(model, x, y[:5])
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"gradients disabled \(torch\.no_grad\)"):
        loss(model, x, y)
    with pytest.raises(TypeError, match=r"the model is a NoneType"):
        loss(None, x, y)
    with pytest.raises(TypeError, match=r"returned a tensor of shape \(3, 5\); it must return the penalty of each"):
        PenalizedLoss(lambda shared: shared.logits, share=0.5)(model, x, y)
    empty = loss(model, x[:0], y[:0])
    assert empty.total.isnan()  # as the mean of nothing is in PyTorch


def test_where_samples_interact() -> None:
    norm = nn.BatchNorm1d(3)
    assert samples_interact(nn.Sequential(norm))
    assert not samples_interact(nn.Sequential(norm).eval())
    assert samples_interact(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval())
    assert not samples_interact(nn.Sequential(nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm1d(3), nn.Dropout()))
    assert samples_interact(nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True)))  # which moves once a step
    normalized = NormalizedModel(nn.Linear(3, 2), torch.zeros(1), torch.ones(1))
    assert not samples_interact(normalized.train())  # whose buffers no forward moves
    assert samples_interact(lambda x: x)  # cannot be looked into


def test_a_spectral_norm_iterates_once_a_step() -> None:
    x, y = batch()
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(x[0].numel(), CLASSES)))
    alone = copy.deepcopy(model.to(x.dtype))
    alone(x)
    PenalizedLoss(DensityPenalty(), share=0.5)(model, x, y)
    torch.testing.assert_close(dict(model.named_buffers()), dict(alone.named_buffers()), rtol=0, atol=0)


def convolutions(norm: bool) -> nn.Module:
    norms = [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.Softplus(), nn.Flatten(), nn.Linear(144, CLASSES)).to("meta")


def count(loss: PenalizedLoss, model: nn.Module, steps: range) -> Count:
    x, y = torch.empty(8, 3, 8, 8, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    with Traffic() as traffic:
        for step in steps:
            model.zero_grad()
            loss(model, x, y, step).total.backward()
    return traffic.total


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("coupled", [False, True])
def test_cost_of_a_share(share: float, coupled: bool) -> None:
    """(1 − s) of a plain step and s of a penalised one; with batch norm all of a plain one, and s besides."""
    model = convolutions(coupled)
    plain = count(PenalizedLoss(DensityPenalty(), every=2), model, range(1, 2)).flops
    penalised = count(PenalizedLoss(DensityPenalty()), model, range(1)).flops
    ours = count(PenalizedLoss(DensityPenalty(), share=share), model, range(1)).flops
    assert penalised > 1.9 * plain
    assert ours == (plain if coupled else (1 - share) * plain) + share * penalised


@pytest.mark.parametrize("coupled", [False, True])
def test_cost_of_every(coupled: bool) -> None:
    """k − 1 plain steps, which run no operation more than a plain step of one's own, and one penalised."""
    model = convolutions(coupled)
    lazy = PenalizedLoss(DensityPenalty(), every=4)
    skipped, applied = count(lazy, model, range(1, 2)), count(lazy, model, range(1))
    assert count(lazy, model, range(4)) == Count(*(3 * a + b for a, b in zip(skipped, applied, strict=True)))
    always = count(PenalizedLoss(DensityPenalty()), model, range(1))
    assert applied.flops == always.flops
    assert applied.operations == always.operations + 2  # times k, and back
    x, y = torch.empty(8, 3, 8, 8, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    model.zero_grad()
    with Traffic() as plain:
        cross_entropy(model(x), y).backward()
    assert skipped.flops == plain.total.flops
    assert skipped.operations == plain.total.operations + 5  # the mean over labels that count, and the penalty's 0
