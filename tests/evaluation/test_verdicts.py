"""The best of a column, the table on the terminal, and the sentences about it."""

from __future__ import annotations

import pytest

from rds_fast.evaluation.columns import best, columns
from rds_fast.evaluation.results import Evaluation
from rds_fast.evaluation.settings import EvaluationSettings
from rds_fast.evaluation.summary import Figure
from rds_fast.evaluation.table import print_table, rows_of
from rds_fast.evaluation.titles import BASELINE
from rds_fast.evaluation.verdicts import difference, verdicts

SETTINGS = EvaluationSettings(steps=3, limit=40)


def figures(accuracy: float, robust: float, share: float | None = 0.5, samples: int = 1000) -> Evaluation:
    names = ("accuracy", "linf_accuracy", "l2_accuracy", "leakage", "share", "gradient_norm")
    return Evaluation(dict(zip(names, (accuracy, robust, robust, 1.0, share, 1.0), strict=True)), samples=samples)


def test_the_best_of_a_column_is_found_by_what_is_printed() -> None:
    evaluations = {"a": figures(0.9001, 0.1, 0.301), "b": figures(0.9004, 0.2, 0.299), "c": figures(0.8, 0.3, None)}
    rows = rows_of({name: [evaluation.scalars] for name, evaluation in evaluations.items()})
    accuracy, share, norm = columns(SETTINGS, ["gradient_norm", "share", "accuracy"])
    assert best(accuracy, rows) == {"a", "b"}  # 90.0% both
    assert best(share, rows) == {"a", "b"}  # 0.30 both; less is better, and none is not least
    assert best(norm, rows) == set()
    assert best(accuracy, {"a": rows["a"], "b": rows["b"]}) == set()  # nobody is better
    assert best(accuracy, {"a": rows["a"], "d": {"accuracy": Figure(None)}}) == set()


def test_the_table_is_printed_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="needs the extra train")
    print_table("a title", {"model one": [figures(0.9, 0.25).scalars, figures(0.8, 0.35).scalars]}, SETTINGS)
    output = capsys.readouterr().out
    for text in ("a title", "model one", "85.0%", "±5.0", "30.0%", "PGD L∞ 0.1", "PGD L2 1", "null share"):
        assert text in output


def test_a_difference_is_measured_against_seeds_and_samples() -> None:
    points, error = difference([figures(0.5, 0.5)], [figures(0.5, 0.5)])
    assert points == 0
    assert error == pytest.approx(200 * (2 * 0.25 / 1000) ** 0.5)
    _, wider = difference([figures(0.5, 0.4), figures(0.5, 0.6)], [figures(0.5, 0.5)])
    assert wider == pytest.approx(200 * (2 * 0.25 / 1000 + 0.02 / 2) ** 0.5)


@pytest.mark.parametrize(
    ("ours", "rival", "outcome"),
    [
        (figures(0.9, 0.6, 0.3), figures(0.9, 0.4, 0.5), ("ours wins", "(+20.0 ±", "leaves less")),
        (figures(0.9, 0.4, 0.5), figures(0.9, 0.6, 0.3), ("theirs wins", "(−20.0 ±", "leaves more")),
        (figures(0.9, 0.41, 0.3), figures(0.9, 0.40, 0.3), ("neither wins", "(+1.0 ±", "about as much")),
    ],
)
def test_whoever_wins_is_named(ours: Evaluation, rival: Evaluation, outcome: tuple[str, ...]) -> None:
    rows = {BASELINE: [figures(0.9, 0.0)], "theirs": [rival], "ours": [ours]}
    duel = verdicts(rows, BASELINE, ("ours", "theirs"))[-1]
    for text in outcome:
        assert text in duel


def test_cross_entropy_may_win_too() -> None:
    rows = {BASELINE: [figures(0.9, 0.6)], "density": [figures(0.7, 0.2, None)]}
    against, ranking = verdicts(rows, BASELINE)
    assert "accuracy −20.0 points" in against
    assert "share" not in against
    assert ranking.startswith("Most accurate under L∞ PGD: cross-entropy (60.0%)")
    assert "beyond the error" in ranking


def test_a_tie_is_within_the_error() -> None:
    rows = {BASELINE: [figures(0.9, 0.6)], "density": [figures(0.9, 0.6)]}
    assert "within the error" in verdicts(rows, BASELINE)[-1]
