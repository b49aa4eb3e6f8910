"""Checkpoints: what goes in comes out, atomically, and a damaged one is recognised."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rds_fast.training import TrainingConfig, checkpoints
from rds_fast.training.optimization import build_optimizer

pytest.importorskip("safetensors", reason="needs the extra train")


def test_tensors_and_state_come_back(tmp_path: Path) -> None:
    tensors = {
        "float": torch.randn(3, 4).t(),  # not contiguous
        "bytes": torch.randint(0, 256, (5,), dtype=torch.uint8),
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 3),
    }
    state = {"step": 3, "sums": [0.1, 1e300], "nested": {"groups": [{"lr": 1e-3, "betas": [0.9, 0.999]}]}}
    checkpoints.save(tmp_path / "c.safetensors", tensors, state)
    loaded, loaded_state = checkpoints.load(tmp_path / "c.safetensors", "-")
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_an_optimiser_goes_on_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    config = TrainingConfig(optimizer=name, lr=0.1)

    def step(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, config)
    step(model, optimizer)
    copy = torch.nn.Linear(3, 2)
    copy.load_state_dict(model.state_dict())
    fresh = build_optimizer(copy, config)
    checkpoints.save(tmp_path / "c.safetensors", *checkpoints.pack_optimizer(optimizer))
    checkpoints.unpack_optimizer(fresh, *checkpoints.load(tmp_path / "c.safetensors", "-"))
    step(model, optimizer)
    step(copy, fresh)
    assert torch.equal(model.weight, copy.weight)
    assert torch.equal(model.bias, copy.bias)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    checkpoints.write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 4, 50, -1])
def test_a_damaged_checkpoint_is_recognised(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "c.safetensors"
    checkpoints.save(path, {"x": torch.zeros(10)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"c.safetensors is damaged or is no checkpoint of rds_fast \(.*\): copy it back"
    ):
        checkpoints.load(path, "copy it back")


def test_a_file_of_another_program_is_recognised(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="no checkpoint of rds_fast"):
        checkpoints.load(tmp_path / "c.safetensors", "-")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*absent"):
        checkpoints.load(tmp_path / "absent", "-")
