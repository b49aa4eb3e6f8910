"""The folder of a training run.

config.json                  the settings, what is known of the data, the versions, the commit where it is known
metrics.jsonl                one row a logging interval and an epoch
checkpoint/last.safetensors  everything that --resume needs
model.safetensors            the trained model, once the run is finished
evaluation.json              the figures of the model, written by rds-fast evaluate
evaluation.html              the same as a page
non_finite_batch.json        the step and the samples at which a loss was not finite, if that happened
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoints, data, models
from .checkpoints import TEMPORARY
from .config import TrainingConfig
from .data.lists import read_text
from .names import readable
from .processes import LOCK

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint/last.safetensors"
MODEL = "model.safetensors"
EVALUATION = "evaluation.json"
EVALUATION_PAGE = "evaluation.html"
NON_FINITE = "non_finite_batch.json"

# Before runs described their data there were the sets of the MNIST family alone, all of ten classes.
_UNDESCRIBED = {"classes": 10}


def versions() -> dict[str, str | None]:
    """The versions of what computes, and the commit of this package where it is a git checkout."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("rds_fast", "torch", "torchvision", "triton", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["commit"] = _commit()
    return found


def _commit() -> str | None:
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():  # else git would find whatever repository the environment lies in
        return None
    try:
        command = ["git", "-C", str(package), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def check_free(run_dir: Path, overwrite: bool) -> None:
    """Whether a new run may be made in a folder.

    Raises:
        FileExistsError: it holds a run and ``overwrite`` is False, or it holds something that is no run.
    """
    if (run_dir / CONFIG).exists():
        if not overwrite:
            raise FileExistsError(f"{run_dir} holds a run already; --resume continues it, --overwrite replaces it")
    elif not all(map(_is_leftover, run_dir.iterdir())):
        raise FileExistsError(f"{run_dir} holds files and no run; give another folder, or an empty one")


def _is_leftover(path: Path) -> bool:
    """Whether a file or folder is what a process leaves that is killed while it makes the folder of a run."""
    if path.name == Path(CHECKPOINT).parent.name and path.is_dir():
        return all(map(_is_leftover, path.iterdir()))
    return path.name == LOCK or path.match(TEMPORARY)


def remove_temporaries(run_dir: Path) -> None:
    """Delete what killed processes left half written: nobody would ever finish it."""
    for folder in (run_dir, (run_dir / CHECKPOINT).parent):
        for path in folder.glob(TEMPORARY):
            path.unlink()


def create(
    run_dir: Path, config: TrainingConfig, split: data.Split, evaluation: Mapping[str, Any] | None = None
) -> None:
    """Make the folder of a new run on a training split, without an earlier run's files, and write its config.json.

    ``evaluation``: settings of the evaluation that belong to the experiment, to be taken where none are given.
    """
    files = (CHECKPOINT, MODEL, METRICS, EVALUATION, EVALUATION_PAGE, NON_FINITE, CONFIG)
    for name in files:  # these alone: never a whole folder
        (run_dir / name).unlink(missing_ok=True)
    (run_dir / CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": json.loads(config.to_json()), "data": _description(split)}
    content |= {"identity": _identity(config, split), "versions": versions(), "evaluation": dict(evaluation or {})}
    _write(run_dir, content)


def _write(run_dir: Path, content: Mapping[str, Any]) -> None:
    checkpoints.write_atomically(run_dir / CONFIG, json.dumps(content, indent=2).encode() + b"\n")


def keep_place(run_dir: Path, config: TrainingConfig) -> None:
    """Note in config.json where a run goes on: what reads it later has to find the data there."""
    content = json.loads(read_text(run_dir / CONFIG))
    settings = json.loads(config.to_json())
    if content["settings"] != settings:
        _write(run_dir, content | {"settings": settings})


def _description(split: data.Split) -> dict[str, Any]:
    """What a run has to know of its training data beyond its settings."""
    names = None if split.class_names is None else list(map(readable, split.class_names))
    return {"samples": len(split), "classes": split.classes, "class_names": names}


def _identity(config: TrainingConfig, split: data.Split) -> dict[str, str]:
    """Digests of what lies outside of a run and decides it, by which it is known again wherever it lies."""
    found = {"training_data": data.fingerprint(split)}
    teacher = Path(config.teacher or "") / MODEL
    if config.objective == "gradient-matching" and teacher.is_file():  # else the objective says that it is missing
        with open(teacher, "rb") as file:
            found["teacher"] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return found


def _content(run_dir: Path) -> dict[str, Any]:
    """What config.json holds: the settings of a run, the description of its data, and its evaluation's settings."""
    path = run_dir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_dir} holds no run: there is no {CONFIG}; 'rds-fast train --out {run_dir}' makes one"
        )
    try:
        content = json.loads(read_text(path))
        return {
            "settings": dict(content["settings"]),
            "data": dict(content.get("data", _UNDESCRIBED)),
            "identity": dict(content.get("identity", {})),
            "evaluation": dict(content.get("evaluation", {})),
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); expected the settings of a run. Restore it, from another run of the same "
            "settings if need be, or start the run again in an empty folder"
        ) from error


def _read(run_dir: Path) -> tuple[TrainingConfig, dict[str, Any]]:
    """The settings of a run, and the description of its data. What was downloaded once is not asked for again."""
    content = _content(run_dir)
    return TrainingConfig.from_settings(content["settings"] | {"download": False}), content["data"]


def read_config(run_dir: Path) -> TrainingConfig:
    """The settings of a run.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: its config.json is damaged or of another version.
    """
    return _read(run_dir)[0]


def read_evaluation_settings(run_dir: Path) -> dict[str, Any]:
    """The settings of the evaluation that belong to the experiment of a run; none where it belongs to none.

    Raises:
        As ``read_config``.
    """
    return _content(run_dir)["evaluation"]


def read_identity(run_dir: str | Path) -> dict[str, str]:
    """Digests of the training data and the teacher of a run; none where it was made by an earlier version.

    Raises:
        As ``read_config``.
    """
    return _content(Path(run_dir))["identity"]


def check_same(run_dir: Path, config: TrainingConfig) -> None:
    """Raises ValueError, naming each difference, if a run was made with other settings than ``config``."""
    differences = read_config(run_dir).differences(config)
    if differences:
        listed = "; ".join(f"{name} was {old!r} and is now {new!r}" for name, (old, new) in differences.items())
        raise ValueError(
            f"{run_dir} cannot be resumed with other settings: {listed}. Leave them out, or start a new run"
        )


def check_same_data(run_dir: Path, config: TrainingConfig, split: data.Split) -> None:
    """Raises ValueError if a run was made with other training data, or with another teacher, than lie there now."""
    content, description = _content(run_dir), _description(split)
    before = content["data"]
    for name, value in description.items():
        if name in before and before[name] != value:
            found = f"{name} was {before[name]!r} and is now {value!r}"
            raise ValueError(
                f"{run_dir} cannot be resumed with other data: {found}. Restore the data, or start a new run"
            )
    changed = {
        "training_data": "the labels or the pixels of its training data are not what they were. Give --data-root with "
        "the data that it began with, or start a new run; where another version of Pillow alone is the reason, take "
        f"'training_data' out of {CONFIG}",
        "teacher": f"the weights in {config.teacher} are not those of its teacher. Give --teacher with the one that it "
        "began with, or start a new run",
    }
    for name, digest in _identity(config, split).items():
        if content["identity"].get(name, digest) != digest:
            raise ValueError(f"{run_dir} cannot be resumed: {changed[name]}")


def check_same_classes(run_dir: str | Path, split: data.Split) -> None:
    """Raises ValueError if a split's classes are not those that a run's model tells apart."""
    before, now = _read(Path(run_dir))[1], _description(split)
    for name in ("classes", "class_names"):
        if before.get(name) is not None and before[name] != now[name]:
            raise ValueError(
                f"{name} of these data is {now[name]!r} and was {before[name]!r} in the training of {run_dir}; the "
                "model's logits are for the classes of its training, so give data of the same ones"
            )


def load_data(run_dir: str | Path, config: TrainingConfig) -> data.Splits:
    """The data of a run, of which ``config`` says where they lie; raises as ``config.load_data`` does."""
    try:
        return config.load_data()
    except FileNotFoundError as error:
        if config.without_effect("data_root") is not None:
            raise
        raise FileNotFoundError(f"{error}. If the data of {run_dir} lie elsewhere now, give --data-root") from error


def classes(run_dir: str | Path) -> int:
    """How many classes the data of a run have; raises as ``read_config`` does."""
    return int(_read(Path(run_dir))[1]["classes"])


def load_model(run_dir: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, TrainingConfig]:
    """The trained model of a finished run, in eval mode, and its settings.

    Not fused, whether it was in training or not: ``rds_fast.nn.fuse`` makes it so, and the weights fit both ways.

    Raises:
        FileNotFoundError: there is no run in the folder, or it is not finished.
        ValueError: a file of it is damaged, or does not fit the model that config.json names.
    """
    run_dir = Path(run_dir)
    config, described = _read(run_dir)
    path = run_dir / MODEL
    if not path.is_file():
        raise FileNotFoundError(
            f"the run in {run_dir} is not finished: there is no {MODEL}; "
            f"'rds-fast train --out {run_dir} --resume' goes on"
        )
    with torch.random.fork_rng(devices=[]):  # what it begins with is drawn and then replaced
        shape = config.image_shape
        placeholder = (torch.zeros(shape[0]), torch.ones(shape[0])) if config.normalize else None
        model = models.build(config.model, shape, described["classes"], normalize=placeholder)
    again = f"delete it, and 'rds-fast train --out {run_dir} --resume' writes it again from the run's checkpoint"
    tensors, _ = checkpoints.load(path, again)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model {config.model!r} of its {CONFIG}: {error}") from error
    return model.to(device).eval(), config


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; an unfinished last line, left by a killed process, is passed over."""
    path = Path(run_dir) / METRICS
    if not path.is_file():
        return []
    rows = []
    for line in read_text(path).split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def keep_metrics_until(run_dir: Path, step: int) -> None:
    """Drop the rows after ``step``: the resumed run writes them again."""
    rows = [row for row in read_metrics(run_dir) if row["step"] <= step]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    checkpoints.write_atomically(run_dir / METRICS, content.encode())


def append_metrics(run_dir: Path, row: dict[str, Any]) -> None:
    """Add a row, on the disk when this returns."""
    with open(run_dir / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
