"""Data sets: the MNIST family, random images, and folders of images."""

from __future__ import annotations

from pathlib import Path

from ..names import check_name
from . import digits, image_folder, synthetic
from .images import BLOCK, Batch, Images, Split, Splits, epoch_order, in_unit_interval

__all__ = ["NAMES", "Batch", "Images", "Split", "Splits", "epoch_order", "image_shape", "in_unit_interval", "load"]

NAMES = (*digits.NAMES, "synthetic", "imagefolder")
FROM_DISK = (*digits.NAMES, "imagefolder")
SEEDED = (*digits.NAMES, "synthetic")


def image_shape(name: str, image_size: int) -> tuple[int, int, int]:
    """(channels, height, width) of the images of a data set; ``image_size`` is for those that come in any size."""
    if name in digits.NAMES:
        return (1, 2 * BLOCK if name.startswith("block-") else BLOCK, BLOCK)
    return (3, image_size, image_size)


def load(
    name: str = "block-mnist",
    root: str | Path | None = None,
    seed: int = 0,
    *,
    image_size: int = 224,
    classes: int = 1000,
    train_size: int = 4096,
    workers: int | None = None,
) -> Splits:
    """A data set by its name.

    Args:
        name: one of ``NAMES``.
        root: the folder of the IDX files of the MNIST family (see ``digits.load``), or of the images.
        seed: decides the splits and blocks of the MNIST family, and synthetic images.
        image_size: height and width of synthetic images, and of those from a folder.
        classes, train_size: of synthetic images.
        workers: processes that decode images from a folder; None: one for each core.

    Raises:
        ValueError: the name is unknown, a file is not what it should be, or the classes of the splits differ.
        FileNotFoundError: a file or folder is missing.
        ImportError: a package of the extra ``train`` is needed and missing.
    """
    check_name("data", name, NAMES)
    if name == "synthetic":
        return synthetic.load(seed, image_size, classes, train_size)
    if name == "imagefolder":
        if root is None:
            raise ValueError("data is 'imagefolder' and data_root is missing; give the folder of train and val")
        return image_folder.load(root, image_size, workers)
    return digits.load(name, root, seed)
