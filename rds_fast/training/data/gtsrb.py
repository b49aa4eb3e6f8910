"""GTSRB, German traffic signs (Stallkamp et al. 2012): 43 classes, 26,640 (or 39,209) and 12,630 images of any size.

torchvision downloads the files. The listing is our own: torchvision's reader passes over the GT-*.csv of the training
set, does not tell the tracks apart, and reads neither the authors' archive of all training images nor Kaggle's.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from ..extras import require_torchvision
from .files import files, find, listed, located, pictures
from .image_files import ImageFiles, image_files, stretched
from .images import Splits
from .lists import read_table
from .sources import Request, Source, check_labels, held_out, obtain

SIZE = 32
# Where torchvision, the authors' archives (whose folder GTSRB may be the root) and Kaggle's have them. The authors'
# list of the test images is in an archive by itself, which people unpack anywhere among their folders.
_IN_GTSRB = ("GTSRB/", "")
_TRAINING = (*(f"{at}{name}" for at in _IN_GTSRB for name in ("Training", "Final_Training/Images")), "Train")
_TEST = (*(f"{at}Final_Test/Images" for at in _IN_GTSRB), "Test")
_BESIDE = ("", *(f"{at}{name}" for at in _IN_GTSRB for name in ("", "Final_Test/", "Final_Test/Images/")))
_TEST_LABELS = (*(f"{at}GT-final_test.csv" for at in _BESIDE), "Test.csv")
_KAGGLE_LABELS = "Train.csv"  # of all training images; the authors' are in the folder of each class
SOURCE = Source(
    "gtsrb",
    f"the folder gtsrb, with {_TRAINING[0]}/00000 …, {_TEST[0]} and {_TEST_LABELS[0]} (or Kaggle's Train and Test)",
    "https://benchmark.ini.rub.de",
    downloads=True,
)

_SPEEDS = tuple(f"speed limit {speed}" for speed in (20, 30, 50, 60, 70, 80))
CLASS_NAMES = (
    *_SPEEDS,
    *("end of speed limit 80", "speed limit 100", "speed limit 120", "no overtaking", "no overtaking by lorries"),
    *("right of way at next crossing", "priority road", "give way", "stop", "no vehicles", "no lorries", "no entry"),
    *("danger", "bend left", "bend right", "double bend", "uneven road", "slippery road", "road narrows right"),
    *("road works", "traffic signals", "pedestrians", "children", "bicycles", "snow or ice", "wild animals"),
    *("end of limits", "turn right", "turn left", "ahead only", "ahead or right", "ahead or left", "keep right"),
    *("keep left", "roundabout", "end of no overtaking", "end of no overtaking by lorries"),
)


def load(request: Request) -> Splits:
    """All images, decoded once and scaled to 32×32, margins and all.

    The training images are frames of tracks, about 30 of one physical sign (all of a file's name but its last number).
    A tenth of the tracks of each class is for validation, chosen by the seed: frames of one sign on both sides would
    be near copies. The test set is its own.

    Raises:
        FileNotFoundError: a folder, an image or the labels are missing.
        ValueError: an image is damaged, or labels are damaged or contradict the folders.
        OSError: the download failed.
        ImportError: torchvision is not installed.
    """
    root = request.folder(SOURCE, nested="gtsrb")
    needed = located(root, "gtsrb", _TRAINING, _TEST, _TEST_LABELS)
    obtain(request, SOURCE, root, dict.fromkeys(needed), lambda: _fetch(root))
    training_images, test_images, test_labels = needed
    train = _image_files(_training(training_images, root), request.workers)
    test = _image_files(_listed(test_labels, test_images, root), request.workers)
    training, validation = _by_tracks(train, request.seed)
    return Splits(*(files.in_memory() for files in (train.select(training), train.select(validation), test)))


def _fetch(root: Path) -> None:
    datasets = require_torchvision("torchvision.datasets", "GTSRB")
    for part in ("train", "test"):
        datasets.GTSRB(root, part, download=True)


def _image_files(samples: list[tuple[str, int]], workers: int | None) -> ImageFiles:
    paths, targets = [path for path, _ in samples], [label for _, label in samples]
    return image_files(paths, targets, CLASS_NAMES, SIZE, stretched(SIZE), workers)


def _training(folder: Path, root: Path) -> list[tuple[str, int]]:
    """The images of each class's folder, of which the lists, where they are, must name each and say the same."""
    found: list[tuple[str, int]] = []
    for label in range(len(CLASS_NAMES)):
        images = find(folder, f"{label:05d}", str(label)) or folder / f"{label:05d}"
        of_class = [(path, label) for path in pictures(files(images) if images.is_dir() else ())]
        if not of_class:
            raise SOURCE.missing([images / "*.ppm"], root)
        found += _checked(of_class, find(images, f"GT-{label:05d}.csv"), images, root)
    return _checked(found, find(folder.parent, _KAGGLE_LABELS), folder, root)


def _checked(found: list[tuple[str, int]], labels: Path | None, images: Path, root: Path) -> list[tuple[str, int]]:
    """Those of some images that a list names, which has to say the class of their folder; without a list, all."""
    if labels is None:
        return found
    named, by_folder = dict(_listed(labels, images, root)), dict(found)
    for path, label in named.items():
        if label != by_folder.get(path):
            raise SOURCE.damaged(
                labels,
                f"says that {Path(path).name} is of class {label}",
                f"{by_folder.get(path, 'none')}, as its folder says",
            )
    return [(path, label) for path, label in found if path in named]


def _listed(labels: Path, images: Path, root: Path) -> list[tuple[str, int]]:
    """The images that a list names, and their classes. The authors' name files, Kaggle's files in their folder."""
    damaged = functools.partial(SOURCE.damaged, labels)
    column = "Path" if labels.name.casefold() in ("train.csv", "test.csv") else "Filename"
    rows = read_table(labels, (column, "ClassId"), damaged)
    for number, row in rows:
        if not row["ClassId"].isdecimal():
            raise damaged(f"holds ClassId {row['ClassId']!r} in line {number}", "the number of a class")
    classes = [int(row["ClassId"]) for _, row in rows]
    check_labels(SOURCE, labels, classes, len(CLASS_NAMES))
    return list(zip(listed(SOURCE, labels, [row[column] for _, row in rows], images, root), classes, strict=True))


def _by_tracks(train: ImageFiles, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of training and validation that share no track."""
    paths = [Path(os.fsdecode(path)) for path in train.paths.tolist()]
    tracks: dict[tuple[int, str], list[int]] = {}
    for index, (path, label) in enumerate(zip(paths, train.targets.tolist(), strict=True)):
        tracks.setdefault((label, path.name.rpartition("_")[0]), []).append(index)
    members = list(tracks.values())
    labels = torch.tensor([label for label, _ in tracks])
    training, validation = (
        torch.tensor(sorted(index for track in part.tolist() for index in members[track]))
        for part in held_out(SOURCE, labels, seed)
    )
    return training, validation
