"""``rds-fast evaluate`` and ``compare`` as a user calls them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rds_fast.evaluation.settings import FIELDS

for package in ("typer", "rich", "matplotlib", "safetensors"):
    pytest.importorskip(package, reason="needs the extra train")

Call = Callable[..., tuple[int, str, str]]
FAST = ("--steps", 2, "--limit", 40, "--device", "cpu", "--threads", 1)


@pytest.fixture
def runs(finished_run: Path, tmp_path: Path) -> list[Path]:
    """Two folders that differ in the seed that they name."""
    folders = [tmp_path / "seed0", tmp_path / "seed1"]
    for seed, folder in enumerate(folders):
        shutil.copytree(finished_run, folder)
        content = json.loads((folder / "config.json").read_text())
        content["settings"]["seed"] = seed
        (folder / "config.json").write_text(json.dumps(content))
    return folders


def test_a_run_is_evaluated_and_gets_its_page(runs: list[Path], call: Call) -> None:
    code, output, errors = call("evaluate", runs[0], *FAST)
    assert code == 0, errors
    assert re.fullmatch(r"(\w+: [\d.]+ s\n)+", errors)
    assert "groups is left out: these data have no groups." in output
    written = json.loads((runs[0] / "evaluation.json").read_text())
    assert f"{100 * written['scalars']['accuracy']:.1f}%" in output
    page = (runs[0] / "evaluation.html").read_text()
    assert "<h1>seed0</h1>" in page
    assert page.count('<img src="data:image/png;base64,') == 20  # ten samples and their maps
    assert "rds-fast evaluate" in page
    assert f"{100 * written['scalars']['accuracy']:.1f}%" in page


def test_metrics_are_chosen_by_name_and_settings_by_their_fields(runs: list[Path], call: Call) -> None:
    options = ("--metrics", "pgd, accuracy", "--linf", 0.02, "--l2-epsilon", 0.2, "--attack-seed", 3, "--no-page")
    options += ("--perturbation-ratios", "0.25,0.5", "--split", "validation")
    code, _, errors = call("evaluate", runs[0], *FAST, *options)
    assert code == 0, errors
    written = json.loads((runs[0] / "evaluation.json").read_text())
    assert set(written["scalars"]) == {"accuracy", "linf_accuracy", "l2_accuracy"}
    settings = written["settings"]
    assert settings["metrics"] == ["pgd", "accuracy"]
    assert (settings["linf_epsilon"], settings["l2_epsilon"], settings["seed"]) == (0.02, 0.2, 3)
    assert settings["perturbation_ratios"] == [0.25, 0.5]
    assert written["split"] == "validation"
    assert not (runs[0] / "evaluation.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metrics", "acuracy"), "error: a metric is 'acuracy'; did you mean 'accuracy'"),
        (("--metrics", "accuracy,groups"), "error: the metric groups cannot be measured: these data have no groups"),
        (("--split", "tests"), "error: split is 'tests'; did you mean 'test'"),
        (("--linf", -1), "error: linf_epsilon is -1.0; it must be 0 or more"),
        (("--perturbation-ratios", "a,b"), "error: perturbation_ratios is 'a,b'; it must be numbers with commas"),
        (("--fill", "gray"), "error: fill is 'gray'; it must be 'mean' or a number"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_errors_of_use_are_one_line_and_leave_no_file(
    options: tuple[object, ...], message: str, runs: list[Path], call: Call
) -> None:
    (runs[0] / "evaluation.json").unlink(missing_ok=True)
    code, output, errors = call("evaluate", runs[0], *FAST, *options)
    assert (code, output) == (1, "")
    assert errors.startswith(message)
    assert errors.count("\n") == 1
    assert not (runs[0] / "evaluation.json").exists()


def test_every_setting_is_an_option(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, output, _ = call("evaluate", "--help")
    assert code == 0
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in output


def test_runs_are_compared(runs: list[Path], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in runs:
        assert call("evaluate", run, *FAST, "--no-page")[0] == 0
    monkeypatch.chdir(tmp_path)
    code, output, errors = call("compare", *runs)
    assert code == 0, errors
    assert "mean ± standard error over the seeds" in output
    assert "±0.0" in output  # one model twice
    assert errors == f"report: {tmp_path / 'comparison.html'}\n"
    page = (tmp_path / "comparison.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count('<img src="data:image/png;base64,') == 20
    (tmp_path / "comparison.html").unlink()

    code, output, errors = call("compare", *runs, "--markdown")
    assert (code, errors) == (0, "")
    assert output.startswith("| model | accuracy ↑ | ECE ↓ | PGD L∞ 0.1 ↑ |")
    assert output.count("\n") == 3
    code, output, errors = call("compare", *runs, "--csv", "--out", tmp_path / "pages" / "page.html")
    assert code == 0
    assert output.startswith("model,runs,accuracy,accuracy_standard_error,ece,")
    assert (tmp_path / "pages" / "page.html").exists()
    assert not (tmp_path / "comparison.html").exists()

    code, _, errors = call("compare", *runs, "--markdown", "--csv")
    assert (code, errors.count("\n")) == (1, 1)
    assert "give one of them" in errors


def test_what_may_not_be_compared_is_refused_and_forced(runs: list[Path], call: Call, tmp_path: Path) -> None:
    assert call("evaluate", runs[0], *FAST, "--no-page")[0] == 0
    assert call("evaluate", runs[1], *FAST, "--steps", 1, "--no-page")[0] == 0
    page = tmp_path / "page.html"
    code, output, errors = call("compare", *runs, "--out", page)
    assert (code, output) == (1, "")
    assert errors.startswith("error: these runs cannot be compared fairly: The evaluation's steps differs: 2 and 1")
    assert not page.exists()
    code, _, errors = call("compare", *runs, "--out", page, "--force")
    assert code == 0
    assert errors.startswith("warning: The evaluation's steps differs: 2 and 1")
    assert '<p class="warning">The evaluation&#x27;s steps differs: 2 and 1' in page.read_text()
    code, output, errors = call("compare", tmp_path / "nowhere")
    assert (code, output) == (1, "")
    assert "holds no run" in errors
