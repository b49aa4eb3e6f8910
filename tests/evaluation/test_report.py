"""The demonstration on few digits, its sentences, and its page."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path

import pytest

from rds_fast.evaluation import report as report_module
from rds_fast.evaluation.demo import SHOWN, Trained, demo, label
from rds_fast.evaluation.evaluate import EvaluationSettings, Figures, mean_and_spread
from rds_fast.evaluation.sweep import BASELINE, PENALTIES
from rds_fast.evaluation.table import best, columns, print_table
from rds_fast.evaluation.verdicts import difference, verdicts
from rds_fast.training import TrainingConfig

SETTINGS = EvaluationSettings(steps=3, limit=40)


def figures(accuracy: float, robust: float, share: float | None = 0.5, samples: int = 1000) -> Figures:
    return Figures(samples, accuracy, robust, robust, 1.0, share, 1.0)


def record() -> dict[str, object]:
    """Of a sweep that never was, with figures that are easy to check."""
    trials = [{"objective": BASELINE, "weight": 0.0, "seed": 0, "figures": {"accuracy": 0.9, "linf_accuracy": 0.0}}]
    for name in PENALTIES:
        for weight, accuracy in ((0.1, 0.9), (0.5, 0.5)):
            result = {"accuracy": accuracy, "linf_accuracy": 0.3}
            trials.append({"objective": name, "weight": weight, "seed": 0, "figures": result})
    return {
        "training": {"epochs": 2},
        "rule": "a rule",
        "command": "rds-fast sweep",
        "weights": [0.1, 0.5],
        "seeds": [0],
        "trials": trials,
        "choices": {name: {"weight": 0.1, "within_margin": True, "at_edge": True} for name in PENALTIES},
    }


@pytest.fixture(scope="module")
def models(splits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Trained]]:
    pytest.importorskip("safetensors", reason="needs the extra train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingConfig, "load_data", lambda config: splits)
        out = tmp_path_factory.mktemp("demo")
        lines: list[str] = []
        arguments = {"device": "cpu", "threads": 1, "report": lines.append}
        demo(out, record(), SETTINGS, seeds=(0,), epochs=1, **arguments)
        again = demo(out, record(), SETTINGS, seeds=(0, 1), **arguments)  # over the first one, without a flag
        assert len(lines) == 4 + 8
    return again


@pytest.fixture(scope="module")
def page(models: dict[str, list[Trained]], splits) -> str:
    pytest.importorskip("matplotlib", reason="needs the extra train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingConfig, "load_data", lambda config: splits)
        return report_module.render(models, record(), SETTINGS, ["rds-fast sweep", "rds-fast demo --limit '40'"])


def test_the_demo_trains_each_objective_with_its_chosen_weight(models: dict[str, list[Trained]]) -> None:
    assert tuple(models) == SHOWN
    for name, each in models.items():
        assert [trained.config.seed for trained in each] == [0, 1]
        assert {trained.figures.samples for trained in each} == {40}
        for trained in each:
            assert trained.config.epochs == 2
            evaluation = json.loads((trained.run_dir / "evaluation.json").read_text())
            assert evaluation["split"] == "test"
            assert Figures(**evaluation["figures"]) == trained.figures
            assert name == BASELINE or trained.config.weight == 0.1
    assert models["target-logit"][0].config.of == "target_logit"
    assert models["input-gradient"][0].config.of == "cross_entropy"
    assert models["density"][0].config.method == "exact"


def test_the_page_needs_nothing_else(page: str) -> None:
    sources = re.findall(r'(?:src|href|data|action|poster|srcset)\s*=\s*"([^"]*)"', page)
    assert len(sources) == 3
    assert all(source.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for source in sources)
    without_pictures = re.sub(r'src="data:[^"]*"', "", page)
    for foreign in ("http:", "https:", "//", "url(", "@import", "<script", "<link", "<iframe"):
        assert foreign not in without_pictures


def test_the_page_holds_the_figures_of_the_table(page: str, models: dict[str, list[Trained]]) -> None:
    rows = re.findall(r"<tr style=.*?</tr>", page, re.DOTALL)
    assert len(rows) == len(models)
    for row, (name, each) in zip(rows, models.items(), strict=True):
        assert html.escape(label(name, each)) in row
        mean, spread = mean_and_spread([trained.figures for trained in each])
        for cell, column in zip(re.findall(r"<td.*?</td>", row), columns(SETTINGS), strict=True):
            value, deviation = getattr(mean, column.figure), getattr(spread, column.figure)
            assert f">{column.text(value)}<small>{column.spread_text(deviation)}</small>" in cell


def test_the_page_holds_verdicts_settings_and_commands(page: str, models: dict[str, list[Trained]]) -> None:
    sentences = verdicts({name: [trained.figures for trained in each] for name, each in models.items()})
    assert len(sentences) == 5
    for sentence in sentences:
        assert html.escape(sentence) in page
    assert "rds-fast demo --limit &#x27;40&#x27;" in page
    assert "torch 2." in page
    assert "the choice is the first or last candidate" in page


def test_the_best_of_a_column_is_found_by_what_is_printed() -> None:
    accuracy, *_, share, norm = columns(SETTINGS)
    rows = {"a": figures(0.9001, 0.1, 0.301), "b": figures(0.9004, 0.2, 0.299), "c": figures(0.8, 0.3, None)}
    assert best(accuracy, rows) == {"a", "b"}  # 90.0% both
    assert best(share, rows) == {"a", "b"}  # 0.30 both; less is better, and none is not least
    assert best(norm, rows) == set()
    assert best(accuracy, {"a": rows["a"]}) == set()


def test_the_table_is_printed_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="needs the extra train")
    print_table("a title", {"model one": [figures(0.9, 0.25), figures(0.8, 0.35)]}, SETTINGS)
    output = capsys.readouterr().out
    for text in ("a title", "model one", "85.0%", "±7.1", "30.0%", "PGD L∞ 0.1", "PGD L2 1", "null share"):
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
        (figures(0.9, 0.6, 0.3), figures(0.9, 0.4, 0.5), ("the density penalty wins", "(+20.0 ±", "leaves less")),
        (figures(0.9, 0.4, 0.5), figures(0.9, 0.6, 0.3), ("the baseline wins", "(−20.0 ±", "leaves more")),
        (figures(0.9, 0.41, 0.3), figures(0.9, 0.40, 0.3), ("neither wins", "(+1.0 ±", "about as much")),
    ],
)
def test_whoever_wins_is_named(ours: Figures, rival: Figures, outcome: tuple[str, ...]) -> None:
    rows = {BASELINE: [figures(0.9, 0.0)], "target-logit": [rival], "density": [ours]}
    duel = verdicts(rows)[-1]
    for text in outcome:
        assert text in duel


def test_cross_entropy_may_win_too() -> None:
    rows = {BASELINE: [figures(0.9, 0.6)], "density": [figures(0.7, 0.2, None)]}
    against, ranking = verdicts(rows)
    assert "accuracy −20.0 points" in against
    assert "share" not in against
    assert ranking.startswith("Most accurate under L∞ PGD: cross-entropy (60.0%)")
    assert "beyond the error" in ranking


def test_a_tie_is_within_the_error() -> None:
    rows = {BASELINE: [figures(0.9, 0.6)], "density": [dataclasses.replace(figures(0.9, 0.6))]}
    assert "within the error" in verdicts(rows)[-1]


def test_weights_for_data_without_a_null_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="null block"):
        demo(tmp_path / "demo", {**record(), "training": {"data": "mnist"}}, SETTINGS)
    assert not (tmp_path / "demo").exists()
