"""SVHN (Netzer et al. 2011), cropped digits, read by torchvision: 32×32 in colour, 73,257 and 26,032 samples."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

from ..extras import require, require_torchvision
from .files import located
from .images import Images, Splits
from .sources import Request, Source, check_labels, held_out, obtain

SOURCE = Source(
    "svhn", "train_32x32.mat and test_32x32.mat", "http://ufldl.stanford.edu/housenumbers (format 2)", downloads=True
)
_CLASSES = 10


def load(request: Request) -> Splits:
    """A tenth of each class of the training set is for validation, chosen by the seed; the test set is its own.

    The set "extra" is not used. The digit 0, which the files call 10, is class 0.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds other labels than it should.
        OSError: the download failed.
        ImportError: torchvision or SciPy is not installed.
    """
    datasets = require_torchvision("torchvision.datasets", "SVHN")
    require("scipy.io", "SVHN, whose files are MATLAB's")
    root = request.folder(SOURCE)
    files = {part: (name, md5) for part, (_, name, md5) in datasets.SVHN.split_list.items() if part != "extra"}
    folder = located(root, "", *([name] for name, _ in files.values()))[0].parent
    sums = {folder / name: md5 for name, md5 in files.values()}
    obtain(request, SOURCE, folder, sums, lambda: _fetch(datasets, folder, tuple(files)))
    train, test = (_images(datasets, folder, part, folder / files[part][0]) for part in ("train", "test"))
    training, validation = held_out(SOURCE, train.labels, request.seed)
    return Splits(train.take(training), train.take(validation), test)


def _fetch(datasets: ModuleType, root: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        datasets.SVHN(root, part, download=True)


def _images(datasets: ModuleType, root: Path, part: str, path: Path) -> Images:
    dataset = datasets.SVHN(root, part)
    check_labels(SOURCE, path, dataset.labels, _CLASSES)
    if len(dataset.labels) != len(dataset.data) or dataset.data.shape[1:] != (3, 32, 32):
        raise SOURCE.damaged(
            path,
            f"holds images of shape {dataset.data.shape} and {len(dataset.labels)} labels",
            "images (N, 3, 32, 32) and N labels",
        )
    pixels = torch.from_numpy(dataset.data).contiguous()
    return Images(pixels, torch.from_numpy(dataset.labels), None, _CLASSES, tuple(map(str, range(_CLASSES))))
