"""Tiny ImageNet (Stanford CS231n): 64×64 in colour, 200 classes of 500 training and 50 validation images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..extras import require_torchvision
from .image_files import ImageFiles, image_files
from .images import Splits
from .sources import Request, Source, few, held_out

_FOLDER = "tiny-imagenet-200"
SIZE = 64
SOURCE = Source(
    "tiny-imagenet",
    f"the folder {_FOLDER}, with train/WNID/images, val/images and val/val_annotations.txt",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
)


def load(request: Request) -> Splits:
    """All images, decoded once.

    The labels of the original test set were never published, so its validation set is the test split, as is usual. A
    tenth of each class of the training set is for validation, chosen by the seed.

    Raises:
        FileNotFoundError: a folder, an image or the annotations are missing.
        ValueError: an image or the annotations are damaged, or name a class that training lacks.
        ImportError: torchvision is not installed.
    """
    root = request.folder(SOURCE, nested=_FOLDER)
    folder = root / _FOLDER
    absent = [path for path in (folder / "train", folder / "val" / "val_annotations.txt") if not path.exists()]
    if absent:
        raise SOURCE.missing(absent, root)
    wnids = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
    training_files, validation_files = _training_files(folder, wnids, root), _validation_files(folder, wnids, root)
    names = _class_names(folder, wnids)
    train, test = (_images(files, names, request.workers) for files in (training_files, validation_files))
    training, validation = held_out(SOURCE, train.targets, request.seed)
    return Splits(*(files.in_memory() for files in (train.select(training), train.select(validation), test)))


def _images(files: list[tuple[Path, int]], names: tuple[str, ...], workers: int | None) -> ImageFiles:
    paths, targets = [path for path, _ in files], [label for _, label in files]
    return image_files(paths, targets, names, SIZE, _as_it_is, workers)


def _as_it_is(image: Any) -> Tensor:
    """The bytes of a Pillow image, which has the right size already."""
    if image.size != (SIZE, SIZE):
        raise ValueError(f"it is of {image.height}x{image.width}; expected {SIZE}x{SIZE}")
    pixels: Tensor = require_torchvision("torchvision.transforms.functional", "Tiny ImageNet").pil_to_tensor(image)
    return pixels


def _training_files(folder: Path, wnids: list[str], root: Path) -> list[tuple[Path, int]]:
    """The images of each class; WNID_boxes.txt, where it is, lists them, so that one that is missing is noticed."""
    files: list[tuple[Path, int]] = []
    for label, wnid in enumerate(wnids):
        images = folder / "train" / wnid / "images"
        found = set(images.glob("*.JPEG")) if images.is_dir() else set()
        boxes = images.parent / f"{wnid}_boxes.txt"
        listed = {images / line.split("\t")[0] for line in boxes.read_text().splitlines()} if boxes.exists() else found
        if not listed or listed - found:
            raise SOURCE.missing(sorted(listed - found) or [images / f"{wnid}_0.JPEG"], root)
        files += [(path, label) for path in sorted(found)]
    return files


def _validation_files(folder: Path, wnids: list[str], root: Path) -> list[tuple[Path, int]]:
    """The images and classes that val_annotations.txt lists: a file name, a WNID and a box a line, tabs between."""
    annotations, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    files: dict[Path, int] = {}
    for number, line in enumerate(annotations.read_text().splitlines(), 1):
        name, wnid, *box = [*line.split("\t"), ""][:-1]
        if wnid not in label_of or len(box) != 4:
            raise SOURCE.damaged(
                annotations,
                f"holds {line!r} in line {number}",
                "a file, a class that train/ has and four numbers, with tabs between",
            )
        files[images / name] = label_of[wnid]
    found = set(images.glob("*.JPEG"))
    absent, unlisted = sorted(files.keys() - found), sorted(path.name for path in found - files.keys())
    if absent or not files:
        raise SOURCE.missing(absent or [images / "val_0.JPEG"], root)
    if unlisted:
        raise SOURCE.damaged(annotations, f"does not name {few(unlisted)}", f"a line for each image in {images}")
    return list(files.items())


def _class_names(folder: Path, wnids: list[str]) -> tuple[str, ...]:
    """The first name of each class in words.txt, or its WNID where there is none."""
    words = folder / "words.txt"
    lines = words.read_text().splitlines() if words.exists() else []
    names = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(names.get(wnid, wnid).split(",")[0] for wnid in wnids)
