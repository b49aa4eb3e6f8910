"""``rds-fast doctor`` agrees with what the operations do."""

from __future__ import annotations

import pytest
import torch

import rds_fast
from rds_fast import doctor


def test_the_report_names_the_backend_that_runs_and_why_not_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor()
    text = capsys.readouterr().out
    sections = dict(doctor.report())
    cpu = dict(sections["on cpu"])
    assert cpu["logsumexp"] == rds_fast.backends.select(torch.ones(1))
    for backend in rds_fast.backends.BACKENDS:
        assert (f"not {backend}" in cpu) == (backend not in rds_fast.backends.available("cpu"))
    assert torch.__version__ in text
    assert "native build" in text


def test_a_missing_library_is_said_to_be_missing() -> None:
    assert doctor.version_of("no-such-distribution") == "not installed"


def test_the_layers_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor(model="mobilenet_v3_small")
    lines = capsys.readouterr().out.splitlines()
    covered = {line.partition(" ")[0]: line for line in lines[: lines.index("")]}
    assert "fast: conv2d" in covered["features.0.0"]
    assert "fast: batch_norm" in covered["features.0.1"]
    assert "fast: hardswish" in covered["features.0.2"]
    assert "fast: hardsigmoid" in covered["features.1.block.1.scale_activation"]
    assert "PyTorch's own: mul" in covered["features.1.block.1"]
    assert "PyTorch's own: linear" in covered["classifier.0"]
