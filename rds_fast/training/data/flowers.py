"""Oxford 102 Flowers (Nilsback & Zisserman 2008), read by torchvision: 1,020, 1,020 and 6,149 photographs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ..extras import require, require_torchvision
from .files import listed, torchvision_root
from .image_files import ImageFiles, image_files, middle_crop
from .images import Splits
from .sources import Request, Source, check_labels, obtain

_FOLDER = "flowers-102"
SOURCE = Source(
    "flowers102",
    f"the folder {_FOLDER}, with jpg/, imagelabels.mat and setid.mat",
    "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
    downloads=True,
)
_SETS = ("train", "val", "test")


def load(request: Request) -> Splits:
    """The three splits of the authors, from files.

    The shorter side is scaled to 256/224 of the image size and the middle taken, or a random part in training.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds other labels than it should.
        OSError: the download failed.
        ImportError: torchvision or SciPy is not installed.
    """
    datasets = require_torchvision("torchvision.datasets", "Flowers-102")
    require("scipy.io", "Flowers-102, whose labels are MATLAB's")
    names = ("jpg", "imagelabels.mat", "setid.mat")
    root = torchvision_root(request.folder(SOURCE, nested=_FOLDER), _FOLDER, *names)
    needed = {root / _FOLDER / name: None for name in names}
    obtain(request, SOURCE, root, needed, lambda: datasets.Flowers102(root, download=True))
    return Splits(*(_split(datasets, root, part, request) for part in _SETS))


def _split(datasets: ModuleType, root: Path, part: str, request: Request) -> ImageFiles:
    folder = root / _FOLDER
    labels = folder / "imagelabels.mat"
    try:
        dataset = datasets.Flowers102(root, part, loader=Path)  # the files themselves; they are decoded by the workers
    except RuntimeError as error:  # their MD5 sums are others
        raise SOURCE.damaged(
            folder, "has an imagelabels.mat or setid.mat that changed", "the original files"
        ) from error
    except KeyError as error:
        raise SOURCE.damaged(labels, f"has no label of image {error}, which setid.mat has", "one each") from error
    paths, targets = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    check_labels(SOURCE, labels, targets, len(dataset.classes))
    files = listed(SOURCE, labels, [path.name for path in paths], folder / "jpg", root, complete=False)
    size = request.image_size
    return image_files(files, targets, dataset.classes, size, middle_crop(size), request.workers)
