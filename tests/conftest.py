"""What every test shares: the mark ``gpu``, and the accuracy criterion."""

from __future__ import annotations

import pytest
import torch

import rds_fast


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu``, by name, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_report_header() -> str:
    backends = ", ".join(rds_fast.backends.available("cpu"))
    cuda = ", ".join(rds_fast.backends.available("cuda")) if torch.cuda.is_available() else "no device"
    return f"rds_fast backends: cpu: {backends}; cuda: {cuda}"
