"""Data sets: digits and clothes, small and large photographs, random images, and any folder of images.

Those of small images are held in memory (``Images``), those of large ones are read from their files while a model
trains (``ImageFiles``); both are a ``Split``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ..names import check_name
from . import celeba, cifar, digits, flowers, gtsrb, image_folder, sources, svhn, synthetic, tiny_imagenet, waterbirds
from .augmentation import AUGMENTATIONS, NO_AUGMENTATION, Augmentation, named_augmentation
from .image_files import ImageFiles, image_files
from .images import BLOCK, Batch, Images, Split, Splits, fingerprint, in_unit_interval
from .randomness import epoch_order
from .sources import Request, Source
from .spuriosity import read_spuriosity

__all__ = [
    "AUGMENTATIONS",
    "DATA_SETS",
    "NAMES",
    "NO_AUGMENTATION",
    "Augmentation",
    "Batch",
    "ImageFiles",
    "Images",
    "Split",
    "Splits",
    "check_classes",
    "check_root",
    "epoch_order",
    "fingerprint",
    "image_files",
    "image_shape",
    "in_unit_interval",
    "load",
    "named_augmentation",
    "read_spuriosity",
]


@dataclasses.dataclass(frozen=True)
class DataSet:
    """What is known of a data set before any file is read.

    Attributes:
        load: reads it.
        shape: (channels, height, width) of its images; None: they are given out at (3, image_size, image_size).
        source: its files; None where it has none.
        needs_root: whether they have to be named; else there is a place where they are looked for.
        seeded: whether the seed decides anything of it.
        decoded: whether its files are pictures, which ``workers`` decode.
        mirrored: whether an image seen in a mirror is still one of its class; a digit or a traffic sign is not.
    """

    load: Callable[[Request], Splits]
    shape: tuple[int, int, int] | None
    source: Source | None
    needs_root: bool = True
    seeded: bool = True
    decoded: bool = False
    mirrored: bool = True

    @property
    def from_files(self) -> bool:
        """Whether images are read from files while training, rather than held in memory."""
        return self.decoded and self.shape is None


def _digits(name: str) -> DataSet:
    shape = (1, 2 * BLOCK if name.startswith("block-") else BLOCK, BLOCK)
    return DataSet(digits.load, shape, digits.source(name), needs_root=False, mirrored="fashion" in name)


_SMALL = (3, 32, 32)
DATA_SETS = {
    **{name: _digits(name) for name in digits.NAMES},
    **{name: DataSet(cifar.load, _SMALL, source) for name, source in cifar.SOURCES.items()},
    "svhn": DataSet(svhn.load, _SMALL, svhn.SOURCE, mirrored=False),
    "tiny-imagenet": DataSet(tiny_imagenet.load, (3, 64, 64), tiny_imagenet.SOURCE, decoded=True),
    "gtsrb": DataSet(gtsrb.load, _SMALL, gtsrb.SOURCE, decoded=True, mirrored=False),
    "flowers102": DataSet(flowers.load, None, flowers.SOURCE, seeded=False, decoded=True),
    "celeba-hair": DataSet(celeba.load, None, celeba.SOURCE, seeded=False, decoded=True),
    "waterbirds": DataSet(waterbirds.load, None, waterbirds.SOURCE, seeded=False, decoded=True),
    "synthetic": DataSet(synthetic.load, None, None, needs_root=False),
    "imagefolder": DataSet(image_folder.load, None, image_folder.SOURCE, seeded=False, decoded=True),
}
NAMES = tuple(DATA_SETS)


def image_shape(name: str, image_size: int) -> tuple[int, int, int]:
    """(channels, height, width) of the images of a data set; ``image_size`` is for those that come in any size."""
    return DATA_SETS[name].shape or (3, image_size, image_size)


def check_root(name: str, root: str | Path | None) -> None:
    """Raises ValueError where a data set needs a root and none is given."""
    known = DATA_SETS[name]
    if known.needs_root and known.source is not None:
        sources.check_root(known.source, root)


def load(
    name: str = "block-mnist",
    root: str | Path | None = None,
    seed: int = 0,
    *,
    image_size: int = 224,
    classes: int = 1000,
    train_size: int = 4096,
    workers: int | None = None,
    download: bool = False,
    labelled: bool = True,
) -> Splits:
    """A data set by its name.

    mnist, cifar10, cifar100, svhn, tiny-imagenet and gtsrb and their like have no validation split of their own: one is
    taken from the training data, stratified, by the seed. The others have one.

    Args:
        name: one of ``NAMES``.
        root: the folder of the files: see ``DATA_SETS[name].source.holds``.
        seed: decides the splits, the blocks of BlockMNIST, and synthetic images.
        image_size: height and width of synthetic images and of those that come in any size.
        classes, train_size: of synthetic images.
        workers: processes that decode images from files; None: one for each core; 0: this one.
        download: fetch what is missing into the root, where torchvision can.
        labelled: whether the labels are of use; where they are not, the data may be of one class.

    Raises:
        ValueError: the name is unknown, the root is needed and not given, a file is not what it should be, the data
            cannot be downloaded, or they are of one class.
        FileNotFoundError: a file or folder is missing; the message says what is needed, where it goes, and where to
            get it.
        OSError: the download failed.
        ImportError: a package of the extra ``train`` is needed and missing.
    """
    check_name("data", name, NAMES)
    check_root(name, root)
    folder = None if root is None else Path(root)
    splits = DATA_SETS[name].load(Request(name, folder, seed, image_size, classes, train_size, workers, download))
    if labelled:
        check_classes(name, splits.train)
    return splits


def check_classes(name: str, split: Split) -> None:
    """Raises ValueError where a data set is of one class, which every model gets right."""
    if split.classes < 2:
        source = DATA_SETS[name].source
        remedy = "classes of 2 or more" if source is None else f"a data root that holds {source.holds}, of two or more"
        raise ValueError(
            f"the data {name} have {split.classes} class ({', '.join(split.class_names or '0')}), which every model "
            f"gets right; give {remedy}"
        )
