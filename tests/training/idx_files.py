"""Small data sets in IDX files, written byte by byte."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def image_file(images: np.ndarray) -> bytes:
    return struct.pack(">IIII", 0x803, *images.shape) + images.astype(np.uint8).tobytes()


def label_file(labels: np.ndarray) -> bytes:
    return struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes()


def write_set(folder: Path, train: int = 240, test: int = 40, separator: str = "-", compress: bool = False) -> Path:
    """The four files. Class k is a bright band at row 2k beside noise, so that it can be learnt."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        images = random.integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 3] = 250
        for kind, content in (("images", image_file(images)), ("labels", label_file(labels))):
            name = f"{split}-{kind}{separator}idx{3 if kind == 'images' else 1}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return folder
