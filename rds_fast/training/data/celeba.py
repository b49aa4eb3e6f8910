"""CelebA (Liu et al. 2015): the colour of the hair is to be told, and the gender is the group.

The classes are the attributes Black_Hair, Blond_Hair, Brown_Hair and Gray_Hair. Images with none of the four (bald, a
hat, another colour) and with several are left out: their label would be none or a choice of ours. The groups are those
of the attribute Male. torchvision downloads the files; the reader is our own because torchvision's asks for three more
files, which are of no use here, and reads neither the authors' own folders nor Kaggle's lists.
"""

from __future__ import annotations

import functools
from pathlib import Path

from ..extras import require_torchvision
from .files import listed, located
from .image_files import ImageFiles, image_files, stretched
from .images import Splits
from .lists import Row, read_lines, read_table
from .sources import Request, Source, check_splits, obtain

_FOLDER = "celeba"
# Where torchvision, the authors' archive and Kaggle's have the lists and the images.
_ATTRIBUTES = ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt", "list_attr_celeba.csv")
_PARTITION = ("list_eval_partition.txt", "Eval/list_eval_partition.txt", "list_eval_partition.csv")
_IMAGES = ("img_align_celeba", "Img/img_align_celeba", "Img/img_align_celeba_png")
SOURCE = Source(
    "celeba-hair",
    f"the folder {_FOLDER}, with {_ATTRIBUTES[0]}, {_PARTITION[0]} (or Kaggle's .csv) and {_IMAGES[0]}/",
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    downloads=True,
)
HAIR = {"Black_Hair": "black", "Blond_Hair": "blond", "Brown_Hair": "brown", "Gray_Hair": "grey"}
_NEEDED = (*HAIR, "Male")
_GROUPS = ("female", "male")
_WIDTH = 178  # of the aligned images, which are 218 high
_IMAGE = "image_id"  # the column of Kaggle's lists that names the images


def load(request: Request) -> Splits:
    """The three splits of the authors, from files: the middle 178×178 pixels, scaled to the image size.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a list is damaged, or a split is empty.
        OSError: the download failed.
        ImportError: torchvision is not installed.
    """
    datasets = require_torchvision("torchvision.datasets", "CelebA")
    root = request.folder(SOURCE, nested=_FOLDER)
    needed = located(root, _FOLDER, _ATTRIBUTES, _PARTITION, _IMAGES)
    obtain(request, SOURCE, root, dict.fromkeys(needed), functools.partial(datasets.CelebA, root, download=True))
    attributes, partition, images = needed
    looks, parts = _looks(attributes), _parts(partition)
    if looks.keys() != parts.keys():
        name = min(looks.keys() ^ parts.keys())
        path, other = (attributes, partition) if name in parts else (partition, attributes)
        raise SOURCE.damaged(path, f"does not name {name}", f"the images that {other.name} names")
    coloured = {name: sample for name, sample in looks.items() if sample is not None}
    paths = dict(zip(coloured, listed(SOURCE, attributes, list(coloured), images, root, complete=False), strict=True))
    splits = [{paths[name]: coloured[name] for name in coloured if parts[name] == part} for part in ("0", "1", "2")]
    check_splits(SOURCE, partition, splits)
    return Splits(*(_split(samples, request) for samples in splits))


def _split(samples: dict[str, tuple[int, int]], request: Request) -> ImageFiles:
    return image_files(
        list(samples),
        [label for label, _ in samples.values()],
        tuple(HAIR.values()),
        request.image_size,
        stretched(request.image_size, middle=_WIDTH),
        request.workers,
        [group for _, group in samples.values()],
        _GROUPS,
    )


def _looks(path: Path) -> dict[str, tuple[int, int] | None]:
    """Hair colour and gender of each image, None where there is no single colour."""
    damaged = functools.partial(SOURCE.damaged, path)
    rows = read_table(path, (_IMAGE, *_NEEDED), damaged) if path.suffix.lower() == ".csv" else _rows_of_text(path)
    found: dict[str, tuple[int, int] | None] = {}
    for number, row in rows:
        for name in _NEEDED:
            if row[name] not in ("1", "-1"):
                raise damaged(f"holds {name} {row[name]!r} in line {number}", "1 or -1")
        colours = [label for label, name in enumerate(HAIR) if row[name] == "1"]
        found[row[_IMAGE]] = (colours[0], int(row["Male"] == "1")) if len(colours) == 1 else None
    return found


def _rows_of_text(path: Path) -> list[Row]:
    """The rows of the authors' list: their number, the names of the attributes, and a line for each image."""
    lines = read_lines(path)
    names = lines[1][1].split() if len(lines) > 1 else []
    absent = [name for name in _NEEDED if name not in names]
    if absent or not lines[0][1].isdecimal():
        raise SOURCE.damaged(
            path, f"lacks {', '.join(absent) or 'the number of images'}", "a count and 40 names above all"
        )
    if len(lines) - 2 != int(lines[0][1]):
        raise SOURCE.damaged(path, f"holds {len(lines) - 2} images", f"{int(lines[0][1])}, as its first line says")
    rows = []
    for number, line in lines[2:]:
        image, *values = line.split()
        if len(values) != len(names) or not {"1", "-1"}.issuperset(values):
            raise SOURCE.damaged(path, f"holds {line!r} in line {number}", f"a file and {len(names)} times 1 or -1")
        rows.append(Row(number, {_IMAGE: image, **dict(zip(names, values, strict=True))}))
    return rows


def _parts(path: Path) -> dict[str, str]:
    """The split of each image: 0 is training, 1 validation, 2 test."""
    if path.suffix.lower() == ".csv":
        rows = read_table(path, (_IMAGE, "partition"), functools.partial(SOURCE.damaged, path))
        lines = [(number, [row[_IMAGE], row["partition"]]) for number, row in rows]
    else:
        lines = [(number, line.split()) for number, line in read_lines(path)]
    for number, values in lines:
        if len(values) != 2 or values[1] not in ("0", "1", "2"):
            raise SOURCE.damaged(path, f"holds {' '.join(values)!r} in line {number}", "a file and 0, 1 or 2")
    return {image: part for _, (image, part) in lines}
