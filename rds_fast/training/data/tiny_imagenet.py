"""Tiny ImageNet (Stanford CS231n): 64×64 in colour, 200 classes of 500 training and 50 validation images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..extras import require_torchvision
from .files import SPLIT_FOLDERS, files, folders, listed, located, pictures
from .image_files import ImageFiles, image_files
from .images import Splits
from .lists import read_lines
from .sources import Request, Source, few, held_out

_FOLDER = "tiny-imagenet-200"
SIZE = 64
SOURCE = Source(
    "tiny-imagenet",
    f"the folder {_FOLDER}, with train/WNID/images, val/images and val/val_annotations.txt (or val/WNID)",
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
    train_folder, val_folder, _ = located(root, _FOLDER, ("train",), SPLIT_FOLDERS["val"], ("wnids.txt",))
    absent = [path for path in (train_folder, val_folder) if not path.is_dir()]
    if absent:
        raise SOURCE.missing(absent, root)
    wnids = [each.name for each in folders(train_folder)]
    training_files = _training_files(train_folder, wnids, root)
    validation_files = _validation_files(val_folder, wnids, root)
    names = _class_names(train_folder.parent, wnids)
    train, test = (_images(files, names, request.workers) for files in (training_files, validation_files))
    training, validation = held_out(SOURCE, train.targets, request.seed)
    return Splits(*(files.in_memory() for files in (train.select(training), train.select(validation), test)))


def _images(samples: list[tuple[str, int]], names: tuple[str, ...], workers: int | None) -> ImageFiles:
    paths, targets = [path for path, _ in samples], [label for _, label in samples]
    return image_files(paths, targets, names, SIZE, _as_it_is, workers)


def _as_it_is(image: Any) -> Tensor:
    """The bytes of a Pillow image, which has the right size already."""
    if image.size != (SIZE, SIZE):
        raise ValueError(f"it is of {image.height}x{image.width}; expected {SIZE}x{SIZE}")
    pixels: Tensor = require_torchvision("torchvision.transforms.functional", "Tiny ImageNet").pil_to_tensor(image)
    return pixels


def _training_files(folder: Path, wnids: list[str], root: Path) -> list[tuple[str, int]]:
    """The images of each class; WNID_boxes.txt, where it is, lists them, so that one that is missing is noticed."""
    training: list[tuple[str, int]] = []
    for label, wnid in enumerate(wnids):
        images, boxes = folder / wnid, folder / wnid / f"{wnid}_boxes.txt"
        found = pictures(files(images))
        if boxes.exists():
            listed(SOURCE, boxes, [line.split("\t")[0] for _, line in read_lines(boxes)], images, root)
        elif not found:
            raise SOURCE.missing([images / "images" / f"{wnid}_0.JPEG"], root)
        training += [(path, label) for path in found]
    return training


def _validation_files(folder: Path, wnids: list[str], root: Path) -> list[tuple[str, int]]:
    """The images and classes that val_annotations.txt lists, or those of each class's folder where there is no list.

    Many sort the images of val into folders as in train, in val or in val/images; then the list, if it was kept, has to
    agree with the folders. Without it they come in the order of their numbers, as in the list.
    """
    label_of, unsorted = {wnid: label for label, wnid in enumerate(wnids)}, folder / "images"
    each_class = [each for each in folders(folder) if each.name != unsorted.name]
    if not each_class and unsorted.is_dir():
        each_class = folders(unsorted)
    in_folders = {path: each.name for each in each_class for path in pictures(files(each))}
    sorted_into = {path: label_of[name] for path, name in in_folders.items() if name in label_of}
    annotations = folder / "val_annotations.txt"
    if annotations.exists():
        labels = _annotated(annotations, label_of)
        copied = unsorted.is_dir() and len(pictures(files(unsorted))) >= len(labels)  # into the folders, not moved
        images = unsorted if copied else folder
        validation = dict(zip(listed(SOURCE, annotations, list(labels), images, root), labels.values(), strict=True))
        for path, label in sorted_into.items():
            if validation.get(path, label) != label:
                raise SOURCE.damaged(
                    annotations, f"gives {path} to {wnids[validation[path]]}", "the class of its folder"
                )
        return list(validation.items())
    unknown = sorted({*in_folders.values()} - {*label_of})
    if unknown or not sorted_into:
        raise (
            SOURCE.missing([annotations], root)
            if not unknown
            else SOURCE.damaged(folder, f"holds {few(unknown)}", "folders of the classes that train/ has")
        )
    return sorted(sorted_into.items(), key=lambda file: (len(Path(file[0]).stem), Path(file[0]).stem))


def _annotated(annotations: Path, label_of: dict[str, int]) -> dict[str, int]:
    """The class of each image: a line holds a file name, a WNID and a box, with tabs between."""
    labels: dict[str, int] = {}
    for number, line in read_lines(annotations):
        name, _, rest = line.partition("\t")
        wnid, *box = rest.split("\t")
        if wnid not in label_of or len(box) != 4:
            raise SOURCE.damaged(
                annotations,
                f"holds {line!r} in line {number}",
                "a file, a class that train/ has and four numbers, with tabs between",
            )
        labels[name] = label_of[wnid]
    return labels


def _class_names(folder: Path, wnids: list[str]) -> tuple[str, ...]:
    """The first name of each class in words.txt, or its WNID where there is none."""
    words = folder / "words.txt"
    lines = read_lines(words) if words.exists() else []
    names = dict(line.split("\t", 1) for _, line in lines if "\t" in line)
    return tuple(names.get(wnid, wnid).split(",")[0] for wnid in wnids)
