"""A model that was trained on a few real digits for a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from rds_fast.training import Splits, TrainingConfig


@pytest.fixture(scope="session")
def finished_run(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the density penalty."""
    pytest.importorskip("safetensors", reason="needs the extra train")
    from rds_fast.training import train

    run_dir = tmp_path_factory.mktemp("runs") / "density"
    train(TrainingConfig(epochs=2, threads=1, device="cpu"), run_dir, quiet=True, splits=splits)
    return run_dir
