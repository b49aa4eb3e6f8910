"""Several evaluated runs, grouped into kinds that differ in more than the seed, and whether they may be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..training.config import TrainingConfig
from . import record
from .record import Record
from .settings import EvaluationSettings
from .summary import Scalars
from .titles import identity, kind, order, titles


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its folder and its evaluation."""

    folder: Path
    record: Record


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one kind, one a seed.

    Attributes:
        title: what tells this kind from the others.
    """

    title: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Record:
        """The record of the first run; the others' differ in the seed, the figures, and in what decides none."""
        return self.runs[0].record

    @property
    def training(self) -> TrainingConfig:
        """The settings of the first run."""
        return self.first.training

    @property
    def scalars(self) -> list[Scalars]:
        """The figures of each run."""
        return [run.record.evaluation.scalars for run in self.runs]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Groups of runs, in the order in which they are shown.

    Attributes:
        warnings: why the figures of some of them do not stand beside each other fairly; empty where they do.
    """

    groups: tuple[Group, ...]
    warnings: tuple[str, ...] = ()

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def first(self) -> Record:
        """The record of the first run, whose settings of the evaluation are those of all, but for warnings."""
        return self.groups[0].runs[0].record

    @property
    def settings(self) -> EvaluationSettings:
        return self.first.settings

    @property
    def models(self) -> dict[str, list[Scalars]]:
        """The figures of each group, by its title."""
        return {group.title: group.scalars for group in self.groups}


def compare(folders: Iterable[str | Path], *, force: bool = False) -> Comparison:
    """Read the evaluations of runs and group them.

    Args:
        folders: of the runs; one given twice counts once.
        force: put runs side by side that should not be; the result's warnings say why.

    Raises:
        FileNotFoundError: a folder holds no run, or its run was not evaluated.
        ValueError: there are no folders, an evaluation.json is damaged, or the runs differ in data, split, samples or
            settings of the evaluation, or two of them are the same run, and ``force`` is False.
    """
    unique = {Path(folder).resolve(): Path(folder) for folder in folders}
    if not unique:
        raise ValueError("there are no runs to compare; give the folder of at least one")
    runs = [Run(folder, record.read(folder)) for folder in unique.values()]
    warnings = (*_mixed(runs), *_repeated(runs))
    if warnings and not force:
        raise ValueError(
            f"these runs cannot be compared fairly: {' '.join(warnings)} --force compares them all the same"
        )
    return Comparison(grouped(runs), warnings)


def grouped(runs: Sequence[Run]) -> tuple[Group, ...]:
    """The runs by their kinds, each kind's in the order of the seeds."""
    kinds: list[tuple[Any, list[Run]]] = []
    for run in runs:
        settings = (kind(run.record), identity(run.record))
        for other, members in kinds:
            if other == settings:
                members.append(run)
                break
        else:
            kinds.append((settings, [run]))
    members_of = sorted((members for _, members in kinds), key=lambda members: order(members[0].record))
    names = titles([members[0].record for members in members_of])
    return tuple(
        Group(title, tuple(sorted(members, key=lambda run: run.record.training.seed)))
        for title, members in zip(names, members_of, strict=True)
    )


def _mixed(runs: Sequence[Run]) -> list[str]:
    """A sentence for each respect in which some run was measured otherwise than the first."""
    first, *others = runs
    found: dict[str, list[str]] = {}
    for other in others:
        for difference in _differences(first.record, other.record):
            found.setdefault(difference, []).append(str(other.folder))
    return [f"{difference} ({first.folder} beside {_listed(folders)})." for difference, folders in found.items()]


def _differences(one: Record, other: Record) -> list[str]:
    pairs: dict[str, tuple[Any, Any]] = {
        "data": (one.training.data, other.training.data),
        "splits": (one.split, other.split),
        "numbers of samples": (one.evaluation.samples, other.evaluation.samples),
    }
    found = [f"The {name} differ: {a} and {b}" for name, (a, b) in pairs.items() if a != b]
    if not found and one.fingerprint != other.fingerprint:
        found.append("The samples differ, though as many and of data of one name: other files, or another data_seed")
    settings = one.settings.differences(other.settings)
    return found + [f"The evaluation's {name} differs: {a} and {b}" for name, (a, b) in settings.items()]


def _repeated(runs: Sequence[Run]) -> list[str]:
    """A sentence for each two runs that are one run twice, so that a standard error over them would be too small."""
    found: list[str] = []
    seen: list[tuple[Path, Any]] = []  # no dictionary: settings may hold what cannot be hashed
    for run in runs:
        whole = (kind(run.record), identity(run.record), run.record.training.seed)
        for folder, other in seen:
            if other == whole:
                found.append(f"{run.folder} has the settings and the seed of {folder}, and would count twice.")
                break
        else:
            seen.append((run.folder, whole))
    return found


def _listed(folders: Sequence[str]) -> str:
    return ", ".join(folders[:3]) + (f" and {len(folders) - 3} more" if len(folders) > 3 else "")
