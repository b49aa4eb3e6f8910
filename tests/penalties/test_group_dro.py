"""Group DRO: its weights by the update written out, its gradient, its state, and the game that it plays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from penalty_references import assert_same_gradients, batch, gradients, mlp
from torch import nn
from torch.nn import functional as F

from rds_fast import AccuracyBudget, DensityPenalty, GroupDRO, PenalizedLoss
from rds_fast.penalties.loss import LossTerms

GROUPS = torch.tensor([0, 2, 0, 2, 2, 1])


def terms_of(logits: torch.Tensor) -> LossTerms:
    return LossTerms(logits.sum(), logits.sum(), logits.sum(), logits)


def test_the_loss_is_of_the_groups_means() -> None:
    """Σ q_g ℓ_g / Σ q_g over the groups that are there, at any q, and the same of the penalty."""
    model, (x, y) = mlp(), batch()
    dro = GroupDRO([9, 4, 7, 2])
    dro.load_state_dict({"log_weights": torch.tensor([0.1, 0.4, 0.3, 0.2]).log()})
    terms = PenalizedLoss(DensityPenalty(), 0.7)(model, x, y, sample_weight=dro(GROUPS))
    losses, penalties = F.cross_entropy(model(x), y, reduction="none"), []
    penalties = torch.stack([DensityPenalty()(model, x[n : n + 1]) for n in range(6)])
    q = dro.weights.double()
    expected = [
        sum(q[group] * each[group == GROUPS].mean() for group in range(3)) / q[:3].sum() for each in (losses, penalties)
    ]
    torch.testing.assert_close(terms.cross_entropy, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(terms.penalty, expected[1], rtol=1e-6, atol=0)
    truth = gradients(expected[0] + 0.7 * expected[1], model)
    assert_same_gradients(gradients(terms.total, model), truth, 1e-6)


@pytest.mark.parametrize("adjustment", [0.0, 2.0])
def test_the_update(adjustment: float) -> None:
    sizes, eta = [9, 4, 7, 2], 0.1
    dro = GroupDRO(sizes, step_size=eta, adjustment=adjustment)
    q = [0.25] * 4
    for seed in range(3):
        logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
        _, y = batch()
        dro.update(terms_of(logits), y, GROUPS)
        losses = F.cross_entropy(logits, y, reduction="none")
        for group in range(3):  # the last is in no batch: only the normalisation moves it
            q[group] *= math.exp(eta * (losses[group == GROUPS].mean().item() + adjustment / math.sqrt(sizes[group])))
        q = [weight / sum(q) for weight in q]
        torch.testing.assert_close(dro.weights, torch.tensor(q))


def test_a_loss_of_ones_own_compares_the_groups() -> None:
    logits, (_, y) = torch.randn(6, 5), batch()
    dro = GroupDRO([1, 1, 1], step_size=1.0, loss=lambda logits, y: GROUPS.double())
    dro.update(terms_of(logits), y, GROUPS)
    torch.testing.assert_close(dro.weights, torch.arange(3.0).softmax(0))


def test_the_state_carries_over_to_the_bit() -> None:
    y = batch()[1]

    def run(dro: GroupDRO, seeds: range) -> torch.Tensor:
        for seed in seeds:
            dro.update(terms_of(torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))), y, GROUPS)
        return dro(GROUPS)

    straight = run(GroupDRO([9, 4, 7]), range(6))
    first, second = GroupDRO([9, 4, 7]), GroupDRO([9, 4, 7])
    run(first, range(3))
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(second, range(3, 6)), straight)
    for state in ({}, AccuracyBudget(0.9).state_dict(), GroupDRO([1, 1]).state_dict()):
        with pytest.raises(ValueError, match=r"must have 'log_weights' alone, a tensor of shape \(3,\)"):
            second.load_state_dict(state)


def test_a_batch_of_a_group_that_has_lost_all_weight_still_has_a_mean() -> None:
    dro = GroupDRO([5, 5])
    dro.load_state_dict({"log_weights": torch.tensor([0.0, -500.0])})
    model, (x, y) = mlp(), batch()
    ones = torch.ones(6, dtype=torch.int64)
    terms = PenalizedLoss(DensityPenalty())(model, x, y, sample_weight=dro(ones))
    torch.testing.assert_close(terms.total, PenalizedLoss(DensityPenalty())(model, x, y).total)


def test_what_is_not_finite_is_passed_over() -> None:
    dro, y = GroupDRO([9, 4, 7]), batch()[1]
    before = dro.weights
    dro.update(terms_of(torch.full((6, 5), math.nan)), y, GROUPS)
    assert torch.equal(dro.weights, before)


def test_the_worst_group_is_trained() -> None:
    """Two groups that want opposite biases, nine samples against one: the mean gives the one up, the game does not."""
    y = torch.tensor([0] * 9 + [1])
    groups = y
    x = torch.ones(10, 1)
    worst = []
    for robust in (False, True):
        model = nn.Linear(1, 2)
        nn.init.zeros_(model.weight)
        dro = GroupDRO([9, 1], step_size=0.2)
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        loss = PenalizedLoss(DensityPenalty(), 0.0)
        for _ in range(200):
            optimizer.zero_grad()
            terms = loss(model, x, y, sample_weight=dro(groups) if robust else None)
            terms.total.backward()
            optimizer.step()
            dro.update(terms, y, groups)
        worst.append(F.cross_entropy(model(x), y, reduction="none").max().item())
    assert worst[0] > 2.0
    assert worst[1] < 0.8  # both are at log 2 = 0.69 at the saddle


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ([], {}, ValueError, r"group_sizes are \[\]; they must be the samples of each group"),
        ([3, -1], {}, ValueError, r"group_sizes are \[3\.0, -1\.0\]"),
        (["3"], {}, TypeError, "a group's size is '3', a str; it must be a Python number"),
        ([3, 0], {"adjustment": 1.0}, ValueError, "a group without samples has none"),
        (torch.tensor([3, 1]), {}, TypeError, r"group_sizes are a Tensor; .* pass its \.tolist\(\)"),
        ([3], {"step_size": 0}, ValueError, "step_size is 0; it must be positive and finite"),
        ([3], {"adjustment": -1}, ValueError, "adjustment is -1; it must be finite and not negative"),
        ([3], {"loss": nn.CrossEntropyLoss()}, ValueError, "with reduction='mean'"),
    ],
)
def test_wrong_arguments(arguments: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GroupDRO(arguments, **settings)


def test_wrong_groups() -> None:
    dro, y = GroupDRO([1, 1, 1]), batch()[1]
    for groups, found in ((GROUPS.float(), "torch.float32 of shape"), ([0, 1], "list"), (GROUPS[:, None], r"\(6, 1\)")):
        with pytest.raises(TypeError, match=f"groups are .*{found}.*they must be a torch.Tensor of group indices"):
            dro(groups)
    with pytest.raises(ValueError, match="5 groups for 6 samples"):
        dro.update(terms_of(torch.randn(6, 5)), y, GROUPS[:5])
    for groups in (GROUPS + 1, GROUPS - 1):  # a negative index would be the last group's
        with pytest.raises(IndexError, match="groups hold a number outside 0 to 2; group_sizes are of 3 groups"):
            dro(groups)
        with pytest.raises(IndexError, match="groups hold a number outside 0 to 2"):
            dro.update(terms_of(torch.randn(6, 5)), y, groups)


def test_ignored_labels_do_not_count_in_a_groups_loss() -> None:
    logits, (_, y) = torch.randn(6, 5), batch()
    y[GROUPS == 2] = -100
    y[0] = -100
    dro = GroupDRO([1, 1, 1], step_size=1.0)
    dro.update(terms_of(logits), y, GROUPS)
    losses = F.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(dro.weights, torch.stack([losses[2], losses[5], torch.zeros(())]).softmax(0))
