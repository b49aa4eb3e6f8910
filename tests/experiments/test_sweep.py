"""Sweeps: each run once, whatever happens; the choice; the chosen runs on the test split."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rds_fast.experiments import recipes
from rds_fast.experiments import sweep as module
from rds_fast.experiments.chosen import measure_chosen
from rds_fast.experiments.demo import SHOWN, chosen_weights
from rds_fast.experiments.plan import Plan
from rds_fast.experiments.sweep import average, choices, sweep
from rds_fast.training import TrainingConfig
from rds_fast.training.processes import alone

pytest.importorskip("safetensors", reason="needs the extra train")

ROOT = Path(__file__).resolve().parents[2]

TINY = """
title = "an example"
source = "nobody 2020"
variant = "density"
[training]
data = "synthetic"
image_size = 8
classes = 3
train_size = 64
model = "cnn"
batch_size = 8
epochs = 2
device = "cpu"
threads = 1
checkpoint_interval = 3
[variants.plain]
objective = "cross-entropy"
[variants.gradient]
objective = "input-gradient"
[variants.density]
objective = "density"
[sweep]
grid.weight = [0.1, 0.5]
[evaluation]
steps = 2
"""
RECIPE = recipes.parse("tiny", TINY)
PLAN = Plan(RECIPE)
CHOOSING = RECIPE.settings(choosing=True)
RUNS = ["plain-seed0", *(f"{name}-weight{weight}-seed0" for name in ("gradient", "density") for weight in (0.1, 0.5))]


def quiet(line: str) -> None:
    pass


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that are trained."""
    trained: list[str] = []
    train = module.train

    def counting(config: TrainingConfig, run_dir: Path, **arguments: Any) -> Any:
        trained.append(run_dir.name)
        return train(config, run_dir, **arguments)

    monkeypatch.setattr(module, "train", counting)
    return trained


def test_each_run_is_trained_once_and_a_sweep_goes_on(tmp_path: Path, counted: list[str]) -> None:
    def stop(_: str) -> None:
        if len(counted) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(PLAN, tmp_path, CHOOSING, report=stop)
    assert json.loads((tmp_path / "sweep.json").read_text())["choices"] == {}
    record = sweep(PLAN, tmp_path, CHOOSING, command="rds-fast sweep tiny", report=quiet)
    assert counted == RUNS
    assert json.loads((tmp_path / "sweep.json").read_text()) == record
    assert [trial["settings"] for trial in record["trials"]] == [{}, *2 * ({"weight": 0.1}, {"weight": 0.5})]
    assert {tuple(trial["figures"]) for trial in record["trials"]} == {("accuracy", "linf_accuracy", "l2_accuracy")}
    evaluation = json.loads((tmp_path / RUNS[0] / "evaluation.json").read_text())
    assert evaluation["split"] == record["split"] == "validation"
    assert record["choices"] == choices(record)
    assert record["command"] == "rds-fast sweep tiny"
    assert (record["recipe"], record["source"]) == ("tiny", "nobody 2020")

    more = Plan(RECIPE, axes={"weight": [0.1, 0.5, 1.0]}, variants=["density"], seeds=(0, 1))
    record = sweep(more, tmp_path, CHOOSING, report=quiet)  # with more runs: those that are done stay
    assert counted[5:] == ["plain-seed1", "density-weight0.1-seed1", "density-weight0.5-seed1"] + [
        f"density-weight1.0-seed{seed}" for seed in (0, 1)
    ]
    assert set(record["choices"]) == {"plain", "density"}
    assert record["seeds"] == [0, 1]


def test_a_run_whose_figures_were_not_recorded_is_not_repeated(tmp_path: Path, counted: list[str]) -> None:
    """As when the process dies after the evaluation, or after the training, of a run."""
    before = sweep(PLAN, tmp_path, CHOOSING, report=quiet)
    (tmp_path / "sweep.json").unlink()
    (tmp_path / RUNS[1] / "evaluation.json").unlink()
    times = {name: (tmp_path / name / "evaluation.json").stat().st_mtime_ns for name in (RUNS[0], *RUNS[2:])}
    after = sweep(PLAN, tmp_path, CHOOSING, report=quiet)
    assert after == before
    assert counted == RUNS
    assert times == {name: (tmp_path / name / "evaluation.json").stat().st_mtime_ns for name in times}


def test_a_sweep_with_other_settings_does_not_go_on(tmp_path: Path) -> None:
    few = Plan(RECIPE, axes={"weight": [0.1]}, variants=["density"])
    sweep(few, tmp_path, CHOOSING, report=quiet)
    with pytest.raises(ValueError, match=r"other settings \(evaluation\)"):
        sweep(few, tmp_path, RECIPE.settings({"steps": 3}, choosing=True), report=quiet)
    with pytest.raises(ValueError, match=r"other settings \(training\)"):
        sweep(Plan(RECIPE, {"epochs": 3}), tmp_path, CHOOSING, report=quiet)
    other = recipes.parse("tiny", TINY.replace('"density"\n[sweep]', '"density"\npower = 2\n[sweep]'))
    with pytest.raises(ValueError, match=r"other settings \(density\)"):
        sweep(Plan(other), tmp_path, CHOOSING, report=quiet)
    for content in ("{", "[]", "{}"):
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(ValueError, match=r"sweep\.json is (damaged|no record of a sweep)"):
            sweep(few, tmp_path, CHOOSING, report=quiet)


def test_two_sweeps_do_not_meet_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with alone(tmp_path, module.ANOTHER), pytest.raises(ValueError, match="another sweep is running in"):
        sweep(PLAN, tmp_path, CHOOSING, report=quiet)


def test_a_run_that_diverges_is_recorded_and_not_chosen(tmp_path: Path, counted: list[str]) -> None:
    plan = Plan(RECIPE, {"optimizer": "sgd", "lr": 0.01}, {"weight": [0.1, 1e38]}, ["density"])
    lines: list[str] = []
    record = sweep(plan, tmp_path, CHOOSING, report=lines.append)
    assert "not finite" in record["trials"][-1]["error"]
    assert "diverged" in lines[-1]
    assert record["choices"]["density"]["settings"] == {"weight": 0.1}
    assert sweep(plan, tmp_path, CHOOSING, report=quiet)["trials"] == record["trials"]
    assert len(counted) == 3  # nor is it tried again
    with pytest.raises(ValueError, match="every run of density diverged"):
        sweep(Plan(RECIPE, plan.changes, {"weight": [1e38]}, ["density"]), tmp_path, CHOOSING, report=quiet)


def test_the_measure_has_to_be_measured(tmp_path: Path, counted: list[str]) -> None:
    other = recipes.parse("tiny", TINY.replace("[sweep]", '[sweep]\nmeasure = "worst_group_accuracy"'))
    with pytest.raises(ValueError, match="chooses by worst_group_accuracy and metrics is accuracy,pgd; add groups"):
        sweep(Plan(other, variants=["density"]), tmp_path, CHOOSING, report=quiet)
    with pytest.raises(ValueError, match="chooses by linf_accuracy and metrics is accuracy; add pgd"):
        sweep(PLAN, tmp_path, RECIPE.settings({"metrics": ["accuracy"]}, choosing=True), report=quiet)
    assert counted == []
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_measured_is_said_before_any_training(tmp_path: Path, counted: list[str]) -> None:
    groups = RECIPE.settings({"metrics": ["accuracy", "pgd", "groups"]})
    with pytest.raises(ValueError, match="the metric groups cannot be measured: these data have no groups"):
        sweep(PLAN, tmp_path, groups, report=quiet)
    with pytest.raises(ValueError, match="the metric groups cannot be measured: these data have no groups"):
        sweep(PLAN, tmp_path / "new", CHOOSING, test=groups, report=quiet)
    assert counted == []
    assert not (tmp_path / "new").exists()


def test_the_chosen_are_measured_on_the_test_split_once(tmp_path: Path) -> None:
    record = sweep(PLAN, tmp_path, CHOOSING, report=quiet)
    lines: list[str] = []
    found = measure_chosen(tmp_path, record, RECIPE.settings(), report=lines.append)
    assert set(found) == {"plain", "gradient", "density"}
    assert len(lines) == 3
    for variant, (figures,) in found.items():
        weight = record["choices"][variant]["settings"].get("weight")
        run = tmp_path / (f"{variant}-weight{weight}-seed0" if weight else f"{variant}-seed0")
        evaluation = json.loads((run / "evaluation.json").read_text())
        assert (evaluation["split"], evaluation["scalars"]) == ("test", figures)
        assert "gradient_norm" in figures  # not what was measured for the choice alone
    stored = module.read(tmp_path / "sweep.json")
    assert measure_chosen(tmp_path, stored, RECIPE.settings(), report=lines.append) == found
    assert len(lines) == 3
    measure_chosen(tmp_path, stored, RECIPE.settings({"steps": 1}), report=lines.append)
    assert len(lines) == 6
    # The choice is the validation split's still, and a sweep goes on beside the test's figures.
    again = sweep(PLAN, tmp_path, CHOOSING, report=quiet)
    assert (again["choices"], again["trials"]) == (record["choices"], record["trials"])


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rds_fast", "sweep", str(recipe), "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--threads", "1"], env=environment, **pipes)


def wait_for_files(out: Path, number: int, process: subprocess.Popen[str]) -> None:
    """Until so many files have been written below a folder, or the process is done."""
    while process.poll() is None and sum(1 for path in out.rglob("*") if path.is_file()) < number:
        time.sleep(0.002)


def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    """SIGKILL, after a random number of files and a random time: what was done stays, and the end is the same."""
    pytest.importorskip("rich", reason="needs the extra train")
    pytest.importorskip("typer", reason="needs the extra train")
    recipe, out, generator = tmp_path / "tiny.toml", tmp_path / "killed", random.Random(0)
    recipe.write_text(TINY)
    finished: dict[Path, tuple[int, int]] = {}
    kills = 0
    for round_ in range(3):
        process = start(recipe, out)
        present = sum(1 for path in out.rglob("*") if path.is_file())
        wait_for_files(out, present + generator.randrange(2, 9), process)
        time.sleep(generator.uniform(0, 0.05))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        for path, known in finished.items():  # a finished run is never begun again
            assert (path.stat().st_mtime_ns, path.stat().st_ino) == known, round_
        finished |= {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.glob("*/model.safetensors")}
    assert kills >= 2
    process = start(recipe, out)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    for path, known in finished.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == known

    plan = Plan(recipes.load(str(recipe)), {"device": "cpu", "threads": 1})
    straight = sweep(plan, tmp_path / "straight", CHOOSING, report=quiet)
    killed = module.read(out / "sweep.json")
    assert (killed["trials"], killed["choices"]) == (straight["trials"], straight["choices"])
    for name in RUNS:  # the same weights, and each step and epoch once
        models = [(folder / name / "model.safetensors").read_bytes() for folder in (out, tmp_path / "straight")]
        assert models[0] == models[1]
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [8, 16]
    assert not list(out.rglob("*.tmp"))


def test_figures_are_averaged_over_the_seeds_asked_for() -> None:
    def trial(variant: str, weight: float | None, seed: int, accuracy: float, robust: float) -> dict[str, Any]:
        figures = {"accuracy": accuracy, "linf_accuracy": robust}
        settings = {} if weight is None else {"weight": weight}
        return {"variant": variant, "settings": settings, "seed": seed, "figures": figures}

    trials = [
        trial("plain", None, 0, 0.90, 0.0),
        trial("plain", None, 1, 0.94, 0.0),
        trial("plain", None, 2, 0.10, 0.0),
        trial("density", 0.5, 0, 0.95, 0.2),
        trial("density", 0.5, 1, 0.89, 0.4),
        trial("density", 1.0, 0, 0.91, 0.9),
        trial("density", 1.0, 1, 0.80, 0.9),
    ]
    mean = average(trials, "density", {"weight": 0.5}, (0, 1), "linf_accuracy")
    assert (mean.accuracy, mean.measure) == (pytest.approx(0.92), pytest.approx(0.3))
    record = {
        "trials": trials,
        "points": {"plain": [{}], "density": [{"weight": 0.5}, {"weight": 1.0}]},
        "selection": {"baseline": "plain", "measure": "linf_accuracy", "margin": 0.02},
    }
    assert choices(record | {"seeds": [0, 1]})["density"]["settings"] == {"weight": 0.5}
    assert choices(record | {"seeds": [0]})["density"]["settings"] == {"weight": 1.0}


def test_the_weights_that_ship_follow_from_the_trials_that_ship() -> None:
    record = chosen_weights()
    recipe = recipes.load("block-mnist")
    assert record["split"] == "validation"
    assert record["choices"] == choices(record)
    assert record["training"] == dict(recipe.training)
    assert record["variants"] == {
        name: {"title": variant.title, "settings": variant.settings} for name, variant in recipe.variants.items()
    }
    plan = Plan(recipe, seeds=record["seeds"])
    assert record["points"] == {name: [settings for settings, _ in plan.points(name)] for name in recipe.variants}
    wanted = {trial.key for trial in plan.trials}
    assert {module.key(t["variant"], t["settings"], t["seed"]) for t in record["trials"]} == wanted
    assert len(record["trials"]) == len(wanted)
    assert set(SHOWN) <= set(record["choices"])


def test_a_record_that_will_not_do_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"sweep\.json"):
        chosen_weights(tmp_path)
    path = tmp_path / "sweep.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="no record"):
        chosen_weights(path)
    path.write_text(json.dumps(chosen_weights() | {"choices": {}}))
    with pytest.raises(ValueError, match="holds nothing for cross-entropy, target-logit, input-gradient, density"):
        chosen_weights(tmp_path)
