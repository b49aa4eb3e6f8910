"""CelebA (Liu et al. 2015): the colour of the hair is to be told, and the gender is the group.

The classes are the attributes Black_Hair, Blond_Hair, Brown_Hair and Gray_Hair. Images with none of the four (bald, a
hat, another colour) and with several are left out: their label would be none or a choice of ours. The groups are those
of the attribute Male. torchvision downloads the files; the reader is our own because torchvision's asks for three more
files, which are of no use here.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from ..extras import require_torchvision
from .image_files import ImageFiles, image_files, stretched
from .images import Splits
from .sources import Request, Source, obtain

_FOLDER, _ATTRIBUTES, _PARTITION, _IMAGES = (
    "celeba",
    "list_attr_celeba.txt",
    "list_eval_partition.txt",
    "img_align_celeba",
)
SOURCE = Source(
    "celeba-hair",
    f"the folder {_FOLDER}, with {_ATTRIBUTES}, {_PARTITION} and {_IMAGES}/",
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    downloads=True,
)
HAIR = {"Black_Hair": "black", "Blond_Hair": "blond", "Brown_Hair": "brown", "Gray_Hair": "grey"}
_GROUPS = ("female", "male")
_WIDTH = 178  # of the aligned images, which are 218 high


def load(request: Request) -> Splits:
    """The three splits of the authors, from files: the middle 178×178 pixels, scaled to the image size.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a list is damaged.
        OSError: the download failed.
        ImportError: torchvision is not installed.
    """
    datasets = require_torchvision("torchvision.datasets", "CelebA")
    root = request.folder(SOURCE, nested=_FOLDER)
    folder = root / _FOLDER
    needed: dict[Path, str | None] = {folder / name: None for name in (_ATTRIBUTES, _PARTITION, _IMAGES)}
    obtain(request, SOURCE, root, needed, functools.partial(datasets.CelebA, root, download=True))
    attributes, parts = _attributes(folder / _ATTRIBUTES), _partition(folder / _PARTITION)
    if attributes.keys() != parts.keys():
        name = min(attributes.keys() ^ parts.keys())
        path, other = (_ATTRIBUTES, _PARTITION) if name in parts else (_PARTITION, _ATTRIBUTES)
        raise SOURCE.damaged(folder / path, f"does not name {name}", f"the images that {other} names")
    coloured = {name: sample for name, sample in attributes.items() if sample is not None}
    _check_images(folder / _IMAGES, coloured, root)
    return Splits(
        *(
            _split(folder / _IMAGES, {name: coloured[name] for name in coloured if parts[name] == part}, request)
            for part in range(3)
        )
    )


def _split(folder: Path, samples: dict[str, tuple[int, int]], request: Request) -> ImageFiles:
    return image_files(
        [folder / name for name in samples],
        [label for label, _ in samples.values()],
        tuple(HAIR.values()),
        request.image_size,
        stretched(request.image_size, middle=_WIDTH),
        request.workers,
        [group for _, group in samples.values()],
        _GROUPS,
    )


def _attributes(path: Path) -> dict[str, tuple[int, int] | None]:
    """Hair colour and gender of each image, None where there is no single colour."""
    lines = path.read_text().splitlines()
    names = lines[1].split() if len(lines) > 1 else []
    absent = [name for name in (*HAIR, "Male") if name not in names]
    if absent or not lines[0].strip().isdecimal():
        raise SOURCE.damaged(
            path, f"lacks {', '.join(absent) or 'the number of images'}", "a count and 40 names above all"
        )
    if len(lines) - 2 != int(lines[0]):
        raise SOURCE.damaged(path, f"holds {len(lines) - 2} images", f"{int(lines[0])}, as its first line says")
    columns, male = [names.index(name) for name in HAIR], names.index("Male")
    found: dict[str, tuple[int, int] | None] = {}
    for number, line in enumerate(lines[2:], 3):
        image, *values = line.split() or [""]
        if len(values) != len(names) or not {"1", "-1"}.issuperset(values):
            raise SOURCE.damaged(path, f"holds {line!r} in line {number}", f"a file and {len(names)} times 1 or -1")
        colours = [label for label, column in enumerate(columns) if values[column] == "1"]
        found[image] = (colours[0], int(values[male] == "1")) if len(colours) == 1 else None
    return found


def _partition(path: Path) -> dict[str, int]:
    """The split of each image: 0 is training, 1 validation, 2 test."""
    parts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        image, part = (*line.split(), "", "")[:2]
        if part not in ("0", "1", "2"):
            raise SOURCE.damaged(path, f"holds {line!r} in line {number}", "a file and 0, 1 or 2")
        parts[image] = int(part)
    return parts


def _check_images(folder: Path, names: dict[str, tuple[int, int]], root: Path) -> None:
    there = set(os.listdir(folder))  # once: asking for each of 200,000 files takes minutes on a network's disk
    absent = sorted(names.keys() - there)
    if absent:
        raise SOURCE.missing([folder / name for name in absent], root)
