"""Images in folders, one folder a class."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from .files import SPLIT_FOLDERS, counted, files, find, folders, pictures, say_passed_over, spelt
from .image_files import ImageFiles, image_files, middle_crop
from .images import Splits
from .sources import Request, Source, few

SOURCE = Source("imagefolder", "train/CLASS and val/CLASS, with the images of each class in a folder of its name")


def load(request: Request) -> Splits:
    """The splits under the root: ``train/CLASS/*.jpg``, ``val/CLASS/*.jpg`` and, if it is there, ``test/CLASS/*.jpg``.

    The shorter side is scaled to 256/224 of the image size and the middle taken, or a random part in training. A line
    on standard error counts the files that are no pictures.

    Returns:
        ImageFiles; the test split is empty where there is no ``test``.

    Raises:
        FileNotFoundError: root, train or val is missing, or a class has no images.
        ValueError: val or test has other classes than train.
        ImportError: torchvision is not installed.
    """
    root = request.folder(SOURCE)
    places = {name: find(root, *names) for name, names in SPLIT_FOLDERS.items()}
    found = {name: place for name, place in places.items() if place is not None and place.is_dir()}
    absent = [name for name in ("train", "val") if name not in found]
    if absent:
        raise FileNotFoundError(f"{root} holds no folder {' and no folder '.join(absent)}; expected {SOURCE.holds}")
    passed_over: Counter[str] = Counter()
    splits = {name: _listed(folder, request, passed_over) for name, folder in found.items()}
    for name, split in splits.items():
        _check_same_classes(root, splits["train"], name, split)
    say_passed_over(SOURCE, passed_over)
    nothing = splits["val"].select(torch.arange(0))
    return Splits(splits["train"], splits["val"], splits.get("test", nothing))


def _listed(folder: Path, request: Request, passed_over: Counter[str]) -> ImageFiles:
    """The pictures of each class; ``passed_over`` counts the other files."""
    classes: dict[str, list[Path]] = {}  # more than one folder where systems write one name in different bytes
    for each in folders(folder, passed_over):
        classes.setdefault(spelt(each.name), []).append(each)
    if not classes:
        raise FileNotFoundError(
            f"{folder} holds no folders; expected one for each class, with its images in it. Images without labels are "
            "of no use here: where these have none, rename the folder or move it away"
        )
    names, others = sorted(classes), {name: Counter[str]() for name in classes}
    paths = {name: [path for each in classes[name] for path in pictures(files(each), others[name])] for name in names}
    empty = [name for name in names if not paths[name]]
    if empty:
        there = sum((others[name] for name in empty), Counter[str]())
        raise FileNotFoundError(
            f"{folder} holds no images of {few(empty)}; expected files ending in .jpg, .jpeg, .png or as others that "
            "Pillow reads" + (f", and there are {counted(there)}" if there else "")
        )
    passed_over.update(sum(others.values(), Counter[str]()))
    size = request.image_size
    return image_files(
        [path for name in names for path in paths[name]],
        [label for label, name in enumerate(names) for _ in paths[name]],
        names,
        size,
        middle_crop(size),
        request.workers,
    )


def _check_same_classes(root: Path, train: ImageFiles, name: str, split: ImageFiles) -> None:
    missing = sorted(set(train.class_names) - set(split.class_names))
    unknown = sorted(set(split.class_names) - set(train.class_names))
    faults = [f"{name} lacks {few(missing)}"] * bool(missing) + [f"train lacks {few(unknown)}"] * bool(unknown)
    if faults:
        raise ValueError(f"the classes under {root} differ: {'; '.join(faults)}. Each needs the same folders")
