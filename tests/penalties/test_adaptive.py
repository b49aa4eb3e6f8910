"""Adaptive weights: their rules by hand, the targets that they hold in training, and their state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from penalty_references import CLASSES, batch, gradients, mlp
from torch import Tensor, nn

import rds_fast
from rds_fast.penalties.adaptive import AccuracyBudget, PenaltyRatio
from rds_fast.penalties.density import DensityPenalty
from rds_fast.penalties.input_gradient import InputGradientPenalty
from rds_fast.penalties.loss import LossTerms, PenalizedLoss
from rds_fast.penalties.schedules import LinearWarmup


def terms(cross_entropy: float, penalty: float, logits: Tensor | None = None) -> LossTerms:
    return LossTerms(
        torch.tensor(cross_entropy + penalty, requires_grad=True),
        torch.tensor(cross_entropy, requires_grad=True),
        torch.tensor(penalty, requires_grad=True),
        torch.zeros(2, CLASSES) if logits is None else logits,
    )


def test_ratio_by_hand() -> None:
    weight = PenaltyRatio(0.5, initial=0.2, decay=0.9, bounds=(0.01, 10.0))
    assert weight(0).item() == pytest.approx(0.2)
    weight.update(terms(2.0, 4.0))
    assert weight(1).item() == pytest.approx(0.5 * 2.0 / 4.0)  # with one value the start at 0 does not matter
    weight.update(terms(1.0, 0.0))
    mean_ce, mean_penalty = 0.9 * 0.1 * 2.0 + 0.1 * 1.0, 0.9 * 0.1 * 4.0
    assert weight(2).item() == pytest.approx(0.5 * mean_ce / mean_penalty)
    assert weight(2).dim() == 0
    assert not weight(2).requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_passed_over(bad: float) -> None:
    ratio, budget = PenaltyRatio(0.5), AccuracyBudget(1.0, of="cross_entropy")
    y = torch.zeros(2, dtype=torch.int64)
    for weight in (ratio, budget):
        weight.update(terms(2.0, 4.0), y)
        before = weight(1).item()
        weight.update(terms(bad, 1.0), y)
        assert weight(2).item() == before
    before = ratio(2).item()
    ratio.update(terms(1.0, bad))
    assert ratio(3).item() == before


def test_ratio_within_its_bounds_and_without_penalty() -> None:
    weight = PenaltyRatio(1.0, initial=0.2, decay=0.0, bounds=(0.1, 10.0))
    for cross_entropy, penalty, expected in ((1.0, 1e-3, 10.0), (1e-3, 1.0, 0.1), (1.0, 0.0, 0.2), (0.0, 0.0, 0.2)):
        weight.update(terms(cross_entropy, penalty))
        assert weight(0).item() == pytest.approx(expected)


def test_budget_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 2.0], [1.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    y = torch.tensor([0, 1, 0, -100])  # two of three right, the last does not count
    weight = AccuracyBudget(0.9, rate=0.5, initial=0.2)
    weight.update(terms(1.0, 1.0, logits), y)
    assert weight(1).item() == pytest.approx(0.2 * math.exp(0.5 * (2 / 3 - 0.9)))
    by_probabilities = AccuracyBudget(0.9, rate=0.5, initial=0.2)
    by_probabilities.update(terms(1.0, 1.0, logits[:3]), nn.functional.one_hot(y[:3], 3) * 0.8 + 0.1)
    assert by_probabilities(1).item() == weight(1).item()
    before = weight(1).item()
    weight.update(terms(1.0, 1.0, logits), torch.full((4,), -100))  # none counts
    assert weight(1).item() == before
    weight.observe(0.95)
    assert weight(2).item() == pytest.approx(before * math.exp(0.5 * 0.05))
    weight.observe(torch.tensor(0.95, dtype=torch.float64))
    assert weight(3).item() == pytest.approx(before * math.exp(0.5 * 0.1))
    loss = AccuracyBudget(0.5, of="cross_entropy", rate=0.1, initial=0.2)
    loss.update(terms(0.7, 1.0), y)
    assert loss(1).item() == pytest.approx(0.2 * math.exp(-0.1 * 0.2))
    assert not loss(1).requires_grad


def test_budget_does_not_wind_up() -> None:
    """However long the target was out of reach, one step back inside moves the weight off its bound."""
    weight = AccuracyBudget(0.5, rate=1.0, bounds=(0.01, 2.0))
    for _ in range(100):
        weight.observe(1.0)
    assert weight(0).item() == pytest.approx(2.0)
    weight.observe(0.4)
    assert weight(0).item() == pytest.approx(2.0 * math.exp(-0.1))
    for _ in range(100):
        weight.observe(0.0)
    assert weight(0).item() == pytest.approx(0.01)


class Waves(nn.Module):
    """64 fixed cosines of a number, steep enough for the narrowest stripe."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.frequency = 25 * torch.randn(1, 64, generator=generator)
        self.phase = 2 * math.pi * torch.rand(64, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x @ self.frequency + self.phase)


def stripes(generator: torch.Generator, noise: float) -> tuple[Tensor, Tensor]:
    """Numbers in [0, 1] in stripes of two classes, ever narrower: the smoother the classifier, the fewer it keeps.

    The share ``noise`` of the labels is wrong.
    """
    x = torch.rand(128, 1, generator=generator)
    y = torch.bucketize(x[:, 0], torch.tensor([0.4, 0.7, 0.85, 0.92, 0.97])) % 2
    return x, torch.where(torch.rand(128, generator=generator) < noise, 1 - y, y)


PENALTY = InputGradientPenalty(of="target_logit", power=2)


def test_the_step_is_needed_and_asked_for_before_anything_runs() -> None:
    """A weight that adapts is a schedule, which only ignores the step."""
    for weight in (PenaltyRatio(0.1), AccuracyBudget(0.9)):
        with pytest.raises(
            ValueError, match=r"weight is a schedule \(\w+\(.*step was not given; call loss\(model, x, y"
        ):
            PenalizedLoss(PENALTY, weight)(lambda x: 1 / 0, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


def train(loss: PenalizedLoss, steps: int, noise: float = 0.0) -> Tensor:
    """Cross-entropy, penalty, accuracy and weight of each step, (steps, 4), each step on new samples."""
    torch.manual_seed(0)
    model, generator = nn.Sequential(Waves(), nn.Linear(64, 2)), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    history = []
    for step in range(steps):
        x, y = stripes(generator, noise)
        optimizer.zero_grad()
        weight = loss.weight(step)
        step_terms = loss(model, x, y, step)
        step_terms.total.backward()
        optimizer.step()
        loss.weight.update(step_terms, y)
        accuracy = (step_terms.logits.argmax(1) == y).float().mean()
        history.append(torch.stack([*step_terms[1:3], accuracy, weight]).detach())
    return torch.stack(history)


@pytest.mark.parametrize("initial", [1e-5, 1e-2])
@pytest.mark.parametrize("options", [{}, {"share": 0.5}, {"every": 4}], ids=["whole", "share", "every"])
def test_ratio_holds_in_training(options: dict[str, Any], initial: float) -> None:
    weight = PenaltyRatio(0.1, initial=initial, decay=0.95, bounds=(1e-7, 10.0))
    generator = torch.Generator().manual_seed(2)
    history = train(PenalizedLoss(PENALTY, weight, generator=generator, **options), 500, noise=0.1)[250:]
    cross_entropy, penalty, _, weights = history.unbind(1)
    assert ((weights * penalty).sum() / cross_entropy.sum()).item() == pytest.approx(0.1, rel=0.1)
    assert 1e-4 < weights.min() < weights.max() < 1e-3  # neither the initial weights nor the bounds


@pytest.mark.parametrize("initial", [1e-4, 1.0])
@pytest.mark.parametrize(("of", "target", "rate"), [("accuracy", 0.9, 0.3), ("cross_entropy", 0.22, 0.6)])
def test_budget_holds_in_training(of: str, target: float, rate: float, initial: float) -> None:
    """From a weight far too small and from one far too large; a weight of 0.01 is what the targets take."""
    weight = AccuracyBudget(target, of=of, rate=rate, initial=initial, bounds=(1e-6, 10.0))
    history = train(PenalizedLoss(PENALTY, weight), 900)
    value = history[-350:, 2 if of == "accuracy" else 0].mean().item()
    assert value == pytest.approx(target, abs=0.015)
    assert 1e-3 < weight(0).item() < 0.1


@pytest.mark.parametrize("make", [lambda: PenaltyRatio(0.3), lambda: AccuracyBudget(0.8, rate=0.3)])
def test_a_resumed_run_has_the_same_bits(make: Callable[[], PenaltyRatio | AccuracyBudget]) -> None:
    """With the generator of the drawn samples, through a file."""
    x, y = batch(torch.float32)

    def fresh() -> tuple[PenalizedLoss, nn.Module]:
        loss = PenalizedLoss(DensityPenalty(), make(), every=2, share=0.5, generator=torch.Generator().manual_seed(3))
        return loss, mlp(torch.float32)

    def run(loss: PenalizedLoss, model: nn.Module, steps: range) -> None:
        for step in steps:
            step_terms = loss(model, x, y, step)
            for parameter, gradient in zip(model.parameters(), gradients(step_terms.total, model), strict=True):
                parameter.data -= 0.1 * gradient
            loss.weight.update(step_terms, y)

    straight, model = fresh()
    run(straight, model, range(6))
    first, first_model = fresh()
    run(first, first_model, range(3))
    file = io.BytesIO()
    state = {"weight": first.weight.state_dict(), "generator": first.generator.get_state()}
    torch.save({**state, "model": first_model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second, second_model = fresh()
    second.weight.load_state_dict(saved["weight"])
    second.generator.set_state(saved["generator"])
    second_model.load_state_dict(saved["model"])
    run(second, second_model, range(3, 6))
    assert torch.equal(second.weight(6), straight.weight(6))
    assert not torch.equal(second.weight(6), first.weight(3))
    for resumed, expected in zip(second_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(resumed, expected)


def test_state_is_a_snapshot() -> None:
    for weight in (PenaltyRatio(0.3), AccuracyBudget(0.8)):
        (state,) = weight.state_dict().values()
        before = state.clone()
        weight.update(terms(2.0, 3.0), torch.zeros(2, dtype=torch.int64))
        assert torch.equal(state, before)


def test_warm_up_before_an_adaptive_weight() -> None:
    weight = AccuracyBudget(0.8, initial=0.4)
    loss = PenalizedLoss(DensityPenalty(), LinearWarmup(weight, 4))
    model, (x, y) = mlp(), batch()
    step_terms = loss(model, x, y, 1)
    torch.testing.assert_close(step_terms.total, step_terms.cross_entropy + 0.1 * step_terms.penalty)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PenaltyRatio(0), ValueError, r"ratio is 0; it must be positive and finite"),
        (lambda: PenaltyRatio(0.1, decay=1.0), ValueError, r"decay is 1\.0; it must be in \[0, 1\)"),
        (lambda: PenaltyRatio(torch.tensor(0.1)), TypeError, "ratio is a Tensor; it must be a Python number"),
        (lambda: PenaltyRatio(0.1, bounds=(0.0, 1.0)), ValueError, r"bounds are \(0\.0, 1\.0\); they must be positive"),
        (
            lambda: PenaltyRatio(0.1, bounds=(2.0, 1.0)),
            ValueError,
            r"bounds are \(2\.0, 1\.0\); .*first below the second",
        ),
        (lambda: PenaltyRatio(0.1, initial=1e4), ValueError, r"initial is 10000\.0; it must lie within the bounds"),
        (lambda: AccuracyBudget(90), ValueError, "target is 90; the target of the accuracy must be between 0 and 1"),
        (lambda: AccuracyBudget(0, of="cross_entropy"), ValueError, "target is 0; .* cross_entropy must be positive"),
        (lambda: AccuracyBudget(0.9, of="loss"), ValueError, "of is 'loss'; it must be one of 'accuracy', 'cross_ent"),
        (lambda: AccuracyBudget(0.9, rate=0), ValueError, "rate is 0; it must be positive and finite"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(2)}, {"weight": 0.1}, PenaltyRatio(0.3).state_dict()])
def test_a_state_of_something_else(state: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"the state has the entries \[.*it must have 'weight' alone, a tensor of shape"
    ):
        AccuracyBudget(0.9).load_state_dict(state)


def test_numbers_of_numpy_and_the_public_names() -> None:
    for number in (np.float32(0.5), np.float64(0.5)):
        ratio, budget = rds_fast.PenaltyRatio(number, initial=number), rds_fast.AccuracyBudget(number, rate=number)
        for weight in (ratio, budget):
            weight.update(terms(2.0, 4.0), torch.zeros(2, dtype=torch.int64))
            assert isinstance(weight(1), Tensor)
    assert repr(PenaltyRatio(0.3)) == "PenaltyRatio(ratio=0.3, initial=0.1, decay=0.99, bounds=(0.0001, 1000.0))"
