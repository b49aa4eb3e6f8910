"""Images in folders, one folder a class."""

from __future__ import annotations

from pathlib import Path

import torch

from ..extras import require_torchvision
from .image_files import ImageFiles, image_files, middle_crop
from .images import Splits
from .sources import Request, Source, few

_FOLDERS = ("train", "val", "test")

SOURCE = Source("imagefolder", "train/CLASS and val/CLASS, with the images of each class in a folder of its name")


def load(request: Request) -> Splits:
    """The splits under the root: ``train/CLASS/*.jpg``, ``val/CLASS/*.jpg`` and, if it is there, ``test/CLASS/*.jpg``.

    The shorter side is scaled to 256/224 of the image size and the middle taken, or a random part in training.

    Returns:
        ImageFiles; the test split is empty where there is no ``test``.

    Raises:
        FileNotFoundError: root, train or val is missing, or a class has no images.
        ValueError: val or test has other classes than train.
        ImportError: torchvision is not installed.
    """
    root = request.folder(SOURCE)
    folders = {name: root / name for name in _FOLDERS}
    absent = [name for name in ("train", "val") if not folders[name].is_dir()]
    if absent:
        raise FileNotFoundError(f"{root} holds no folder {' and no folder '.join(absent)}; expected {SOURCE.holds}")
    train, validation = (_listed(folders[name], request) for name in ("train", "val"))
    nothing = validation.select(torch.arange(0))
    test = _listed(folders["test"], request) if folders["test"].is_dir() else nothing
    for name, split in (("val", validation), ("test", test)):
        _check_same_classes(root, train, name, split)
    return Splits(train, validation, test)


def _listed(folder: Path, request: Request) -> ImageFiles:
    """The files of a folder."""
    datasets = require_torchvision("torchvision.datasets", "a folder of images")
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise FileNotFoundError(f"{folder} holds no folders; expected one for each class, with its images in it")
    found = datasets.ImageFolder(str(folder), allow_empty=True)
    empty = sorted(set(range(len(found.classes))) - set(found.targets))
    if empty:
        names = few([found.classes[label] for label in empty])
        raise FileNotFoundError(
            f"{folder} holds no images of {names}; expected files ending in {', '.join(found.extensions)}"
        )
    paths = [path for path, _ in found.samples]
    size = request.image_size
    return image_files(paths, found.targets, found.classes, size, middle_crop(size), request.workers)


def _check_same_classes(root: Path, train: ImageFiles, name: str, split: ImageFiles) -> None:
    missing = sorted(set(train.class_names) - set(split.class_names))
    unknown = sorted(set(split.class_names) - set(train.class_names))
    faults = [f"{name} lacks {few(missing)}"] * bool(missing) + [f"train lacks {few(unknown)}"] * bool(unknown)
    if faults:
        raise ValueError(f"the classes under {root} differ: {'; '.join(faults)}. Each needs the same folders")
