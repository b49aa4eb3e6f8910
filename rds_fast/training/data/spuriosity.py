"""Spuriosity scores: how much an image shows of the features that only accompany its class (Moayeri et al. 2023).

The scores come from elsewhere, as a file; here they are brought into the order of a split.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .image_files import ImageFiles
from .images import Split
from .sources import few


def read_spuriosity(path: str | Path, split: Split) -> Tensor:
    """(N,), float64, on the split's device: the score of each of its samples.

    The file holds ``file,score`` or ``index,score``: a CSV file with these column names, or JSON, as a list of objects
    with these two keys. A file is named by the end of its path, as much of it as tells it apart (``n01/3.jpg``); files
    of other splits may be named as well. An index counts the samples of the whole split, in its order, from 0.

    Args:
        path: ends in .csv or .json.
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
    try:
        with open(path, newline="") as file:
            rows: Any = list(csv.DictReader(file)) if path.suffix == ".csv" else json.load(file)
        key = next(name for name in keys if name in rows[0])
        return key, [(str(row[key]), _finite(row["score"])) for row in rows]
    except (ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}); expected file,score or index,score in every row, the score a finite "
            "number, as CSV with a header or as JSON, a list of objects"
        ) from error


def _finite(score: Any) -> float:
    value = float(score)
    if not math.isfinite(value):
        raise ValueError(f"a score is {score}")
    return value


def _by_file(path: Path, names: Iterable[str], split: ImageFiles) -> dict[str, int]:
    """The index of the sample that each name means; names of other files are left out."""
    files = [Path(os.fsdecode(file)).parts for file in split.paths.tolist()]

    @functools.cache
    def samples_by_end(length: int) -> dict[tuple[str, ...], list[int]]:
        ends: dict[tuple[str, ...], list[int]] = {}
        for index, parts in enumerate(files):
            ends.setdefault(parts[-length:], []).append(index)
        return ends

    positions: dict[str, int] = {}
    for name in names:
        end = Path(name).parts
        samples = samples_by_end(len(end)).get(end, [])
        if len(samples) > 1:
            raise ValueError(f"{path} names {name}, and {len(samples)} files end so; name the folder before it too")
        if samples:
            positions[name] = samples[0]
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
