"""A whole large-batch job in small: micro-batches, scaled rates, label smoothing, fused and channels-last models."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import image_files
import pytest
import torch
from test_loop import MEASURED, interrupt_after, same, weights, without_time
from torch import nn

from rds_fast import nn as fused_nn
from rds_fast.training import (
    Splits,
    TrainingConfig,
    TrainingInterrupted,
    checkpoints,
    data,
    load_model,
    loop,
    models,
    runs,
    train,
)
from rds_fast.training.devices import peak_memory_bytes
from rds_fast.training.objectives import Objective
from rds_fast.training.optimization import build_optimizer, learning_rate_schedule
from rds_fast.training.state import TrainingState

pytest.importorskip("safetensors", reason="needs the extra train")
# Not by importing it: the first import of torchvision must be that of the code under test.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
# Twenty samples in batches of eight: three steps an epoch, the last one of four samples.
SMALL = TrainingConfig(
    data="synthetic",
    image_size=16,
    classes=4,
    train_size=20,
    model="cnn",
    batch_size=8,
    epochs=2,
    log_interval=1,
    optimizer="sgd",
    lr=0.05,
    device="cpu",
    threads=1,
)
WHOLE_JOB = dataclasses.replace(
    SMALL,
    model="resnet18",
    accumulate=2,
    amp="bf16",
    channels_last=True,
    fuse=True,
    nesterov=True,
    label_smoothing=0.1,
    lr_scaling="linear",
    lr_warmup_epochs=1.0,
    weight_decay=1e-4,
    decay_norms=False,
)


def gradients_of_a_step(config: TrainingConfig, tmp_path: Path, step: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The gradients that one step takes at the first weights, in float64, and its losses."""
    splits = config.load_data()
    train_split = splits.train.take(torch.arange(len(splits.train)))
    exact = dataclasses.replace(train_split, images=data.in_unit_interval(train_split.images).double())
    run = loop._Run(config, tmp_path, CPU, Splits(exact, exact, exact), quiet=True)
    run.state.model.double()
    run.state.step = step
    run._train_step(*next(exact.batches([run.order.batch(step)])))
    gradients = [parameter.grad for parameter in run.state.model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return gradients, run.uncollected[0]  # type: ignore[return-value]


@pytest.mark.parametrize("step", [0, 2])  # a whole batch, and a last one of four samples: micro-batches of 2, 2 or 3, 1
@pytest.mark.parametrize("objective", ["density", "cross-entropy"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 4), (8, 8), (6, 2)])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(
    batch_size: int, accumulate: int, objective: str, step: int, tmp_path: Path
) -> None:
    whole = dataclasses.replace(SMALL, batch_size=batch_size, objective=objective, label_smoothing=0.1)
    if batch_size == 6:
        step += step // 2  # the last of four batches: two samples, or one micro-batch that is not full
    truth, true_losses = gradients_of_a_step(whole, tmp_path, step)
    parts, losses = gradients_of_a_step(dataclasses.replace(whole, accumulate=accumulate), tmp_path, step)
    for part, expected in zip(parts, truth, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(losses, true_losses)


def test_each_micro_batch_is_a_forward_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = loop.Objective.__call__

    def call(self: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor, step: int, *rest: Any) -> Any:
        sizes.append(len(y))
        return original(self, model, x, y, step, *rest)

    monkeypatch.setattr(loop.Objective, "__call__", call)
    train(dataclasses.replace(SMALL, accumulate=2, epochs=1), tmp_path / "run", quiet=True)
    assert sizes == [4, 4, 4, 4, 4]


def test_the_learning_rate_is_scaled_by_the_batch() -> None:
    config = TrainingConfig(lr=0.1, lr_scaling="linear", batch_size=1024, lr_warmup_epochs=2.0, epochs=10)
    rate = learning_rate_schedule(config, steps_per_epoch=5)
    assert [rate(step) for step in (0, 5, 10, 49)] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    halved = dataclasses.replace(config, lr_schedule="step", lr_milestones=(4,), lr_factor=0.5)
    assert learning_rate_schedule(halved, 5)(20) == pytest.approx(0.2)
    cosine = dataclasses.replace(config, lr_schedule="cosine")
    assert learning_rate_schedule(cosine, 5)(25) == pytest.approx(0.2)
    unscaled = dataclasses.replace(config, lr_scaling="none")
    assert learning_rate_schedule(unscaled, 5)(10) == pytest.approx(0.1)


def test_norms_and_biases_may_be_spared_the_weight_decay() -> None:
    model = models.build("resnet18", (3, 32, 32), 10)
    spared = dataclasses.replace(WHOLE_JOB, model="resnet18")
    decays = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(model, spared).param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        plain = name.endswith("bias") or "bn" in name or "downsample.1" in name
        assert decays[id(parameter)] == (0.0 if plain else 1e-4), name
    (group,) = build_optimizer(model, dataclasses.replace(spared, decay_norms=True)).param_groups
    assert group["weight_decay"] == 1e-4
    assert len(group["params"]) == len(list(model.parameters()))
    assert group["nesterov"]


def stop_and_resume(config: TrainingConfig, tmp_path: Path, resumed: TrainingConfig | None = None) -> None:
    """A run that is stopped in its second epoch ends with the same bits as one that is not."""
    straight = train(config, tmp_path / "straight", quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(5, patch)
        with pytest.raises(TrainingInterrupted):
            train(config, tmp_path / "run", quiet=True)
    torch.rand(3)
    again = train(resumed or config, tmp_path / "run", resume=True, quiet=True)
    assert same(weights(straight), weights(again))
    assert without_time(straight.metrics) == without_time(again.metrics)
    assert len(straight.metrics) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"accumulate": 4, "label_smoothing": 0.1},
        {"nesterov": True, "decay_norms": False, "weight_decay": 1e-3},
        {"channels_last": True, "optimizer": "adam", "lr": 1e-3},
        {"objective": "cross-entropy", "label_smoothing": 0.2},
        {"objective": "input-gradient", "of": "cross_entropy", "label_smoothing": 0.2},
        {"method": "finite_difference", "label_smoothing": 0.2},
    ],
    ids=str,
)
def test_each_new_setting_resumes(change: dict[str, Any], tmp_path: Path) -> None:
    stop_and_resume(dataclasses.replace(SMALL, **change), tmp_path)


def test_the_whole_job_resumes(tmp_path: Path) -> None:
    stop_and_resume(WHOLE_JOB, tmp_path)


# Python 3.12 warns of each fork of a process with threads, which torch has.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_folder_of_images_resumes_with_any_number_of_workers(tmp_path: Path) -> None:
    root = image_files.write(tmp_path / "images")
    config = dataclasses.replace(SMALL, data="imagefolder", data_root=str(root), batch_size=4, workers=2)
    stop_and_resume(config, tmp_path, dataclasses.replace(config, workers=0))
    assert load_model(tmp_path / "run")[0](torch.rand(2, 3, 16, 16)).shape == (2, 3)


def test_a_folder_that_changed_is_not_resumed(tmp_path: Path) -> None:
    root = image_files.write(tmp_path / "images")
    config = dataclasses.replace(SMALL, data="imagefolder", data_root=str(root), workers=0, epochs=1)
    train(config, tmp_path / "run", quiet=True)
    (root / "train" / "red" / "0.png").unlink()
    message = "cannot be resumed with other data: samples was 12 and is now 11. Restore the data, or start a new run"
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", resume=True, quiet=True)


def test_momentum_comes_back_in_the_weights_memory_format(tmp_path: Path) -> None:
    """A GPU would take a slower path for the two in different ones."""
    config = dataclasses.replace(SMALL, channels_last=True, epochs=1)
    run = loop._Run(config, tmp_path, CPU, config.load_data(), quiet=True)
    run._train_step(*next(run.training.batches(run.order.batches(0, 1))))
    run.state.save(tmp_path / "c.safetensors")
    fresh = TrainingState(config, CPU, 4, Objective(config, 1, config.load_data().train))
    fresh.load(tmp_path / "c.safetensors")
    convolutions = [p for p in fresh.model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert convolutions
    for weight in convolutions:
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert fresh.optimizer.state[weight]["momentum_buffer"].stride() == weight.stride()
    for weight, other in zip(run.state.model.parameters(), fresh.model.parameters(), strict=True):
        momenta = [state.optimizer.state[p]["momentum_buffer"] for state, p in ((run.state, weight), (fresh, other))]
        assert torch.equal(*momenta)


def test_fused_and_plain_checkpoints_fit_both_ways(tmp_path: Path) -> None:
    config = dataclasses.replace(WHOLE_JOB, epochs=1, amp="none")
    result = train(config, tmp_path / "run", quiet=True)
    assert fused_nn.fusion_report(result.model).fused
    assert all(layer.done for layer in fused_nn.fusion_report(result.model).fused)
    plain, loaded = load_model(tmp_path / "run")
    assert loaded.fuse
    assert not any(layer.done for layer in fused_nn.fusion_report(plain).layers)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), result.model(x), rtol=1e-4, atol=1e-4)
    # A plain run's checkpoint, optimiser and all, goes on fused.
    unfused = dataclasses.replace(config, fuse=False)
    train(unfused, tmp_path / "plain", quiet=True)
    state = TrainingState(config, CPU, 4, Objective(config, 1, config.load_data().train))
    state.load(tmp_path / "plain" / runs.CHECKPOINT)
    with torch.no_grad():
        expected = load_model(tmp_path / "plain")[0](x)
        torch.testing.assert_close(state.model.eval()(x), expected, rtol=1e-4, atol=1e-4)


def test_images_and_weights_are_channels_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = loop.Objective.__call__

    def call(self: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor, step: int, *rest: Any) -> Any:
        seen.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        seen.append(x.dtype == torch.float32 and 0 <= float(x.min()) <= float(x.max()) <= 1)
        return original(self, model, x, y, step, *rest)

    monkeypatch.setattr(loop.Objective, "__call__", call)
    train(dataclasses.replace(SMALL, channels_last=True, epochs=1), tmp_path / "run", quiet=True)
    assert seen
    assert all(seen)


def test_synthetic_images_are_learnt(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, train_size=64, epochs=6, objective="cross-entropy", optimizer="adam", lr=3e-3)
    result = train(config, tmp_path / "run", quiet=True)
    losses = [row["cross_entropy"] for row in result.metrics if row["kind"] == "epoch"]
    assert losses[-1] < 0.5 * losses[0]
    assert result.validation_accuracy > 0.8


def test_label_smoothing_is_in_the_training_loss_and_not_in_the_validation(tmp_path: Path) -> None:
    rows = {}
    for smoothing in (0.0, 0.5):
        config = dataclasses.replace(SMALL, label_smoothing=smoothing, epochs=1, lr=1e-12, momentum=0.0)
        rows[smoothing] = train(config, tmp_path / str(smoothing), quiet=True).metrics[-1]
    assert rows[0.5]["cross_entropy"] != rows[0.0]["cross_entropy"]
    assert rows[0.5]["penalty"] == pytest.approx(rows[0.0]["penalty"], rel=1e-5)
    assert rows[0.5]["validation_cross_entropy"] == pytest.approx(rows[0.0]["validation_cross_entropy"], rel=1e-5)


def test_waiting_for_data_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by 1 at each look, four of them a step, and by 100 while a slow reader is waited for."""
    original, now = data.Images.batches, 0

    def look() -> int:
        nonlocal now
        now += 1
        return now

    def slow(self: data.Images, *arguments: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal now
        for batch in original(self, *arguments):
            now += 100
            yield batch

    config = dataclasses.replace(SMALL, epochs=1, model="mlp")
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=look))
    quick = train(config, tmp_path / "quick", quiet=True).metrics
    monkeypatch.setattr(data.Images, "batches", slow)
    starved = train(config, tmp_path / "starved", quiet=True).metrics
    assert [row["data_wait"] for row in quick] == pytest.approx([1 / 3] * len(quick))
    assert [row["data_wait"] for row in starved] == pytest.approx([101 / 103] * len(starved))
    assert without_time(quick) == without_time(starved)


def test_rates_count_each_interval_by_itself(tmp_path: Path) -> None:
    rows = train(SMALL, tmp_path / "run", quiet=True).metrics
    assert all(name in row for name in MEASURED for row in rows)
    seconds = [0.0, *(row["seconds"] for row in rows)]
    for row, images, (before, after) in zip(rows, [8, 8, 4] * 2, itertools.pairwise(seconds), strict=True):
        assert row["images_per_second"] == pytest.approx(images / (after - before))


def test_peak_memory_counts_what_was_freed() -> None:
    """In a process of its own, whose peak is small."""
    script = """
import torch
from rds_fast.training.devices import peak_memory_bytes
cpu = torch.device("cpu")
before = peak_memory_bytes(cpu)
size = before + 2**26  # more than the process ever held
torch.empty(size, dtype=torch.uint8).fill_(1)
print(before, size, peak_memory_bytes(cpu))
"""
    held = torch.ones(2**26)  # what this process holds is not counted there
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    before, size, after = map(int, run.stdout.split())
    assert size < after < size + before + 2**24
    assert held.numel() == 2**26


def test_validation_is_in_the_precision_of_training(tmp_path: Path) -> None:
    """The same weights give another loss in bfloat16, and nearly the same."""
    plain = train(dataclasses.replace(SMALL, epochs=1), tmp_path / "plain", quiet=True)
    config = dataclasses.replace(SMALL, epochs=1, amp="bf16")
    run = loop._Run(config, tmp_path, CPU, config.load_data(), quiet=True)
    run.state.model.load_state_dict(plain.model.state_dict())
    _, loss = run._validate()
    exact = plain.metrics[-1]["validation_cross_entropy"]
    assert loss != exact
    assert loss == pytest.approx(exact, rel=0.02)


@pytest.mark.gpu
def test_a_step_on_the_gpu_waits_for_nothing(tmp_path: Path) -> None:
    config = dataclasses.replace(WHOLE_JOB, device="cuda", train_size=64, epochs=1)
    device = torch.device("cuda", torch.cuda.current_device())
    run = loop._Run(config, tmp_path, device, config.load_data(), quiet=True)
    batches = run.training.batches(run.order.batches(0, 4))
    run._train_step(*run._next(batches))  # the first one compiles kernels and moves the epoch's order over
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            run._train_step(*run._next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run._collect_losses()
    assert (peak_memory_bytes(device) or 0) > 10**6


def test_checkpoints_of_adam_with_its_scalar_steps(tmp_path: Path) -> None:
    """A step count is a tensor too, without a weight's shape."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, TrainingConfig())
    model(torch.rand(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    checkpoints.save(tmp_path / "c", *checkpoints.pack_optimizer(optimizer))
    fresh = build_optimizer(model, TrainingConfig())
    checkpoints.unpack_optimizer(fresh, *checkpoints.load(tmp_path / "c", "-"))
    entries = fresh.state[model.weight]
    assert float(entries["step"]) == 1
    assert entries["exp_avg"].stride() == model.weight.stride()
