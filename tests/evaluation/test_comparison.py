"""Runs set side by side: what belongs together, what may not be compared, the table and the page."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rds_fast.evaluation import record, report, table
from rds_fast.evaluation.comparison import compare
from rds_fast.evaluation.results import Curve, Evaluation
from rds_fast.evaluation.settings import EvaluationSettings
from rds_fast.evaluation.summary import Figure, summarise
from rds_fast.training import TrainingConfig

SETTINGS = EvaluationSettings(steps=3)


class Runs:
    """Makes folders of evaluated runs that never were."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(
        self,
        name: str,
        scalars: dict[str, float | None],
        *,
        settings: EvaluationSettings = SETTINGS,
        split: str = "test",
        samples: int = 100,
        fingerprint: str = "same",
        curves: dict[str, Curve] | None = None,
        notes: tuple[str, ...] = (),
        identity: dict[str, str] | None = None,
        **training: Any,
    ) -> Path:
        config = TrainingConfig(**training)
        folder = self._root / name
        folder.mkdir()
        described = {"samples": 1, "classes": 10, "class_names": None}
        content = {"settings": json.loads(config.to_json()), "data": described, "versions": {}}
        (folder / "config.json").write_text(json.dumps(content))
        evaluation = Evaluation(scalars, curves or {}, {}, notes, samples, {"accuracy": 0.1})
        versions = {"torch": "2.11"}
        written = record.Record(evaluation, settings, split, fingerprint, config, "cpu", versions, identity or {})
        record.write(folder, written)
        return folder


@pytest.fixture
def made(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


@pytest.fixture
def folders(made: Runs) -> list[Path]:
    """Three seeds of the density penalty, two of cross-entropy, one with another weight, in no good order."""
    return [
        made("d2", {"accuracy": 0.90, "leakage": 0.2}, weight=2.0),
        made("d-2", {"accuracy": 0.84, "leakage": 0.5}, seed=2),
        made("d-0", {"accuracy": 0.80, "leakage": 0.3}, seed=0),
        made("ce-0", {"accuracy": 0.90, "leakage": 5.0}, objective="cross-entropy", weight=3.0),
        made("d-1", {"accuracy": 0.82, "leakage": 0.4}, seed=1, threads=2, device="cpu"),
        made("ce-1", {"accuracy": 0.94, "leakage": 7.0}, objective="cross-entropy", seed=1),
    ]


def test_runs_that_differ_in_the_seed_alone_are_one_kind(folders: list[Path]) -> None:
    found = compare(folders)
    assert [(group.title, [run.folder.name for run in group.runs]) for group in found.groups] == [
        ("cross-entropy", ["ce-0", "ce-1"]),  # its weight has no effect
        ("density ‖∇ log p‖, λ = 0.5", ["d-0", "d-1", "d-2"]),
        ("density ‖∇ log p‖, λ = 2", ["d2"]),
    ]
    assert found.warnings == ()


def test_titles_hold_what_differs_and_nothing_else(made: Runs) -> None:
    folders = [
        made("a", {}, p=1.0),
        made("b", {}, p=math.inf, epochs=3),
        made("c", {}, objective="input-gradient", of="target_logit"),
        made("d", {}, objective="input-gradient", of="cross_entropy", model="cnn"),
        made("e", {}, method="finite_difference"),
        made("f", {}, nesterov=True, optimizer="sgd"),
        made("g", {}, optimizer="sgd"),
    ]
    assert [group.title for group in compare(folders).groups] == [
        "input gradient ‖∇ CE‖, λ = 0.5, p = 2, model = cnn, epochs = 12, optimizer = adam",
        "target logit ‖∇ f_y‖, λ = 0.5, p = 2, model = mlp, epochs = 12, optimizer = adam",
        "density ‖∇ log p‖, λ = 0.5, p = 1, model = mlp, epochs = 12, optimizer = adam",
        "density ‖∇ log p‖, λ = 0.5, p = 2, model = mlp, epochs = 12, optimizer = sgd, no nesterov",
        "density ‖∇ log p‖, λ = 0.5, p = 2, model = mlp, epochs = 12, optimizer = sgd, nesterov",
        "density ‖∇ log p‖, λ = 0.5, p = inf, model = mlp, epochs = 3, optimizer = adam",
        "density, Taylor, λ = 0.5, p = 2, model = mlp, epochs = 12, optimizer = adam",
    ]


def test_means_and_standard_errors_by_hand() -> None:
    found = summarise([{"a": 0.80, "b": 1.0, "c": 1.0}, {"a": 0.84, "b": 3.0, "c": None}, {"a": 0.82, "b": 5.0}])
    assert found["a"] == (pytest.approx(0.82), pytest.approx(0.02 / math.sqrt(3)))  # s = 0.02
    assert found["b"] == (3.0, pytest.approx(2 / math.sqrt(3)))
    assert found["c"] == Figure(None, None)  # a mean over two of three would be of another kind
    assert summarise([{"a": 0.5}]) == {"a": Figure(0.5, None)}


def test_markdown_to_the_letter(folders: list[Path]) -> None:
    # The standard errors: 0.04/√2/√2 = 2.0 points and √2/√2 = 1; 0.02/√3 = 1.15 points and 0.1/√3 = 0.058.
    found = compare(folders)
    assert table.markdown(found.models, found.settings) == (
        "| model | accuracy ↑ | leakage ↓ |\n"
        "| --- | ---: | ---: |\n"
        "| cross-entropy | **92.0%** ±2.0 | 6.00 ±1.00 |\n"
        "| density ‖∇ log p‖, λ = 0.5 | 82.0% ±1.2 | 0.40 ±0.06 |\n"
        "| density ‖∇ log p‖, λ = 2 | 90.0% | **0.20** |\n"
    )


def test_csv_has_every_digit(made: Runs) -> None:
    folders = [
        made("a", {"accuracy": 1 / 3, "share": None}),
        made("b", {"accuracy": 0.5, "share": 0.25}, objective="cross-entropy", seed=0),
        made("c", {"accuracy": 0.25, "share": 0.75}, objective="cross-entropy", seed=1),
    ]
    found = compare(folders)
    rows = list(csv.reader(io.StringIO(table.comma_separated(found.models, found.settings))))
    assert rows == [
        ["model", "runs", "accuracy", "accuracy_standard_error", "share", "share_standard_error"],
        ["cross-entropy", "2", "0.375", "0.125", "0.5", "0.25"],
        ["density ‖∇ log p‖, λ = 0.5", "1", "0.3333333333333333", "", "", ""],
    ]


def test_many_figures_are_rows_and_a_missing_one_is_a_dash(made: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="needs the extra train")
    many = {f"ood_svhn_score{number}_auroc": 0.5 for number in range(8)}
    folders = [
        made("a", {"accuracy": 0.9, "new_metric": 1.5, **many}),
        made("b", {"accuracy": 0.8}, objective="cross-entropy"),
    ]
    found = compare(folders)
    lines = table.markdown(found.models, found.settings).splitlines()
    assert lines[0] == "| figure | cross-entropy | density ‖∇ log p‖, λ = 0.5 |"
    assert lines[2] == "| accuracy ↑ | 80.0% | **90.0%** |"
    assert "| AUROC svhn, score0 ↑ | – | 50.0% |" in lines
    assert "| new metric | – | 1.50 |" in lines  # one that no column was written for
    table.print_table("title", found.models, found.settings)
    assert re.search(r"AUROC svhn, score7 ↑ +│ +– │ +50.0% │", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "mnist"}, "The data differ: block-mnist and mnist"),
        ({"split": "validation"}, "The splits differ: test and validation"),
        ({"samples": 50}, "The numbers of samples differ: 100 and 50"),
        ({"fingerprint": "other"}, "The samples differ, though as many and of data of one name"),
        ({"settings": EvaluationSettings(steps=4)}, "The evaluation's steps differs: 3 and 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_was_measured_otherwise_is_not_mixed(made: Runs, change: dict[str, Any], message: str) -> None:
    first, other = made("first", {"accuracy": 0.5}), made("other", {"accuracy": 0.5}, **{"seed": 1, **change})
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        compare([first, other])
    assert f"({first} beside {other})" in str(refusal.value)
    assert "--force" in str(refusal.value)
    forced = compare([first, other], force=True)
    assert len(forced.warnings) == 1
    assert forced.warnings[0].startswith(message)


def test_other_metrics_make_no_unfair_comparison(made: Runs) -> None:
    folders = [
        made("a", {"accuracy": 0.5}, settings=EvaluationSettings(steps=3, metrics=("accuracy",))),
        made("b", {"ece": 0.5}, settings=EvaluationSettings(steps=3, metrics=("calibration",)), seed=1),
    ]
    found = compare(folders)
    assert table.rows_of(found.models) == {found.groups[0].title: {"accuracy": (None, None), "ece": (None, None)}}


def test_one_run_counts_once(made: Runs) -> None:
    run = made("run", {"accuracy": 0.5})
    assert len(compare([run, run.parent / "." / run.name, str(run)]).runs) == 1
    with pytest.raises(ValueError, match=r"has the settings and the seed of .*run, and would count twice"):
        compare([run, made("copy", {"accuracy": 0.5}, threads=1)])


def test_what_is_missing_is_named(made: Runs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs to compare"):
        compare([])
    with pytest.raises(FileNotFoundError, match="holds no run"):
        compare([tmp_path / "nowhere"])
    run = made("run", {})
    (run / "evaluation.json").unlink()
    with pytest.raises(FileNotFoundError, match="was not evaluated; 'rds-fast evaluate"):
        compare([run])


def test_the_page_of_runs_whose_models_are_gone(made: Runs) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra train")
    curve = {"sanity_radius": Curve("ε", "accuracy", (0.0, 0.5), (0.9, 0.1))}
    folders = [
        made("a <b>", {"accuracy": 0.9}, curves=curve, notes=("Gradients <may> be masked.",)),
        made("b", {"accuracy": 0.8}, curves=curve, objective="cross-entropy", notes=("Said of both.",)),
        made("c", {"accuracy": 0.7}, objective="cross-entropy", seed=1, split="validation"),
    ]
    found = compare(folders, force=True)
    page = report.render(found, title="A title", lead=report.lead_of(found))
    assert page.count("<svg ") == 1  # the curve; there are no histories
    assert "<h3>sanity radius</h3>" in page
    assert "density ‖∇ log p‖, λ = 0.5: Gradients &lt;may&gt; be masked." in page
    assert "No maps: " in page
    assert '<p class="warning">The splits differ: test and validation' in page
    assert "against cross-entropy" not in page  # no verdict on what does not stand beside each other fairly
    assert "a &lt;b&gt;" in page
    assert not re.search(r"<may>|<b>[^<]*</td>", page)
    outside = re.sub(r'src="data:[^"]*"', "", page)
    for foreign in ("http:", "https:", "//", "@import", "<script", "<link", "<iframe"):
        assert foreign not in outside


def test_the_same_runs_make_the_same_page(folders: list[Path]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra train")
    pages = {report.render(compare(order), title="t", lead="l") for order in (folders, folders[::-1])}
    assert len(pages) == 1


def test_where_data_and_teacher_lie_makes_no_kind_and_what_they_are_does(made: Runs) -> None:
    matching = {"objective": "gradient-matching", "data": "svhn"}
    same = {"training_data": "0a", "teacher": "1b"}
    folders = [
        made("a", {}, **matching, data_root="/a", teacher="/a/t", identity=same),
        made("b", {}, **matching, data_root="/b", teacher="/b/t", seed=1, workers=3, log_interval=7, identity=same),
        made("c", {}, **matching, data_root="/a", teacher="/a/t", identity=same | {"teacher": "2c"}),
    ]
    found = compare(folders)
    assert [(group.title, [run.folder.name for run in group.runs]) for group in found.groups] == [
        ("gradient matching of target logit, λ = 0.5, teacher = 1b", ["a", "b"]),
        ("gradient matching of target logit, λ = 0.5, teacher = 2c", ["c"]),
    ]
    old = [made(name, {}, data="svhn", data_root=root, seed=0) for name, root in (("d", "/d"), ("e", "/e"))]
    titles = [group.title for group in compare(old).groups]
    assert titles == [f"density ‖∇ log p‖, λ = 0.5, data root = {root}" for root in ("/d", "/e")]


def test_folders_of_named_data_make_no_difference(made: Runs) -> None:
    def settings(*ood_data: str) -> EvaluationSettings:
        return EvaluationSettings(ood_data=ood_data)

    one, other = made("a", {}, settings=settings("svhn=/a")), made("b", {}, settings=settings("svhn=/b"), seed=1)
    assert compare([one, other]).warnings == ()
    third = made("c", {}, settings=settings("imagefolder=/a"), seed=2)
    fourth = made("d", {}, settings=settings("imagefolder=/b"), seed=3)
    with pytest.raises(ValueError, match="The evaluation's ood_data differs"):
        compare([third, fourth])
