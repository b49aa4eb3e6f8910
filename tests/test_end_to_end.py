"""The main job as a user does it, on the real digits: train, be killed, resume, evaluate; choose weights; show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rds_fast.experiments import recipes

for package in ("typer", "rich", "safetensors", "matplotlib", "mlxtend"):
    pytest.importorskip(package, reason="needs the extra train")

ROOT = Path(__file__).resolve().parents[1]


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rds_fast", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: object) -> str:
    process = start(*arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def evaluated(run_dir: Path) -> dict[str, object]:
    record = json.loads((run_dir / "evaluation.json").read_text())
    assert record["split"] == "test"
    return {"samples": record["samples"], **record["scalars"]}


def test_train_is_killed_and_resumed_and_evaluated(tmp_path: Path) -> None:
    settings = ("--objective", "density", "--epochs", 6, "--device", "cpu", "--threads", 1)
    run("train", "--out", tmp_path / "straight", *settings)

    process = start("train", "--out", tmp_path / "killed", *settings)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    # A row of the fourth epoch: the checkpoint of the third is on the disk, and some steps after it will be lost.
    while not (metrics.exists() and '"epoch": 4' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    unfinished = start("evaluate", tmp_path / "killed")
    assert "is not finished" in unfinished.communicate()[1]
    assert unfinished.returncode == 1

    run("train", "--out", tmp_path / "killed", "--resume")
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "killed")]
    assert models[0] == models[1]

    attack = ("--steps", 10, "--device", "cpu")
    output = run("evaluate", tmp_path / "killed", *attack)
    run("evaluate", tmp_path / "straight", *attack)
    figures = evaluated(tmp_path / "killed")
    assert figures == evaluated(tmp_path / "straight")
    assert figures["samples"] == 1000
    assert figures["accuracy"] > 0.8
    assert 0.1 < figures["linf_accuracy"] < figures["l2_accuracy"] < figures["accuracy"]
    assert 0 < figures["share"] < 0.6  # of cross-entropy alone: about 0.66
    assert f"{100 * figures['accuracy']:.1f}%" in output


def test_weights_are_swept_and_demonstrated(tmp_path: Path) -> None:
    sweep = ("sweep", "--out", tmp_path / "sweep", "epochs=1", "weight=0.2,1", "evaluation.steps=2", "--test")
    output = run(*sweep, "variant=target-logit,input-gradient,density", "--device", "cpu", "--threads", 1)
    assert "[7/7]" in output
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert record["split"] == "validation"
    assert {trial["variant"] for trial in record["tests"]} == {*record["choices"]} == {*record["points"]}
    assert record["command"].startswith("rds-fast sweep --out")

    demo = ("demo", "--out", tmp_path / "demo", "--weights", tmp_path / "sweep", "--epochs", 1, "--seeds", 1)
    for _ in range(2):  # the second replaces the first, without a flag
        output = run(*demo, "--steps", 2, "--limit", 50, "--device", "cpu", "--threads", 1)
    page = Path(re.search(r"^report: (.*report\.html)", output, re.MULTILINE)[1]).read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    variants = recipes.load("block-mnist").variants
    for name, choice in record["choices"].items():
        weight = f", λ = {choice['settings']['weight']:g}" if choice["settings"] else ""
        assert f"{variants[name].title}{weight}" in page
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "cross-entropy-seed0",
        "density-seed0",
        "input-gradient-seed0",
        "report.html",
        "target-logit-seed0",
    ]


@pytest.mark.parametrize("package", ["typer", "rich", "matplotlib"])
def test_a_missing_extra_is_named_before_any_work(tmp_path: Path, package: str) -> None:
    script = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
for name in list(sys.modules):
    if name.partition(".")[0] == {package!r}:
        del sys.modules[name]
from rds_fast.__main__ import main
sys.argv = ["rds-fast", "demo", "--out", {str(tmp_path / "demo")!r}]
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {package} is not installed")
    assert "pip install 'rds_fast[train]'" in result.stderr
    assert not (tmp_path / "demo").exists()
