"""One process a run: what launchers start, and what meets in a folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rds_fast.training.processes import LOCK, alone, check_one_process

sys.path.insert(0, str(Path(__file__).parent / "training"))
import image_files

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("words", [("train",), ("sweep", "block-mnist"), ("demo",)])
def test_several_processes_of_a_launcher_are_refused(
    words: tuple[str, ...], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("typer", "rich", "matplotlib"):
        pytest.importorskip(package, reason="needs the extra train")
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, output, errors = call(*words, "--out", tmp_path / "run")
    assert (code, output, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("error: WORLD_SIZE is 4, so torchrun started 4 processes, each of which would train")
    assert "Start it once, without torchrun; where nothing but the variable is left" in errors
    assert not (tmp_path / "run").exists()


def test_what_is_one_process_or_may_be_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun starts independent runs too, and tells each of how many there are."""
    for variable, value in {"WORLD_SIZE": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "PMI_SIZE": "4"}.items():
        monkeypatch.setenv(variable, value)
    check_one_process()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="so mpirun started 2 processes"):
        check_one_process()


def test_a_folder_is_held_once_and_left_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    folder = tmp_path / "a" / "b"
    holder = re.escape(f"by process {os.getpid()} on {socket.gethostname()}; wait for its end or stop it")
    with alone(folder, "another training"):
        assert (folder / LOCK).read_text(encoding="utf-8") == f"{socket.gethostname()} {os.getpid()}\n"
        with (
            pytest.raises(ValueError, match=f"another training is running in .*, {holder}"),
            alone(folder, "another training"),
        ):
            pass
    assert not (tmp_path / "a").exists()
    folder.mkdir(parents=True)
    (folder / LOCK).write_text("elsewhere 1\n", encoding="utf-8")  # of a process that was killed
    with alone(folder, "another training"):
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with (
        pytest.raises(FileExistsError, match="kept is a file; give a folder"),
        alone(folder / "kept", "another training"),
    ):
        pass


def test_two_trainings_do_not_meet_and_a_killed_one_blocks_nothing(tmp_path: Path, call: Call) -> None:
    """Even while the workers of the killed one are still there: they find out only after seconds."""
    pytest.importorskip("fcntl")
    for package in ("typer", "safetensors"):
        pytest.importorskip(package, reason="needs the extra train")
    if importlib.util.find_spec("torchvision") is None:  # importing it here would change what the command meets
        pytest.skip("needs torchvision")
    out, images = tmp_path / "run", image_files.write(tmp_path / "images")
    settings = ("--data", "imagefolder", "--data-root", images, "--image-size", 16, "--model", "cnn", "--batch-size", 4)
    command = [sys.executable, "-m", "rds_fast", "train", *settings, "--out", out, "--epochs", 100000, "--workers", 2]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint" / "last.safetensors").exists():
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for mode in (("--overwrite", *settings, "--epochs", 1), ("--resume",)):
            code, _, errors = call("train", "--out", out, *mode)
            assert code == 1
            assert f"another training is running in {out}, by process {first.pid} on {socket.gethostname()}" in errors
        first.kill()
        first.wait()
        code, _, errors = call("train", *settings, "--out", out, "--overwrite", "--epochs", 1, "--workers", 0)
        assert (code, errors) == (0, "")
        assert not (out / LOCK).exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        first.wait()
