"""The rule that chooses a weight, and the sweep that applies it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rds_fast.evaluation import sweep as module
from rds_fast.evaluation.demo import SHOWN, chosen_weights
from rds_fast.evaluation.evaluate import EvaluationSettings
from rds_fast.evaluation.sweep import BASELINE, PENALTIES, Candidate, Choice, average, choices, choose, sweep
from rds_fast.training import TrainingConfig


def candidates(*rows: tuple[float, float, float]) -> list[Candidate]:
    return [Candidate("density", *row) for row in rows]


def test_the_most_robust_within_two_points_is_chosen() -> None:
    rows = candidates((0.1, 0.93, 0.20), (0.5, 0.92, 0.40), (1.0, 0.91, 0.35), (2.0, 0.90, 0.60))
    assert choose(rows, 0.93) == Choice(0.5, within_margin=True, at_edge=False)


def test_exactly_two_points_are_within() -> None:
    rows = candidates((0.1, 0.93, 0.20), (0.5, 0.91, 0.40), (1.0, 0.9099, 0.50))
    assert 0.93 - 0.91 > 0.02  # in floating point
    assert choose(rows, 0.93).weight == 0.5


def test_a_candidate_above_the_baseline_is_within() -> None:
    assert choose(candidates((0.1, 0.99, 0.1), (0.5, 0.98, 0.2), (1.0, 0.5, 0.9)), 0.9).weight == 0.5


def test_none_within_the_margin_takes_the_most_accurate_and_says_so() -> None:
    rows = candidates((0.1, 0.80, 0.20), (0.5, 0.85, 0.10), (1.0, 0.70, 0.60))
    assert choose(rows, 0.93) == Choice(0.5, within_margin=False, at_edge=False)


@pytest.mark.parametrize(
    ("rows", "weight"),
    [
        ([(0.1, 0.92, 0.4), (0.5, 0.93, 0.4), (1.0, 0.91, 0.4)], 0.5),  # equally robust: the more accurate
        ([(1.0, 0.92, 0.4), (0.5, 0.92, 0.4), (2.0, 0.92, 0.4)], 0.5),  # equal in both: the smaller weight
        ([(1.0, 0.5, 0.2), (0.5, 0.5, 0.4)], 0.5),  # none within, equally accurate: the more robust
        ([(1.0, 0.5, 0.4), (0.5, 0.5, 0.4)], 0.5),  # none within, equal in both: the smaller weight
    ],
)
def test_ties(rows: list[tuple[float, float, float]], weight: float) -> None:
    assert choose(candidates(*rows), 0.93).weight == weight
    assert choose(candidates(*reversed(rows)), 0.93).weight == weight


def test_a_choice_at_the_edge_of_the_candidates_is_flagged() -> None:
    rows = candidates((0.1, 0.93, 0.2), (0.5, 0.93, 0.3), (1.0, 0.93, 0.4))
    assert choose(rows, 0.93).at_edge
    assert choose(rows[:1], 0.93).at_edge


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        choose([], 0.9)


def trial(objective: str, weight: float, seed: int, accuracy: float, robust: float) -> dict[str, object]:
    figures = {"accuracy": accuracy, "linf_accuracy": robust}
    return {"objective": objective, "weight": weight, "seed": seed, "figures": figures}


def test_figures_are_averaged_over_the_seeds_asked_for() -> None:
    trials = [
        trial(BASELINE, 0.0, 0, 0.90, 0.0),
        trial(BASELINE, 0.0, 1, 0.94, 0.0),
        trial(BASELINE, 0.0, 2, 0.10, 0.0),
        trial("density", 0.5, 0, 0.95, 0.2),
        trial("density", 0.5, 1, 0.89, 0.4),
        trial("density", 1.0, 0, 0.91, 0.9),
        trial("density", 1.0, 1, 0.80, 0.9),
    ]
    assert average(trials, "density", 0.5, (0, 1)) == Candidate("density", 0.5, pytest.approx(0.92), pytest.approx(0.3))
    assert choices(trials, ["density"], [0.5, 1.0], (0, 1))["density"]["weight"] == 0.5
    assert choices(trials, ["density"], [0.5, 1.0], (0,))["density"]["weight"] == 1.0


BASE = TrainingConfig(epochs=1, threads=1, device="cpu")
SETTINGS = EvaluationSettings(steps=2)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, splits) -> list[str]:
    """Sweeps on few digits; the names of the runs that were trained."""
    pytest.importorskip("safetensors", reason="needs the extra train")
    trained: list[str] = []
    train = module.train

    def counting(config, run_dir, **arguments):
        trained.append(run_dir.name)
        return train(config, run_dir, **arguments)

    monkeypatch.setattr(module, "train", counting)
    monkeypatch.setattr(TrainingConfig, "load_data", lambda config: splits)
    return trained


def test_a_sweep_trains_each_candidate_once_and_resumes(tmp_path: Path, counted: list[str]) -> None:
    stopped_after = 3

    def stop(_: str) -> None:
        if len(counted) == stopped_after:
            raise KeyboardInterrupt

    arguments = {"objectives": ["density", "input-gradient"], "weights": [0.5, 0.1]}
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, BASE, SETTINGS, **arguments, report=stop)
    assert "choices" not in json.loads((tmp_path / "sweep.json").read_text())

    stopped_after = -1
    record = sweep(tmp_path, BASE, SETTINGS, **arguments, command="rds-fast sweep", report=stop)
    assert counted == [
        "cross-entropy-0-seed0",
        "density-0.1-seed0",
        "density-0.5-seed0",
        "input-gradient-0.1-seed0",
        "input-gradient-0.5-seed0",
    ]
    assert json.loads((tmp_path / "sweep.json").read_text()) == record
    assert [trial["weight"] for trial in record["trials"]] == [0.0, 0.1, 0.5, 0.1, 0.5]
    assert {trial["figures"]["samples"] for trial in record["trials"]} == {60}  # of the validation split
    assert record["choices"] == choices(record["trials"], ["density", "input-gradient"], (0.1, 0.5), (0,))
    assert record["command"] == "rds-fast sweep"
    config = json.loads((tmp_path / "input-gradient-0.5-seed0" / "config.json").read_text())["settings"]
    shown = {name: config[name] for name in ("objective", "of", "weight", "p", "power", "epochs")}
    assert shown == {
        "objective": "input-gradient",
        "of": "cross_entropy",
        "weight": 0.5,
        "p": 2.0,
        "power": 1.0,
        "epochs": 1,
    }

    sweep(tmp_path, BASE, SETTINGS, **arguments, report=stop)
    assert len(counted) == 5


def test_a_sweep_with_other_settings_does_not_go_on(tmp_path: Path, counted: list[str]) -> None:
    arguments = {"objectives": ["density"], "weights": [0.1], "report": lambda _: None}
    sweep(tmp_path, BASE, SETTINGS, **arguments)
    with pytest.raises(ValueError, match=r"other settings \(evaluation\)"):
        sweep(tmp_path, BASE, EvaluationSettings(steps=3), **arguments)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        sweep(tmp_path, BASE, SETTINGS, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": ["densty"]}, "did you mean 'density'"),
        ({"objectives": []}, "at least one"),
        ({"weights": []}, "at least one"),
        ({"weights": [0.0, 0.1]}, "above 0"),
        ({"seeds": [0, 0]}, "each seed once"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(tmp_path / "new", BASE, SETTINGS, **change)
    assert not (tmp_path / "new").exists()


def test_the_weights_that_ship_follow_from_the_trials_that_ship() -> None:
    record = chosen_weights()
    assert record["split"] == "validation"
    assert set(record["choices"]) == set(PENALTIES)
    assert record["choices"] == choices(record["trials"], PENALTIES, record["weights"], record["seeds"])
    counts = {name: sum(t["objective"] == name for t in record["trials"]) for name in PENALTIES}
    assert set(counts.values()) == {len(record["weights"]) * len(record["seeds"])}
    assert set(SHOWN) - {BASELINE} <= set(record["choices"])
    assert TrainingConfig.from_settings(record["training"]).data == "block-mnist"


def test_a_record_that_will_not_do_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"sweep\.json"):
        chosen_weights(tmp_path)
    path = tmp_path / "sweep.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="no record"):
        chosen_weights(path)
    path.write_text(json.dumps({"training": {}, "trials": [], "weights": [], "seeds": [], "command": ""}))
    with pytest.raises(ValueError, match="target-logit, input-gradient, density"):
        chosen_weights(tmp_path)
