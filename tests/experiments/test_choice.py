"""The rule that chooses among the candidates of a variant."""

from __future__ import annotations

import pytest

from rds_fast.experiments.choice import Candidate, Choice, choose, rule

MARGIN = 0.02


def candidates(*rows: tuple[float, float, float]) -> list[Candidate]:
    return [Candidate({"weight": weight}, accuracy, robust) for weight, accuracy, robust in rows]


def chosen(rows: list[Candidate], baseline: float) -> float:
    return choose(rows, baseline, MARGIN).settings["weight"]


def test_the_most_robust_within_two_points_is_chosen() -> None:
    rows = candidates((0.1, 0.93, 0.20), (0.5, 0.92, 0.40), (1.0, 0.91, 0.35), (2.0, 0.90, 0.60))
    assert choose(rows, 0.93, MARGIN) == Choice({"weight": 0.5}, within_margin=True, at_edge=False)


def test_exactly_two_points_are_within() -> None:
    rows = candidates((0.1, 0.93, 0.20), (0.5, 0.91, 0.40), (1.0, 0.9099, 0.50))
    assert 0.93 - 0.91 > 0.02  # in floating point
    assert chosen(rows, 0.93) == 0.5


def test_another_margin() -> None:
    rows = candidates((0.1, 0.93, 0.20), (0.5, 0.91, 0.40), (1.0, 0.88, 0.50))
    assert choose(rows, 0.93, 0.05).settings["weight"] == 1.0
    assert choose(rows, 0.93, 0.0).settings["weight"] == 0.1


def test_a_candidate_above_the_baseline_is_within() -> None:
    assert chosen(candidates((0.1, 0.99, 0.1), (0.5, 0.98, 0.2), (1.0, 0.5, 0.9)), 0.9) == 0.5


def test_none_within_the_margin_takes_the_most_accurate_and_says_so() -> None:
    rows = candidates((0.1, 0.80, 0.20), (0.5, 0.85, 0.10), (1.0, 0.70, 0.60))
    assert choose(rows, 0.93, MARGIN) == Choice({"weight": 0.5}, within_margin=False, at_edge=False)


@pytest.mark.parametrize(
    ("rows", "weight"),
    [
        ([(0.1, 0.92, 0.4), (0.5, 0.93, 0.4), (1.0, 0.91, 0.4)], 0.5),  # equally robust: the more accurate
        ([(0.5, 0.92, 0.4), (1.0, 0.92, 0.4), (2.0, 0.92, 0.4)], 0.5),  # equal in both: the first
        ([(0.5, 0.5, 0.4), (1.0, 0.5, 0.2)], 0.5),  # none within, equally accurate: the more robust
        ([(0.5, 0.5, 0.4), (1.0, 0.5, 0.4)], 0.5),  # none within, equal in both: the first
    ],
)
def test_ties(rows: list[tuple[float, float, float]], weight: float) -> None:
    assert chosen(candidates(*rows), 0.93) == weight


def test_a_choice_at_the_edge_of_the_weights_is_flagged() -> None:
    rows = candidates((0.1, 0.93, 0.2), (0.5, 0.93, 0.3), (1.0, 0.93, 0.4))
    assert choose(rows, 0.93, MARGIN).at_edge
    assert choose(rows[:1], 0.93, MARGIN).at_edge
    assert not choose([Candidate({}, 0.93, 0.1)], 0.93, MARGIN).at_edge  # there is no weight to choose
    norms = [Candidate({"p": p}, 0.9, robust) for p, robust in ((1, 0.3), (2, 0.2))]
    assert choose(norms, 0.9, MARGIN) == Choice({"p": 1}, within_margin=True, at_edge=False)


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        choose([], 0.9, MARGIN)


def test_the_rule_in_words() -> None:
    said = rule("l2_accuracy", 0.015, "natural")
    assert said.startswith("highest l2_accuracy among the candidates whose accuracy is at most 1.5 points below that of")
    assert "natural" in said
