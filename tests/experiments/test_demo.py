"""The demonstration on few digits, its sentences, and its page."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rds_fast.evaluation import report
from rds_fast.evaluation.comparison import Comparison, compare
from rds_fast.evaluation.report import spoken
from rds_fast.evaluation.settings import EvaluationSettings
from rds_fast.evaluation.table import columns_of, rows_of
from rds_fast.experiments import demo_report
from rds_fast.experiments.demo import BASELINE, SHOWN, Trained, chosen_weights, demo, label
from rds_fast.training import TrainingConfig

SETTINGS = EvaluationSettings(steps=3, limit=40)


def record() -> dict[str, Any]:
    """Of a sweep that never was, with figures that are easy to check."""
    real, penalties = chosen_weights(), [name for name in SHOWN if name != BASELINE]
    trials = [{"variant": BASELINE, "settings": {}, "seed": 0, "figures": {"accuracy": 0.9, "linf_accuracy": 0.0}}]
    for name in penalties:
        for weight, accuracy in ((0.1, 0.9), (0.5, 0.5)):
            result = {"accuracy": accuracy, "linf_accuracy": 0.3}
            trials.append({"variant": name, "settings": {"weight": weight}, "seed": 0, "figures": result})
    points = {BASELINE: [{}], **{name: [{"weight": 0.1}, {"weight": 0.5}] for name in penalties}}
    chosen = {"settings": {"weight": 0.1}, "within_margin": True, "at_edge": True}
    return {
        **real,
        "training": {"epochs": 2},
        "rule": "a rule",
        "command": "rds-fast sweep",
        "seeds": [0],
        "trials": trials,
        "points": points,
        "choices": {BASELINE: {**chosen, "settings": {}, "at_edge": False}, **dict.fromkeys(penalties, chosen)},
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
def comparison(models: dict[str, list[Trained]]) -> Comparison:
    return compare([trained.run_dir for each in models.values() for trained in each])


@pytest.fixture(scope="module")
def page(models: dict[str, list[Trained]], comparison: Comparison, splits) -> str:
    pytest.importorskip("matplotlib", reason="needs the extra train")
    commands = ["rds-fast sweep", "rds-fast demo --limit '40'"]
    duel = (label(record(), "density"), label(record(), "target-logit"))
    return demo_report.render(comparison, record(), commands, duel=duel, splits=splits)


def test_the_demo_trains_each_objective_with_its_chosen_weight(models: dict[str, list[Trained]]) -> None:
    assert tuple(models) == SHOWN
    for name, each in models.items():
        assert [trained.config.seed for trained in each] == [0, 1]
        for trained in each:
            assert trained.evaluation.samples == 40
            assert trained.config.epochs == 2
            evaluation = json.loads((trained.run_dir / "evaluation.json").read_text())
            assert evaluation["split"] == "test"
            assert evaluation["scalars"] == trained.evaluation.scalars
            assert name == BASELINE or trained.config.weight == 0.1
    assert models["target-logit"][0].config.of == "target_logit"
    assert models["input-gradient"][0].config.of == "cross_entropy"
    assert models["density"][0].config.method == "exact"


def test_the_comparison_has_the_demo_s_titles_and_runs(
    models: dict[str, list[Trained]], comparison: Comparison
) -> None:
    assert comparison.groups[0].title == BASELINE
    assert {group.title for group in comparison.groups} == {label(record(), name) for name in models}
    assert {len(group.runs) for group in comparison.groups} == {2}
    assert comparison.warnings == ()


def test_the_page_needs_nothing_else(page: str) -> None:
    sources = re.findall(r'(?:src|href|data|action|poster|srcset)\s*=\s*"([^"]*)"', page)
    pictures = [source for source in sources if source.startswith("data:image/png;base64,")]
    assert len(pictures) == 10 * 5  # samples, and the maps of four models
    assert all(source.startswith("#") for source in set(sources) - set(pictures))  # within a drawing
    ids = set(re.findall(r' id="([^"]*)"', page))
    assert len(ids) == page.count(' id="')  # those of one drawing are not those of another
    assert {source[1:] for source in set(sources) - set(pictures)} <= ids
    without_pictures = re.sub(r'src="data:[^"]*"', "", page)
    assert page.count("<svg ") == 4  # reliability, two of the training, the candidates
    for foreign in ("http:", "https:", "//", "@import", "<script", "<link", "<iframe", "<?xml", "<!DOCTYPE"):
        assert foreign not in without_pictures
    assert set(re.findall(r"url\(#(.*?)\)", without_pictures)) <= ids
    assert "url(" not in without_pictures.replace("url(#", "")


def test_the_page_holds_the_figures_of_the_table(page: str, comparison: Comparison) -> None:
    rows = re.findall(r'<tr style="--colour: #\w+"><th scope="row"><i></i>[^<]*</th><td(?!><img).*?</tr>', page)
    assert len(rows) == len(comparison.groups)
    means = rows_of(comparison.models)
    shown = columns_of(means, comparison.settings)
    for row, group in zip(rows, comparison.groups, strict=True):
        assert html.escape(group.title) in row
        for cell, column in zip(re.findall(r"<td.*?</td>", row), shown, strict=True):
            mean, error = means[group.title][column.figure]
            assert f">{column.text(mean)}<small>{column.error_text(error)}</small>" in cell


def test_a_kind_of_model_has_one_colour_throughout_the_page(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(demo_report.pictures, "weight_choice", lambda *given: calls.append(given) or "")
    demo_report._choice(record(), report.colours_of(comparison))
    (given,) = calls
    colours = report.colours_of(comparison)
    assert given[-1] == {label.partition(", λ")[0]: colour for label, colour in colours.items() if label != BASELINE}
    assert len(set(colours.values())) == 4


def test_the_page_holds_verdicts_settings_and_commands(page: str, comparison: Comparison) -> None:
    sentences = spoken(comparison, ("density ‖∇ log p‖, λ = 0.1", "target logit ‖∇ f_y‖, λ = 0.1"))
    assert len(sentences) == 5
    assert sentences[-1].startswith("density ‖∇ log p‖, λ = 0.1 against target logit ‖∇ f_y‖, λ = 0.1, the published")
    for sentence in sentences:
        assert html.escape(sentence) in page
    assert "rds-fast demo --limit &#x27;40&#x27;" in page
    assert "torch 2." in page
    assert "the choice is the first or last candidate" in page


def test_weights_for_data_without_a_null_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="null block"):
        demo(tmp_path / "demo", record() | {"training": {"data": "mnist"}}, SETTINGS)
    assert not (tmp_path / "demo").exists()
