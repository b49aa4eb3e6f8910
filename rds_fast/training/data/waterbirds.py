"""Waterbirds (Sagawa et al. 2020): birds of the land and of the water before a background of either, in four groups."""

from __future__ import annotations

import csv
from pathlib import Path

from .image_files import ImageFiles, image_files, middle_crop
from .images import Splits
from .sources import Request, Source, few

_FOLDER = "waterbird_complete95_forest2water2"
SOURCE = Source(
    "waterbirds",
    f"metadata.csv and the images that it names, or the folder {_FOLDER} with them",
    "https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz",
)
_BIRDS, _PLACES = ("landbird", "waterbird"), ("land", "water")
# In the order of the authors: 2 y + place.
GROUPS = tuple(f"{bird} on {place}" for bird in _BIRDS for place in _PLACES)
_COLUMNS = ("img_filename", "y", "split", "place")
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
    folder = root / _FOLDER if (root / _FOLDER).is_dir() else root
    metadata = folder / "metadata.csv"
    if not metadata.is_file():
        raise SOURCE.missing([metadata], root)
    rows = _rows(metadata)
    _check_images(metadata, {folder / row["img_filename"] for row in rows}, root)
    parts = [[row for row in rows if row["split"] == part] for part in _VALUES["split"]]
    if not all(parts):
        raise SOURCE.damaged(metadata, f"holds no image of split {parts.index([])}", "images of the splits 0, 1 and 2")
    return Splits(*(_split(folder, part, request) for part in parts))


def _check_images(metadata: Path, named: set[Path], root: Path) -> None:
    """Whether all images that are named are there, and the other way round: rows at the end may have been lost."""
    found = set(metadata.parent.rglob("*.jpg"))
    if named - found:
        raise SOURCE.missing(sorted(named - found), root)
    if found - named:
        unnamed = few(sorted(map(str, found - named)))
        raise SOURCE.damaged(metadata, f"does not name {unnamed}", "a row for each image")


def _rows(metadata: Path) -> list[dict[str, str]]:
    with open(metadata, newline="") as file:
        reader = csv.DictReader(file)
        absent = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if absent:
            raise SOURCE.damaged(metadata, f"lacks the column {', '.join(absent)}", f"columns {', '.join(_COLUMNS)}")
        rows = list(reader)
    for number, row in enumerate(rows, 2):
        for column, values in _VALUES.items():
            if row[column] not in values:
                raise SOURCE.damaged(
                    metadata, f"holds {column} {row[column]!r} in line {number}", f"one of {', '.join(values)}"
                )
    return rows


def _split(folder: Path, rows: list[dict[str, str]], request: Request) -> ImageFiles:
    labels = [int(row["y"]) for row in rows]
    return image_files(
        [folder / row["img_filename"] for row in rows],
        labels,
        _BIRDS,
        request.image_size,
        middle_crop(request.image_size),
        request.workers,
        [len(_PLACES) * label + int(row["place"]) for label, row in zip(labels, rows, strict=True)],
        GROUPS,
    )
