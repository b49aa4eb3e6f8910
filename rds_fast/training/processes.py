"""One process a run: several would write over each other's files."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"

# How many processes a launcher started that all run one command line. SLURM's own variables are not among them: srun
# starts independent runs as well, each with a folder of its own, and those that share one meet its lock.
_LAUNCHED = {"WORLD_SIZE": "torchrun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}

# What a file system answers that knows of locks and has given this one away; any other answer is that it has none.
_TAKEN = (errno.EACCES, errno.EAGAIN)

_held: set[Path] = set()


def check_one_process() -> None:
    """Whether this process is alone in what it is about to train.

    Raises:
        ValueError: a launcher started several, each of which would train the whole run.
    """
    for variable, launcher in _LAUNCHED.items():
        started = os.environ.get(variable, "1")
        of_slurm = variable == "PMI_SIZE" and "SLURM_JOB_ID" in os.environ  # srun sets it too
        if started.isdecimal() and int(started) > 1 and not of_slurm:
            raise ValueError(
                f"{variable} is {started}, so {launcher} started {started} processes, each of which would train the "
                "whole run, into one folder; training is one process on one device as yet. Start it once, without "
                f"{launcher}; where nothing but the variable is left of an earlier job, unset {variable}"
            )


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be, and removed if nothing came into it.

    The lock is POSIX's record lock on a file in the folder. It holds between the processes of one machine, and between
    machines wherever the file system passes such locks on: NFS, Lustre mounted with ``flock``, GPFS, CephFS. The system
    itself releases it when the process ends, killed or not (NFS, if the whole machine dies, once its lease is over), so
    none is ever left behind, although the file may be; what it says of the holder is for the error. Where there are no
    such locks (Windows, NFS without a lock service), nothing is kept out.

    Args:
        folder: what is to be written into.
        what: what is done there, for the error that others get, such as "another training".

    Raises:
        FileExistsError: it is a file.
        ValueError: another process is at work there, or another thread of this one.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK
    try:
        if path in _held:  # POSIX lets a process have its own lock twice, and lose it where it closes either file
            raise _taken(folder, what, f"{socket.gethostname()} {os.getpid()}")
        _held.add(path)
        try:
            with _locked(path, folder, what):
                yield
        finally:
            _held.remove(path)
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # it is empty no longer
                each.rmdir()


@contextlib.contextmanager
def _locked(path: Path, folder: Path, what: str) -> Iterator[None]:
    """By ``lockf`` and not ``flock``, which children inherit: workers that outlive a killed parent would hold it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    while True:
        with open(path, "a+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _TAKEN:
                    file.seek(0)
                    raise _taken(folder, what, file.read(1000).decode("utf-8", "replace")) from None
            if not _is_still_there(path, file.fileno()):
                continue  # the last holder was removing it
            file.truncate(0)
            file.write(f"{socket.gethostname()} {os.getpid()}\n".encode())
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # before the lock goes, lest it be the next holder's
            return


def _is_still_there(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one that its path leads to."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _taken(folder: Path, what: str, holder: str) -> ValueError:
    host, _, process = holder.strip().rpartition(" ")
    by = f", by process {process} on {host}" if host else ""
    return ValueError(f"{what} is running in {folder}{by}; wait for its end or stop it, or give another --out")
