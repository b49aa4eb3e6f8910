"""The training loop in this process: what it learns, what it writes, where it stops."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rds_fast.training import (
    NonFiniteError,
    Splits,
    TrainingConfig,
    TrainingInterrupted,
    TrainingResult,
    data,
    load_model,
    loop,
    models,
    read_metrics,
    runs,
    train,
)

pytest.importorskip("safetensors", reason="needs the extra train")

# 220 samples in batches of 50: five steps an epoch, the last one of 20 samples.
SMALL = TrainingConfig(data="mnist", epochs=2, batch_size=50, log_interval=2, threads=1)


@pytest.fixture
def splits(small_root: Path) -> Splits:
    return data.load("mnist", small_root)


def weights(result: TrainingResult) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in result.model.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "cnn", "objective": "attribution", "attribution_layer": "0.weights"},
            "attribution_layer is '0.weights'; did you mean '0",
        ),
        (
            {"data": "synthetic", "image_size": 8, "classes": 3, "train_size": 24, "model": "vgg11"},
            "the model vgg11 cannot take images of 3x8x8 .* use larger ones, or another model",
        ),
    ],
)
def test_a_model_that_cannot_do_what_is_asked_leaves_no_folder(
    changes: dict[str, Any], message: str, splits: Splits, tmp_path: Path
) -> None:
    config = dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", quiet=True, splits=splits if config.data == "mnist" else None)
    assert not (tmp_path / "run").exists()


def test_real_digits_are_learnt(digits: Splits, tmp_path: Path) -> None:
    config = TrainingConfig(objective="cross-entropy", epochs=5, threads=1)
    result = train(config, tmp_path / "run", quiet=True, splits=digits)
    losses = [row["total"] for row in result.metrics if row["kind"] == "epoch"]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert result.validation_accuracy > 0.85
    accuracy, _ = loop.evaluate_accuracy(result.model, digits.test)
    assert accuracy > 0.85


def test_density_penalty_smooths_the_density(digits: Splits, tmp_path: Path) -> None:
    norms = {}
    for weight in (0.0, 0.5):
        config = TrainingConfig(weight=weight, epochs=3, threads=1)
        result = train(config, tmp_path / str(weight), quiet=True, splits=digits)
        x = digits.test.images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(result.model(x).logsumexp(1).sum(), x)
        norms[weight] = float(gradient.flatten(1).norm(dim=1).mean())
    assert norms[0.5] < 0.5 * norms[0.0]


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "cross-entropy"},
        {"method": "finite_difference"},
        {"p": math.inf},
        {"p": 1.0, "power": 2.0},
        {"objective": "input-gradient"},
        {"objective": "input-gradient", "of": "cross_entropy"},
        {"weight_schedule": "linear", "weight_warmup_epochs": 1},
        {"weight_schedule": "cosine", "weight_warmup_epochs": 1},
        {"weight_schedule": "step", "weight_milestones": (1,)},
        {"optimizer": "sgd", "weight_decay": 1e-4, "lr_schedule": "cosine", "lr_warmup_epochs": 0.5},
        {"lr_schedule": "step", "lr_milestones": (1,)},
        {"model": "cnn", "fast": False},
        {"objective": "adversarial", "attack_steps": 2},
        {"objective": "adversarial", "attack_norm": "l2", "attack_steps": 1, "attack_step_size": 0.5},
        {"objective": "attribution", "path_steps": 2, "attack_steps": 1},
        {"objective": "attribution", "attribution_size": "l2", "attribution_layer": "2", "path_steps": 2},
        {"objective": "robust-attribution", "path_steps": 2, "attack_steps": 1, "attribution_size": "sum"},
        {"objective": "robust-attribution", "weight": 0.1, "path_steps": 2, "attack_steps": 1, "epsilon": 0.05},
        {"objective": "jacobian", "weight": 0.01, "projections": 2},
        {"objective": "jacobian", "weight": 0.01, "projections": 0},
        {"penalty_every": 3},
        {"penalty_share": 0.3},
        {"weight_schedule": "penalty-ratio", "weight_target": 0.2},
        {"weight_schedule": "accuracy-budget", "weight_target": 0.5, "accumulate": 2},
        {
            "objective": "robust-attribution",
            "path_steps": 2,
            "attack_steps": 1,
            "weight_schedule": "penalty-ratio",
            "weight_target": 0.1,
        },
        {"steps": 9},
        {"amp": "bf16"},
        {"amp": "fp16"},
    ],
    ids=str,
)
def test_every_setting_trains_and_resumes(change: dict[str, Any], splits: Splits, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, **change)
    straight = train(config, tmp_path / "straight", quiet=True, splits=splits)
    rows = [row for row in straight.metrics if row["kind"] == "epoch"]
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"]
    # Stopped after step 7, in the middle of the second epoch, the run goes on to the same weights.
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(7, patch)
        with pytest.raises(TrainingInterrupted):
            train(config, tmp_path / "run", quiet=True, splits=splits)
    resumed = train(config, tmp_path / "run", resume=True, quiet=True, splits=splits)
    assert same(weights(straight), weights(resumed))
    assert without_time(straight.metrics) == without_time(resumed.metrics)


def interrupt_after(step: int, patch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """Send this process a signal, by default that of Ctrl-C, within a step: once, in its first micro-batch."""
    original = loop.Objective.__call__
    sent: list[int] = []

    def call(self: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor, current: int, *rest: Any) -> Any:
        if current == step - 1 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return original(self, model, x, y, current, *rest)

    patch.setattr(loop.Objective, "__call__", call)


# What the same computation may take different amounts of.
MEASURED = ("seconds", "images_per_second", "data_wait", "peak_memory_bytes")


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row if name not in MEASURED} for row in rows]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(
    number: int, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    interrupt_after(3, monkeypatch, number)
    with pytest.raises(TrainingInterrupted, match="stopped after step 3") as raised:
        train(SMALL, tmp_path / "run", quiet=True, splits=splits)
    assert (raised.value.step, raised.value.run_dir) == (3, tmp_path / "run")
    assert signal.getsignal(number) is before
    with pytest.raises(FileNotFoundError, match=r"not finished: there is no model.safetensors; 'rds-fast train --out"):
        load_model(tmp_path / "run")


def test_dropout_and_batch_norm_resume(splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random generator and the running statistics are part of the checkpoint."""

    def build(name: str, shape: models.Shape, classes: int, **_: Any) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, classes)
        )

    monkeypatch.setattr(models, "build", build)
    straight = train(SMALL, tmp_path / "straight", quiet=True, splits=splits)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(4, patch)
        with pytest.raises(TrainingInterrupted):
            train(SMALL, tmp_path / "run", quiet=True, splits=splits)
    torch.rand(10)  # whatever happened to the generator in between
    resumed = train(SMALL, tmp_path / "run", resume=True, quiet=True, splits=splits)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_metrics(splits: Splits, tmp_path: Path) -> None:
    result = train(SMALL, tmp_path / "run", quiet=True, splits=splits)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.metrics
    assert [(row["kind"], row["step"], row["epoch"]) for row in rows] == [
        ("interval", 2, 1),
        ("interval", 4, 1),
        ("epoch", 5, 1),
        ("interval", 7, 2),
        ("interval", 9, 2),
        ("epoch", 10, 2),
    ]
    for row in rows:
        assert row["total"] == pytest.approx(row["cross_entropy"] + row["weight"] * row["penalty"], rel=1e-5)
        assert row["images_per_second"] > 0
        assert 0 <= row["data_wait"] < 1
        assert row["peak_memory_bytes"] > 10**7
        assert 0 <= row["accuracy"] <= 1
        assert ("validation_accuracy" in row) == (row["kind"] == "epoch")
    assert rows[-1]["validation_accuracy"] == result.validation_accuracy
    assert rows[-1]["seconds"] == result.seconds


def test_a_finished_run_is_loaded_by_its_folder(splits: Splits, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    result = train(SMALL, tmp_path / "run", quiet=True, splits=splits)
    model, config = load_model(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)  # neither training nor loading disturbs the caller's numbers
    assert config == SMALL
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(splits.test.images), result.model(splits.test.images))
    again = train(SMALL, tmp_path / "run", resume=True, quiet=True, splits=splits)
    assert again.metrics == result.metrics


def test_a_run_of_so_many_steps(splits: Splits, tmp_path: Path) -> None:
    """The last epoch is cut short: its row has the means over what there was of it, and the validation accuracy."""
    result = train(dataclasses.replace(SMALL, steps=7, log_interval=1), tmp_path / "run", quiet=True, splits=splits)
    assert [(row["step"], row["epoch"], row["kind"]) for row in result.metrics] == [
        *((step, 1, "interval") for step in (1, 2, 3, 4)),
        *((5, 1, "epoch"), (6, 2, "interval"), (7, 2, "epoch")),
    ]
    assert "validation_accuracy" in result.metrics[-1]
    whole = train(dataclasses.replace(SMALL, log_interval=1), tmp_path / "whole", quiet=True, splits=splits)
    assert result.metrics[-1]["total"] == whole.metrics[6]["total"]
    again = train(result.config, tmp_path / "run", resume=True, quiet=True, splits=splits)
    assert without_time(again.metrics) == without_time(result.metrics)


def test_an_adaptive_weight_moves_and_is_logged(splits: Splits, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, weight_schedule="accuracy-budget", weight_target=0.99, log_interval=1)
    weights_ = [row["weight"] for row in train(config, tmp_path / "run", quiet=True, splits=splits).metrics]
    assert 0.5 > weights_[0] > weights_[1]  # at first the accuracy is far below the target
    assert weights_[1] < weights_[-2] < weights_[-1]  # in the end there is accuracy to spare


def test_micro_batches_adapt_the_weight_once(splits: Splits, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, weight_schedule="penalty-ratio", weight_target=0.5, log_interval=1, steps=4)
    one = train(config, tmp_path / "one", quiet=True, splits=splits).metrics
    two = train(dataclasses.replace(config, accumulate=2), tmp_path / "two", quiet=True, splits=splits).metrics
    assert [row["weight"] for row in one] == pytest.approx([row["weight"] for row in two], rel=1e-4)


def test_a_student_matches_its_teacher(splits: Splits, tmp_path: Path) -> None:
    train(dataclasses.replace(SMALL, objective="cross-entropy"), tmp_path / "teacher", quiet=True, splits=splits)
    config = dataclasses.replace(SMALL, objective="gradient-matching", teacher=str(tmp_path / "teacher"), epochs=4)
    for of in ("cross_entropy", "target_logit", "log_density"):
        penalties = []
        for weight in (0.0, 50.0):
            changed = dataclasses.replace(config, of=of, weight=weight)
            penalties.append(
                train(changed, tmp_path / f"{of}{weight}", quiet=True, splits=splits).metrics[-1]["penalty"]
            )
        assert 0 < penalties[1] < 0.8 * penalties[0]
    with pytest.raises(ValueError, match=r"the teacher in .* is for images of \(1, 28, 28\) and 10 classes; the data"):
        train(dataclasses.replace(config, data="synthetic", image_size=8), tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()
    absent = dataclasses.replace(config, teacher=str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="nothing holds no run"):
        train(absent, tmp_path / "other", quiet=True, splits=splits)


def test_a_teacher_may_move_and_not_change(splits: Splits, tmp_path: Path) -> None:
    for seed in (0, 1):
        train(dataclasses.replace(SMALL, seed=seed, steps=1), tmp_path / f"{seed}", quiet=True, splits=splits)
    config = dataclasses.replace(SMALL, objective="gradient-matching", teacher=str(tmp_path / "0"), steps=1)
    train(config, tmp_path / "student", quiet=True, splits=splits)
    moved = dataclasses.replace(config, teacher=str((tmp_path / "0").rename(tmp_path / "moved")))
    train(moved, tmp_path / "student", resume=True, quiet=True, splits=splits)
    assert runs.read_config(tmp_path / "student").teacher == str(tmp_path / "moved")
    other = dataclasses.replace(config, teacher=str(tmp_path / "1"))
    with pytest.raises(ValueError, match=r"cannot be resumed: the weights in .* are not those of its teacher"):
        train(other, tmp_path / "student", resume=True, quiet=True, splits=splits)


def test_runs_of_before_they_described_their_data(splits: Splits, tmp_path: Path) -> None:
    """Only the MNIST family was there then, and none of the settings since: the model loads, the run goes on."""
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(7, patch)
        with pytest.raises(TrainingInterrupted):
            train(SMALL, run, quiet=True, splits=splits)
    content = json.loads((run / "config.json").read_text())
    del content["data"], content["settings"]["objective"], content["settings"]["penalty_every"]
    (run / "config.json").write_text(json.dumps(content))
    resumed = train(SMALL, run, resume=True, quiet=True, splits=splits)
    straight = train(SMALL, tmp_path / "straight", quiet=True, splits=splits)
    assert same(weights(resumed), weights(straight))
    assert same(list(load_model(run)[0].parameters()), weights(straight))


def test_what_a_process_leaves_that_is_killed_while_it_begins(splits: Splits, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    (run / ".config.json.123.tmp").write_text("{")
    (run / "checkpoint" / ".last.safetensors.123.tmp").write_text("{")
    train(SMALL, run, quiet=True, splits=splits)
    assert not list(run.rglob("*.tmp"))
    (tmp_path / "other" / "checkpoint").mkdir(parents=True)
    (tmp_path / "other" / "checkpoint" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files and no run"):
        train(SMALL, tmp_path / "other", quiet=True, splits=splits)


def test_an_existing_run_is_not_lost(splits: Splits, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = train(SMALL, run_dir, quiet=True, splits=splits)
    with pytest.raises(FileExistsError, match="holds a run already; --resume continues it, --overwrite replaces it"):
        train(SMALL, run_dir, quiet=True, splits=splits)
    with pytest.raises(ValueError, match="resume and overwrite"):
        train(SMALL, run_dir, resume=True, overwrite=True, quiet=True, splits=splits)
    other = train(dataclasses.replace(SMALL, seed=1), run_dir, overwrite=True, quiet=True, splits=splits)
    assert not same(weights(first), weights(other))
    assert len(read_metrics(run_dir)) == len(first.metrics)


def test_a_folder_of_other_things_is_left_alone(splits: Splits, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="holds files and no run"):
        train(SMALL, tmp_path, overwrite=True, quiet=True, splits=splits)
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        train(SMALL, tmp_path / "thesis.tex", overwrite=True, quiet=True, splits=splits)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resuming_with_other_settings_names_them(splits: Splits, tmp_path: Path) -> None:
    train(SMALL, tmp_path, quiet=True, splits=splits)
    changed = dataclasses.replace(SMALL, lr=0.5, model="cnn", log_interval=1)
    with pytest.raises(ValueError, match=r"model was 'mlp' and is now 'cnn'; lr was 0\.001 and is now 0\.5") as raised:
        train(changed, tmp_path, resume=True, quiet=True, splits=splits)
    assert "log_interval" not in str(raised.value)


def test_resuming_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        train(SMALL, tmp_path / "absent", resume=True)


def test_resuming_a_run_without_a_checkpoint_begins_it(splits: Splits, tmp_path: Path) -> None:
    straight = train(SMALL, tmp_path / "straight", quiet=True, splits=splits)
    runs.create(tmp_path / "run", SMALL, splits.train)  # killed before its first checkpoint
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "interval", "step": 2, "epo')
    resumed = train(SMALL, tmp_path / "run", resume=True, quiet=True, splits=splits)
    assert same(weights(straight), weights(resumed))
    assert without_time(straight.metrics) == without_time(resumed.metrics)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_damaged_checkpoint_says_what_is_lost(splits: Splits, tmp_path: Path) -> None:
    """And what the message tells to do helps."""
    straight = train(SMALL, tmp_path, quiet=True, splits=splits)
    damage(tmp_path / runs.CHECKPOINT)
    message = r"last\.safetensors is damaged .*progress since the last good checkpoint is lost\. .*else delete the file"
    with pytest.raises(ValueError, match=message):
        train(SMALL, tmp_path, resume=True, quiet=True, splits=splits)
    (tmp_path / runs.CHECKPOINT).unlink()
    again = train(SMALL, tmp_path, resume=True, quiet=True, splits=splits)
    assert same(weights(straight), weights(again))


def test_a_damaged_model_is_written_again(splits: Splits, tmp_path: Path) -> None:
    straight = train(SMALL, tmp_path, quiet=True, splits=splits)
    damage(tmp_path / runs.MODEL)
    message = rf"delete it, and 'rds-fast train --out {re.escape(str(tmp_path))} --resume' writes it again"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
    (tmp_path / runs.MODEL).unlink()
    again = train(SMALL, tmp_path, resume=True, quiet=True, splits=splits)
    assert same(weights(straight), list(load_model(tmp_path)[0].parameters()))
    assert again.validation_accuracy == straight.validation_accuracy


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"data": {}}', b"\xff\xd8 a picture"])
def test_damaged_settings_say_what_helps(tmp_path: Path, content: bytes) -> None:
    (tmp_path / runs.CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged .*start the run again in an empty folder") as raised:
        runs.read_config(tmp_path)
    assert "codec" not in str(raised.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_settings_may_be_edited_by_programs_that_save_otherwise(encoding: str, tmp_path: Path) -> None:
    config = TrainingConfig(data="mnist", data_root="/données")
    content = f'{{"settings": {config.to_json()}}}'.replace("\\u00e9", "é")
    (tmp_path / runs.CONFIG).write_bytes(content.encode(encoding))
    assert runs.read_config(tmp_path) == config


def test_each_epoch_is_validated_once(splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    original = loop.evaluate_accuracy

    def evaluate(*arguments: Any) -> tuple[float, float]:
        accuracy, loss = original(*arguments)
        calls.append(accuracy)
        return accuracy, loss

    monkeypatch.setattr(loop, "evaluate_accuracy", evaluate)
    result = train(SMALL, tmp_path, quiet=True, splits=splits)
    assert len(calls) == SMALL.epochs
    assert result.validation_accuracy == calls[-1] == result.metrics[-1]["validation_accuracy"]
    train(SMALL, tmp_path, resume=True, quiet=True, splits=splits)
    assert len(calls) == SMALL.epochs
    (tmp_path / runs.METRICS).unlink()  # a finished run whose rows someone removed still has its accuracy
    assert train(SMALL, tmp_path, resume=True, quiet=True, splits=splits).validation_accuracy == calls[-2] == calls[-1]


def test_a_loss_that_is_not_finite_stops_the_run(
    splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.Objective.__call__

    def call(self: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor, step: int, *rest: Any) -> Any:
        return original(self, model, x * math.nan if step == 6 else x, y, step, *rest)

    monkeypatch.setattr(loop.Objective, "__call__", call)
    # Step 7 is seen to be wrong at step 9, the next look: the error names step 7 all the same.
    config = dataclasses.replace(SMALL, log_interval=4)
    with pytest.raises(NonFiniteError, match=r"step 7 of epoch 2: the loss is not finite .*'total': nan") as raised:
        train(config, tmp_path / "run", quiet=True, splits=splits)
    order = data.epoch_order(SMALL.seed, 1, len(splits.train))
    batch = json.loads((tmp_path / "run" / "non_finite_batch.json").read_text())
    assert batch["step"] == 7
    assert batch["indices"] == order[50:100].tolist()
    assert batch["previous_indices"] == order[:50].tolist()
    # The checkpoint of the first epoch is good: without the fault the run goes on from it as if nothing had been.
    assert str(tmp_path / "run" / runs.CHECKPOINT) in str(raised.value)
    monkeypatch.undo()
    straight = train(config, tmp_path / "straight", quiet=True, splits=splits)
    resumed = train(config, tmp_path / "run", resume=True, quiet=True, splits=splits)
    assert same(weights(straight), weights(resumed))


def test_weights_that_are_not_finite_are_never_saved(
    splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with a finite loss whose update overflows, just before a checkpoint."""
    original = loop.Objective.__call__

    def call(self: Any, *arguments: Any) -> Any:
        terms = original(self, *arguments)
        return terms._replace(total=terms.total * 1e30)

    monkeypatch.setattr(loop.Objective, "__call__", call)
    config = dataclasses.replace(SMALL, optimizer="sgd", lr=1e30, checkpoint_interval=1)
    with pytest.raises(NonFiniteError, match=r"step 1 of epoch 1: a weight is not finite.*there was no checkpoint yet"):
        train(config, tmp_path / "run", quiet=True, splits=splits)
    assert not (tmp_path / "run" / runs.CHECKPOINT).exists()
    assert (tmp_path / "run" / runs.NON_FINITE).exists()


def test_what_cannot_begin_leaves_no_folder(splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> nn.Module:
        raise ImportError("torchvision is not installed")

    monkeypatch.setattr(models, "build", build)
    with pytest.raises(ImportError, match="torchvision"):
        train(SMALL, tmp_path / "run", quiet=True, splits=splits)
    assert not (tmp_path / "run").exists()


def test_lines_where_there_is_no_terminal(splits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(SMALL, tmp_path / "run", splits=splits)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    for line in lines:
        assert re.search(r"loss [\d.]+ \(cross-entropy [\d.]+, penalty [\d.]+\), validation accuracy [\d.]+%, ", line)
        assert re.search(r", [\d,]+ images/s, data wait \d+%, peak memory [\d.]+ GB$", line)


def test_a_bar_in_a_terminal(
    splits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich", reason="needs the extra train")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    train(SMALL, tmp_path / "run", splits=splits)
    shown = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)  # without colours and cursor movements
    assert "epoch 2/2" in shown
    assert re.search(r"0:00:00 ce [\d.]+ pen [\d.]+ val [\d.]+% [\d,]+ img/s wait \d+% [\d.]+GB\s*$", shown)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device is 'cuda' and no CUDA device is present"):
        train(dataclasses.replace(SMALL, device="cuda"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_threads_are_restored(splits: Splits, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    train(dataclasses.replace(SMALL, epochs=1, threads=before + 1), tmp_path / "run", quiet=True, splits=splits)
    assert torch.get_num_threads() == before


@pytest.mark.gpu
def test_a_run_on_the_gpu_resumes(splits: Splits, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, device="cuda", amp="bf16")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(7, patch)
        with pytest.raises(TrainingInterrupted):
            train(config, tmp_path / "run", quiet=True, splits=splits)
    result = train(config, tmp_path / "run", resume=True, quiet=True, splits=splits)
    assert next(result.model.parameters()).is_cuda
    assert result.metrics[-1]["step"] == 10
