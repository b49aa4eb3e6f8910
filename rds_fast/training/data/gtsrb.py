"""GTSRB, German traffic signs (Stallkamp et al. 2012): 43 classes, 26,640 (or 39,209) and 12,630 images of any size.

torchvision downloads the files. The listing is our own: torchvision's reader passes over the GT-*.csv of the training
set, and does not tell the tracks apart.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from ..extras import require_torchvision
from .image_files import ImageFiles, image_files, stretched
from .images import Splits
from .sources import Request, Source, check_labels, held_out, obtain

SIZE = 32
_TRAINING, _TEST, _TEST_LABELS = Path("GTSRB/Training"), Path("GTSRB/Final_Test/Images"), Path("GT-final_test.csv")
SOURCE = Source(
    "gtsrb",
    f"the folder gtsrb, with {_TRAINING}/00000 to 00042, {_TEST} and {_TEST_LABELS}",
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

    The training images are frames of tracks, about 30 of one physical sign (the first part of a file's name). A tenth
    of the tracks of each class is for validation, chosen by the seed: frames of one sign on both sides would be near
    copies. The test set is its own.

    Raises:
        FileNotFoundError: a folder, an image or the labels are missing.
        ValueError: an image is damaged, or labels are damaged or contradict the folders.
        OSError: the download failed.
        ImportError: torchvision is not installed.
    """
    root = request.folder(SOURCE, nested="gtsrb")
    base = root / "gtsrb"
    obtain(
        request, SOURCE, root, {base / part: None for part in (_TRAINING, _TEST, _TEST_LABELS)}, lambda: _fetch(root)
    )
    train = _image_files(_training(base / _TRAINING, root), request.workers)
    test = _image_files(_listed(base / _TEST_LABELS, base / _TEST, root), request.workers)
    training, validation = _by_tracks(train, request.seed)
    return Splits(*(files.in_memory() for files in (train.select(training), train.select(validation), test)))


def _fetch(root: Path) -> None:
    datasets = require_torchvision("torchvision.datasets", "GTSRB")
    for part in ("train", "test"):
        datasets.GTSRB(root, part, download=True)


def _image_files(files: list[tuple[Path, int]], workers: int | None) -> ImageFiles:
    paths, targets = [path for path, _ in files], [label for _, label in files]
    return image_files(paths, targets, CLASS_NAMES, SIZE, stretched(SIZE), workers)


def _training(folder: Path, root: Path) -> list[tuple[Path, int]]:
    """The images of each class's folder; its GT-*.csv, where it is, must name the same ones, of this class."""
    files: list[tuple[Path, int]] = []
    for label in range(len(CLASS_NAMES)):
        images = folder / f"{label:05d}"
        found, labels = sorted(images.glob("*.ppm")), images / f"GT-{label:05d}.csv"
        if not found:
            raise SOURCE.missing([images / "*.ppm"], root)
        listed = _listed(labels, images, root) if labels.exists() else [(path, label) for path in found]
        for path, named in listed:
            if named != label:
                raise SOURCE.damaged(
                    labels, f"says that {path.name} is of class {named}", f"{label}, as its folder says"
                )
        files += [(path, label) for path in found]
    return files


def _listed(labels: Path, images: Path, root: Path) -> list[tuple[Path, int]]:
    """The images that a GT-*.csv names, and their classes."""
    with open(labels, newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";", skipinitialspace=True))
    try:
        files = [(images / row["Filename"], int(row["ClassId"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        expected = "the columns Filename and ClassId in every line, with ; between"
        raise SOURCE.damaged(labels, f"cannot be read ({error!r})", expected) from error
    check_labels(SOURCE, labels, [label for _, label in files], len(CLASS_NAMES))
    found = set(images.glob("*.ppm"))
    absent = [path for path, _ in files if path not in found]
    if absent:
        raise SOURCE.missing(absent, root)
    if len(files) != len(found):
        raise SOURCE.damaged(labels, f"names {len(files)} images", f"each of the {len(found)} images in {images}")
    return files


def _by_tracks(train: ImageFiles, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of training and validation that share no track."""
    paths = [Path(path.decode()) for path in train.paths.tolist()]
    tracks: dict[tuple[int, str], list[int]] = {}
    for index, (path, label) in enumerate(zip(paths, train.targets.tolist(), strict=True)):
        tracks.setdefault((label, path.name.partition("_")[0]), []).append(index)
    members = list(tracks.values())
    labels = torch.tensor([label for label, _ in tracks])
    training, validation = (
        torch.tensor(sorted(index for track in part.tolist() for index in members[track]))
        for part in held_out(SOURCE, labels, seed)
    )
    return training, validation
