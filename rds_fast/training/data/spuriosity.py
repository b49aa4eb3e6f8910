"""Spuriosity scores: how much an image shows of the features that only accompany its class (Moayeri et al. 2023).

The scores come from elsewhere, as a file; here they are brought into the order of a split.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import Files
from .image_files import ImageFiles
from .images import Split
from .lists import read_table, read_text
from .sources import few

_EXPECTED = (
    "file,score or index,score in every row, the score a finite number, as CSV with a header or as JSON, a list of "
    "objects"
)


def read_spuriosity(path: str | Path, split: Split) -> Tensor:
    """(N,), float64, on the split's device: the score of each of its samples.

    The file holds ``file,score`` or ``index,score``: a CSV file with these column names, or JSON, as a list of objects
    with these two keys. A file is named by the end of its path, as much of it as tells it apart (``n01/3.jpg``); files
    of other splits may be named as well. An index counts the samples of the whole split, in its order, from 0.

    Args:
        path: ends in .json, or holds CSV.
        split: the whole split; ``scores[indices]`` are those of ``split.take(indices)``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not as above; a score is no finite number; a sample has no score or two; files are named and
            the split is in memory, which has none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; expected spuriosity scores, a CSV or JSON file of file,score")
    key, rows = _rows(path, ("file", "index") if isinstance(split, ImageFiles) else ("index", "file"))
    if key == "index":
        positions = {str(index): index for index in range(len(split))}
    elif isinstance(split, ImageFiles):
        positions = _by_file(path, [name for name, _ in rows], split)
    else:
        raise ValueError(f"{path} names files, and this split is held in memory, without files; give index,score")
    return _in_order(path, key, rows, positions, split)


def _rows(path: Path, keys: tuple[str, str]) -> tuple[str, list[tuple[str, float]]]:
    """What names the samples, the first of the keys that there is, and the names and scores."""
    if path.suffix.lower() == ".json":
        rows = _objects(path)
    else:
        rows = [(f"line {line}", values) for line, values in read_table(path, ("score",), partial(_damaged, path))]
    if not rows:
        raise _damaged(path, "holds no score", _EXPECTED)
    key = next((name for name in keys if name in rows[0][1]), None)
    if key is None:
        raise _damaged(path, f"has neither {keys[0]} nor {keys[1]} in {rows[0][0]}", _EXPECTED)
    return key, [_named_score(path, key, where, row) for where, row in rows]


def _objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """What a JSON file lists, each with the place in the list."""
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise _damaged(path, f"is no JSON ({error})", _EXPECTED) from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise _damaged(path, "holds something else than a list of objects", _EXPECTED)
    return [(f"object {number}", row) for number, row in enumerate(content, 1)]


def _named_score(path: Path, key: str, where: str, row: dict[str, Any]) -> tuple[str, float]:
    try:
        name, score = str(row[key]), float(row["score"])
    except (KeyError, TypeError, ValueError):
        name, score = "", math.nan
    if not math.isfinite(score):
        raise _damaged(path, f"holds {dict(row)} in {where}", _EXPECTED)
    return name, score


def _damaged(path: Path, found: str, expected: str) -> ValueError:
    return ValueError(f"{path} cannot be read (it {found}); expected {expected}")


def _by_file(path: Path, names: Iterable[str], split: ImageFiles) -> dict[str, int]:
    """The index of the sample that each name means; names of other files are left out."""
    paths = [os.fsdecode(file) for file in split.paths.tolist()]
    index, files = {file: number for number, file in enumerate(paths)}, Files(paths)
    positions: dict[str, int] = {}
    for name in names:
        samples = files.ending_in(name)
        if len(samples) > 1:
            raise ValueError(f"{path} names {name}, and {len(samples)} files end so; name the folder before it too")
        if samples:
            positions[name] = index[samples[0]]
    return positions


def _in_order(path: Path, key: str, rows: list[tuple[str, float]], positions: dict[str, int], split: Split) -> Tensor:
    scores: dict[int, float] = {}
    for name, score in rows:
        if name not in positions:
            if key == "file":
                continue
            raise ValueError(f"{path} has a score of index {name}; expected whole numbers from 0 to {len(split) - 1}")
        if positions[name] in scores:
            raise ValueError(f"{path} has two scores of {name}; expected one of each sample")
        scores[positions[name]] = score
    absent = [str(index) for index in range(len(split)) if index not in scores]
    if absent:
        named = [os.fsdecode(split.paths[int(index)]) for index in absent] if isinstance(split, ImageFiles) else absent
        raise ValueError(f"{path} has no score of {len(absent)} of {len(split)} samples ({few(named)}); each needs one")
    return torch.tensor([scores[index] for index in range(len(split))], dtype=torch.float64, device=split.labels.device)
