"""PGD with restarts: by hand, and which samples are attacked again; when one attack counts as weaker than another."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn
from toy_classifiers import honest, images

from rds_fast.evaluation import pgd, robust_to_pgd
from rds_fast.evaluation.robust_accuracy import measure, outlasts, robust_to_the_settings_pgd
from rds_fast.evaluation.settings import EvaluationSettings
from rds_fast.training import Images


class Threshold(nn.Module):
    """Two classes by the first pixel: f = (0, 4 (x − 1/2))."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        score = 4 * (x.flatten(1)[:, 0] - 0.5)
        return torch.stack((torch.zeros_like(score), score), 1)


def pixels(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_by_hand_and_only_what_is_left_is_attacked_again(norm: str) -> None:
    # Margins of 0.4 and 0.05 to the boundary; the third sample is classified wrongly to begin with.
    model, x, y = Threshold(), pixels(0.9, 0.55, 0.7), torch.tensor([1, 1, 0])
    robust = robust_to_pgd(model, x, y, 0.1, norm=norm, steps=8, restarts=3)
    assert robust.tolist() == [True, False, False]
    # Natural; 8 steps and the verdict on all, whose starts are every model's; then twice on the one that is left.
    assert model.sizes == [3, *[3] * 9, *[1] * 18]


def test_each_restart_can_only_lower_the_accuracy() -> None:
    split = images(80, 3)
    few = [
        robust_to_pgd(
            honest(), split.images, split.labels, 0.05, steps=2, restarts=n, generator=torch.Generator().manual_seed(0)
        )
        for n in (1, 2, 6)
    ]
    for fewer, more in itertools.pairwise(few):
        assert not bool((more & ~fewer).any())
    assert few[2].sum() < few[0].sum()


def test_each_restart_can_only_lower_the_accuracy_in_every_batch() -> None:
    split = images(80, 3)
    settings = EvaluationSettings(linf_epsilon=0.05, steps=2, batch_size=16)
    few = [
        robust_to_the_settings_pgd(honest(), split, dataclasses.replace(settings, restarts=n), "linf")
        for n in (1, 2, 6)
    ]
    for fewer, more in itertools.pairwise(few):
        assert not bool((more & ~fewer).any())
    assert few[2].sum() < few[0].sum()


def test_one_restart_is_pgd() -> None:
    split = images(40, 3)
    x, y = split.images, split.labels
    y = torch.where(torch.arange(40) < 5, (y + 1) % 5, y)  # the starts are those of all samples, though some are wrong
    right = honest()(x).argmax(1) == y
    assert 0 < int(right.sum()) < 40
    moved = pgd(honest(), x, y, 0.4, norm="l2", steps=5, generator=torch.Generator().manual_seed(1))
    ours = robust_to_pgd(honest(), x, y, 0.4, norm="l2", steps=5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours, right & (honest()(moved).argmax(1) == y))


class Valley(nn.Module):
    """Class 1 on both sides of the middle, by the first pixel: an attack on it from the middle overshoots."""

    def forward(self, x: Tensor) -> Tensor:
        score = (x[:, 0, 0, 0] - 0.5).abs() - 0.08
        return torch.stack((torch.zeros_like(score), score), 1)


def test_what_is_wrong_without_an_attack_is_not_robust_where_the_attack_sets_it_right() -> None:
    x, y = pixels(*[0.5] * 20), torch.ones(20, dtype=torch.long)
    settings = {"steps": 1, "step_size": 0.2}
    moved = pgd(Valley(), x, y, 0.2, generator=torch.Generator().manual_seed(0), **settings)
    assert bool((Valley()(moved).argmax(1) == y).any())
    robust = robust_to_pgd(Valley(), x, y, 0.2, generator=torch.Generator().manual_seed(0), **settings)
    assert not bool(robust.any())


def test_nothing_right_leaves_nothing_to_attack_again() -> None:
    model = Threshold()
    x, y = pixels(0.9, 0.8), torch.tensor([0, 0])
    assert robust_to_pgd(model, x, y, 0.1, steps=3, restarts=5).tolist() == [False, False]
    assert model.sizes == [2, *[2] * 4]
    with pytest.raises(ValueError, match="restarts is 0"):
        robust_to_pgd(model, pixels(0.9), torch.tensor([0]), 0.1, restarts=0)
    with pytest.raises(ValueError, match="epsilon"):  # also where no sample is left
        robust_to_pgd(model, pixels(0.9), torch.tensor([0]), -1.0)


def test_the_metric_follows_its_settings() -> None:
    split = Images(pixels(0.9, 0.55, 0.7, 0.7), torch.tensor([1, 1, 1, 0]), None, 2)
    settings = EvaluationSettings(linf_epsilon=0.1, l2_epsilon=0.3, steps=8, restarts=2)
    assert measure(Threshold(), split, settings).scalars == {"linf_accuracy": 0.5, "l2_accuracy": 0.25}
    short = dataclasses.replace(settings, linf_step_size=1e-4, l2_step_size=1e-4, linf_epsilon=0.21, l2_epsilon=0.21)
    assert (
        measure(Threshold(), split, short).scalars["l2_accuracy"]
        > measure(Threshold(), split, settings).scalars["l2_accuracy"]
    )
    assert measure(Threshold(), split, dataclasses.replace(settings, batch_size=1)).scalars["linf_accuracy"] == 0.5


def test_when_one_attack_counts_as_weaker() -> None:
    def withstanding(count: int) -> Tensor:
        return torch.arange(20) < count

    assert not outlasts(withstanding(10), withstanding(10))
    assert not outlasts(withstanding(4), withstanding(0))  # 4 − 0 is not above 2 √4
    assert outlasts(withstanding(5), withstanding(0))  # 5 > 2 √5
    assert not outlasts(withstanding(0), withstanding(20))
    # 9 withstand only the one and 4 only the other: 5 < 2 √13.
    one, other = torch.tensor([True] * 9 + [False] * 4), torch.tensor([False] * 9 + [True] * 4)
    assert not outlasts(one, other)
