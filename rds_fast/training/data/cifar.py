"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read by torchvision: 32×32 in colour, 50,000 and 10,000 samples.

The files are pickles, which could run code; so nothing is read whose MD5 sum is not that of the original.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..extras import require_torchvision
from .files import torchvision_root
from .images import Images, Splits
from .sources import Request, Source, check_labels, held_out, obtain

_URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
SOURCES = {
    "cifar10": Source("cifar10", "the folder cifar-10-batches-py", f"{_URL} (Python version)", downloads=True),
    "cifar100": Source("cifar100", "the folder cifar-100-python", f"{_URL} (Python version)", downloads=True),
}


def load(request: Request) -> Splits:
    """A tenth of each class of the training set is for validation, chosen by the seed; the test set is its own.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds other labels than it should.
        OSError: the download failed.
        ImportError: torchvision is not installed.
    """
    datasets = require_torchvision("torchvision.datasets", "CIFAR")
    kind, source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[request.name], SOURCES[request.name]
    root = request.folder(source, nested=kind.base_folder)
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    root = torchvision_root(root, kind.base_folder, *(name for name, _ in files))
    paths = {root / kind.base_folder / name: md5 for name, md5 in files}
    obtain(request, source, root, paths, functools.partial(kind, root, download=True))
    train, test = (_images(kind(root, train=part), source) for part in (True, False))
    training, validation = held_out(source, train.labels, request.seed)
    return Splits(train.take(training), train.take(validation), test)


def _images(dataset: Any, source: Source) -> Images:
    names = tuple(dataset.classes)
    folder = dataset.root / dataset.base_folder
    check_labels(source, folder, dataset.targets, len(names))
    if len(dataset.targets) != len(dataset.data):
        raise source.damaged(
            folder, f"holds {len(dataset.data)} images and {len(dataset.targets)} labels", "as many of each"
        )
    pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(dataset.targets), None, len(names), names)
