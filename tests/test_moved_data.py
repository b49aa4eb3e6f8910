"""Runs whose data lie elsewhere now: trained on, evaluated, compared and swept on, as a user does it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "training"))
import image_files

for package in ("typer", "rich", "matplotlib", "safetensors"):
    pytest.importorskip(package, reason="needs the extra train")
if importlib.util.find_spec("torchvision") is None:  # importing it here would change what the command meets
    pytest.skip("needs torchvision", allow_module_level=True)

Call = Callable[..., tuple[int, str, str]]
SMALL = (
    "--image-size",
    16,
    "--model",
    "cnn",
    "--epochs",
    1,
    "--batch-size",
    4,
    "--workers",
    0,
    "--threads",
    1,
    "--quiet",
)
EVALUATE = ("--split", "validation", "--metrics", "accuracy", "--threads", 1, "--device", "cpu")


@pytest.fixture
def run(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on images beside it, with a root relative to a working folder in which nothing else happens."""
    image_files.write(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert call("train", "--out", out, "--data", "imagefolder", "--data-root", "images", *SMALL)[0] == 0
    monkeypatch.chdir("/")
    return out


def settings(run: Path, file: str, part: str) -> dict[str, object]:
    return json.loads((run / file).read_text(encoding="utf-8"))[part]


def test_a_relative_root_is_kept_as_what_it_meant(run: Path, call: Call) -> None:
    assert settings(run, "config.json", "settings")["data_root"] == str(run.parent / "images")
    code, _, errors = call("evaluate", run, *EVALUATE, "--no-page")
    assert code == 0, errors


def test_what_was_downloaded_once_is_not_fetched_again(run: Path, call: Call) -> None:
    """Else an evaluation on another machine would begin by fetching the data into a folder that is not even there."""
    content = json.loads((run / "config.json").read_text(encoding="utf-8"))
    content["settings"]["download"] = True
    (run / "config.json").write_text(json.dumps(content), encoding="utf-8")
    for words in (("evaluate", run, *EVALUATE, "--no-page"), ("train", "--out", run, "--resume")):
        code, _, errors = call(*words)  # an imagefolder with --download is refused
        assert code == 0, errors


def test_data_that_moved_are_evaluated_and_compared(run: Path, call: Call, tmp_path: Path) -> None:
    moved = shutil.move(tmp_path / "images", tmp_path / "moved")
    code, _, errors = call("evaluate", run, *EVALUATE)
    assert code == 1
    assert errors.endswith(f"If the data of {run} lie elsewhere now, give --data-root\n")
    code, _, errors = call("evaluate", run, *EVALUATE, "--data-root", moved, "--workers", 1)
    assert code == 0, errors
    assert settings(run, "evaluation.json", "training")["data_root"] == str(moved)
    assert settings(run, "config.json", "settings")["data_root"] == str(
        tmp_path / "images"
    )  # evaluating changes no run
    page = tmp_path / "page.html"
    moved = shutil.move(moved, tmp_path / "again")
    assert call("compare", run, "--out", page)[0] == 0
    assert "No maps: the data root" in page.read_text(encoding="utf-8")
    code, _, errors = call("compare", run, "--out", page, "--data-root", moved)
    assert code == 0, errors
    assert page.read_text(encoding="utf-8").count('<img src="data:image/png;base64,') == 6  # three samples, their maps
    code, _, errors = call("compare", run, "--csv", "--data-root", moved)
    assert errors == "error: --data-root is given and no page is written, which alone shows images; give --out\n"


def test_data_that_moved_are_trained_on(run: Path, call: Call, tmp_path: Path) -> None:
    moved = shutil.move(tmp_path / "images", tmp_path / "moved")
    code, _, errors = call("train", "--out", run, "--resume")
    assert code == 1
    assert errors.endswith(f"If the data of {run} lie elsewhere now, give --data-root\n")
    here = ("--data-root", moved, "--workers", 1, "--log-interval", 3, "--device", "cpu")
    code, _, errors = call("train", "--out", run, "--resume", *here)
    assert code == 0, errors
    assert call("evaluate", run, *EVALUATE, "--no-page")[0] == 0  # which finds them where training did
    code, _, errors = call("train", "--out", run, "--resume", "--batch-size", 2)
    assert "batch_size was 4 and is now 2" in errors


def test_other_data_of_the_same_size_are_refused(run: Path, call: Call, tmp_path: Path) -> None:
    other = shutil.copytree(tmp_path / "images", tmp_path / "other")
    image_files.write_picture(other / "train" / "blue" / "0.png", (9, 9, 9))
    code, _, errors = call("train", "--out", run, "--resume", "--data-root", other)
    assert code == 1
    assert "cannot be resumed: the labels or the pixels of its training data are not what they were" in errors
    (other / "val" / "blue").rename(other / "val" / "cyan")
    (other / "train" / "blue").rename(other / "train" / "cyan")
    code, _, errors = call("evaluate", run, *EVALUATE, "--data-root", other)
    assert code == 1
    assert "class_names of these data is ['cyan', 'green', 'red'] and was ['blue', 'green', 'red'] in the" in errors


def test_a_run_that_cannot_be_written_into_is_not_measured(
    run: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (run, os.W_OK))
    code, _, errors = call("evaluate", run, *EVALUATE)
    assert code == 1
    assert errors.startswith(f"error: the folder {run} cannot be written into, and evaluation.json belongs there; copy")


def test_an_empty_root_is_not_this_folder(call: Call, tmp_path: Path) -> None:
    code, _, errors = call("train", "--data", "imagefolder", "--data-root", "", "--out", tmp_path / "run")
    assert (code, errors) == (1, "error: data_root is empty; give a folder (. is this one), or leave it out\n")


def test_a_place_without_effect_is_named(call: Call, tmp_path: Path) -> None:
    small = ("--image-size", 8, "--classes", 3, "--train-size", 24, "--model", "cnn", "--epochs", 1, "--quiet")
    assert call("train", "--out", tmp_path / "run", "--data", "synthetic", *small, "--threads", 1)[0] == 0
    code, _, errors = call("evaluate", tmp_path / "run", *EVALUATE, "--data-root", tmp_path)
    assert code == 1
    assert errors.startswith("error: --data-root would have no effect: it belongs to data ")


def test_a_sweep_whose_data_moved_goes_on(call: Call, tmp_path: Path) -> None:
    images, out = image_files.write(tmp_path / "a,b", ("train", "val", "test")), tmp_path / "sweep"
    words = ("block-mnist", "data=imagefolder", "image_size=16", "model=cnn", "epochs=1", "batch_size=4", "workers=0")
    words += ("variant=density", "evaluation.steps=1", "evaluation.metrics=accuracy,pgd", "--threads", 1, "--out", out)
    code, output, errors = call("sweep", *words, "weight=1", f"data_root={images}")
    assert code == 0, errors
    moved = shutil.move(images, tmp_path / "moved")
    code, output, errors = call("sweep", *words, "weight=1,2", f"data_root={moved}", "log_interval=3", "--test")
    assert code == 0, errors
    assert "[1/1] density-weight2.0-seed0" in output  # the others stay
    assert settings(out, "sweep.json", "training")["data_root"] == str(moved)
    assert len(settings(out, "sweep.json", "tests")) == 2
