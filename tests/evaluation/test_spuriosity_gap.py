"""The spurious-feature gap by hand, and from a file of scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rds_fast.evaluation import spurious_gaps
from rds_fast.evaluation.evaluate import evaluate_model
from rds_fast.evaluation.settings import EvaluationSettings
from rds_fast.training.data import Images


class Prediction(nn.Module):
    """Predicts the class that the first pixel names."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot((3 * x.flatten(1)[:, 0]).round().long(), 4).float()


def test_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2])
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.1, 0.5, 0.3, 0.2, 0.4, 9.0, 8.0, 7.0])
    right = torch.tensor([True, True, True, False, False, True, False, True, False, True, True, True])
    # Class 0: highest (right, right), lowest (wrong, right). Class 1, ranked: wrong right wrong wrong right.
    gaps = spurious_gaps(right, labels, scores, 2)
    assert [tuple(gap) for gap in gaps] == [(0, 4, 1.0, 0.5), (1, 5, 0.5, 0.5)]  # class 2 has fewer than 4
    assert [gap.gap for gap in gaps] == [0.5, 0.0]
    assert [gap.label for gap in spurious_gaps(right, labels, scores, 1)] == [0, 1, 2]


def test_equal_scores_rank_in_order() -> None:
    right = torch.tensor([False, True, True, True])
    (gap,) = spurious_gaps(right, torch.zeros(4, dtype=torch.long), torch.ones(4), 1)
    assert (gap.lowest, gap.highest) == (0.0, 1.0)


@settings(deadline=None)
@given(size=st.integers(2, 60), k=st.integers(1, 8), seed=st.integers(0, 1000))
def test_what_holds_for_every_ranking(size: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (size,), generator=generator)
    right = torch.rand(size, generator=generator) < 0.7
    scores = torch.rand(size, generator=generator)
    gaps = spurious_gaps(right, labels, scores, k)
    assert {gap.label for gap in gaps} == {c for c in range(3) if (labels == c).sum() >= 2 * k}
    for gap, back in zip(gaps, spurious_gaps(right, labels, -scores, k), strict=True):
        assert -1 <= gap.gap <= 1
        assert gap.gap == -back.gap  # the ranking turned round
    assert gaps == spurious_gaps(right, labels, 5 * scores.exp(), k)  # the ranks alone count
    assert all(gap.gap == 0 for gap in spurious_gaps(torch.ones_like(right), labels, scores, k))


def test_the_metric_reads_the_scores_and_names_the_classes(tmp_path: Path) -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    predicted = torch.tensor([0, 0, 3, 3, 1, 1, 1, 3, 2])
    split = Images((predicted / 3.0).view(-1, 1, 1, 1), labels, None, 4)
    rows = [f"{index},{score}" for index, score in enumerate([8, 7, 2, 1, 1, 2, 3, 4, 0])]
    path = tmp_path / "scores.csv"
    path.write_text("index,score\n" + "\n".join(rows) + "\n")
    settings = EvaluationSettings(metrics=("spuriosity",), spuriosity=str(path), spuriosity_k=2, batch_size=4)
    results = evaluate_model(Prediction(), split, settings)
    # Class 0: highest both right, lowest both wrong. Class 1: highest one right of two, lowest both.
    assert results.scalars == {"spurious_gap": pytest.approx((1.0 - 0.5) / 2)}
    assert results.tables["spurious_gap"] == [
        {"class": "0", "samples": 4, "highest": 1.0, "lowest": 0.0, "gap": 1.0},
        {"class": "1", "samples": 4, "highest": 0.5, "lowest": 1.0, "gap": -0.5},
    ]
    assert "1 classes of fewer than 4" in results.notes[0]


def test_without_scores_or_with_a_limit_the_metric_says_so() -> None:
    split = Images(torch.zeros(4, 1, 1, 1), torch.zeros(4, dtype=torch.long), None, 4)
    with pytest.raises(ValueError, match="no file of spuriosity scores"):
        evaluate_model(Prediction(), split, EvaluationSettings(metrics=("spuriosity",)))
    limited = EvaluationSettings(metrics=("spuriosity",), spuriosity="scores.csv", limit=2)
    with pytest.raises(ValueError, match="whole split"):
        evaluate_model(Prediction(), split, limited)


def test_no_class_with_enough_samples_gives_no_figure(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("index,score\n0,1\n1,2\n")
    split = Images(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]), None, 4)
    settings = EvaluationSettings(metrics=("spuriosity",), spuriosity=str(path))
    assert evaluate_model(Prediction(), split, settings).scalars == {"spurious_gap": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3)}, r"\(3,\)"),
        ({"k": 0}, "k is 0"),
        ({"scores": torch.tensor([0.0, torch.nan])}, "NaN"),
    ],
)
def test_wrong_input_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "right": torch.ones(2, dtype=torch.bool),
        "labels": torch.zeros(2, dtype=torch.long),
        "scores": torch.zeros(2),
        "k": 1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        spurious_gaps(**arguments)
