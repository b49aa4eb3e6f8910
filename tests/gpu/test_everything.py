"""The run of everything that needs a GPU: its parts here need none."""

from __future__ import annotations

from pathlib import Path

import everything
import pytest
from everything import Part, Run


@pytest.fixture(autouse=True)
def logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(everything, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(everything, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(everything, "GRACE", 1)


def python(name: str, code: str, limit: float = 600, least: float = 0) -> Part:
    return Part(name, ("-c", code), limit, least)


def test_a_part_keeps_nothing_from_the_others(tmp_path: Path) -> None:
    csv = tmp_path / "results" / "device" / "step.csv"
    csv.parent.mkdir(parents=True)
    run = Run(deadline=None, output=tmp_path / "output")
    run.side_by_side([python("one", "print('FAILED tests/a.py::test_a'); raise SystemExit(3)")])
    run.side_by_side([python("two", f"open({str(csv)!r}, 'w').write('figures')"), python("three", "print('last')")])
    assert {ended.part.name: ended.outcome for ended in run.ended} == {"one": "status 3", "two": "", "three": ""}
    assert (tmp_path / "output" / "step.csv").read_text() == "figures"
    assert "==== three: passed" in (tmp_path / "output" / "log.txt").read_text()
    summary = run.summary()
    assert "\nFAILED tests/a.py::test_a\n" in summary
    assert summary.endswith("1 of 3 parts failed")


def test_a_part_that_takes_too_long_is_stopped() -> None:
    run = Run(deadline=None, output=None)
    ignores = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(3600)"
    run.side_by_side([python("interrupted", "import time; time.sleep(3600)", 0), python("killed", ignores, 0)])
    assert [ended.outcome.rpartition(" after")[0] for ended in run.ended] == ["stopped", "stopped"]


def test_a_part_that_no_longer_fits_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(deadline=1000, output=None)
    run.side_by_side([python("fits", "pass")])
    run.side_by_side([python("long", "raise SystemExit(1)", least=990)], reserve=20)
    assert [ended.outcome.partition(":")[0] for ended in run.ended] == ["", "passed over"]
    assert "==== long: passed over: 9" in capsys.readouterr().out
    assert run.summary().endswith("1 of 2 parts failed")
