"""Waterbirds (Sagawa et al. 2020): birds of the land and of the water before a background of either, in four groups."""

from __future__ import annotations

import functools
from pathlib import Path

from .files import listed, located
from .image_files import ImageFiles, image_files, middle_crop
from .images import Splits
from .lists import read_table
from .sources import Request, Source, check_splits

_FOLDER, _METADATA = "waterbird_complete95_forest2water2", "metadata.csv"
SOURCE = Source(
    "waterbirds",
    f"{_METADATA} and the images that it names, or the folder {_FOLDER} with them",
    "https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz",
)
_BIRDS, _PLACES = ("landbird", "waterbird"), ("land", "water")
# In the order of the authors: 2 y + place.
GROUPS = tuple(f"{bird} on {place}" for bird in _BIRDS for place in _PLACES)
_VALUES = {"y": ("0", "1"), "split": ("0", "1", "2"), "place": ("0", "1")}


def load(request: Request) -> Splits:
    """The three splits of metadata.csv, from files; the group is the bird's kind and its place.

    The shorter side is scaled to 256/224 of the image size and the middle taken, or a random part in training.

    Raises:
        FileNotFoundError: metadata.csv or an image is missing.
        ValueError: metadata.csv is damaged, or a split is empty.
        ImportError: torchvision is not installed.
    """
    root = request.folder(SOURCE)
    [metadata] = located(root, _FOLDER, (_METADATA,))
    if not metadata.is_file():
        raise SOURCE.missing([metadata], root)
    rows = _rows(metadata)
    paths = listed(SOURCE, metadata, [row["img_filename"] for row in rows], metadata.parent, root)
    parts = [
        [(path, row) for path, row in zip(paths, rows, strict=True) if row["split"] == part]
        for part in _VALUES["split"]
    ]
    check_splits(SOURCE, metadata, parts)
    return Splits(*(_split(part, request) for part in parts))


def _rows(metadata: Path) -> list[dict[str, str]]:
    rows = read_table(metadata, ("img_filename", *_VALUES), functools.partial(SOURCE.damaged, metadata))
    for number, row in rows:
        for column, values in _VALUES.items():
            if row[column] not in values:
                raise SOURCE.damaged(
                    metadata, f"holds {column} {row[column]!r} in line {number}", f"one of {', '.join(values)}"
                )
    return [row for _, row in rows]


def _split(samples: list[tuple[str, dict[str, str]]], request: Request) -> ImageFiles:
    labels = [int(row["y"]) for _, row in samples]
    return image_files(
        [path for path, _ in samples],
        labels,
        _BIRDS,
        request.image_size,
        middle_crop(request.image_size),
        request.workers,
        [len(_PLACES) * label + int(row["place"]) for label, (_, row) in zip(labels, samples, strict=True)],
        GROUPS,
    )
