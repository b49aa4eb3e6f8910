"""Small folders of pictures, one folder a class."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

COLOURS = {"red": 0, "green": 1, "blue": 2}
COUNTS = {"train": 4, "val": 2, "test": 2}


def write_picture(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (24, 20), margin: int = 0) -> None:
    """A picture of one colour, black within ``margin`` of its edge."""
    from PIL import Image

    height, width = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[margin : height - margin, margin : width - margin] = colour
    Image.fromarray(pixels).save(path)


def write(root: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Noisy pictures, brightest in the channel of their class, of differing sizes."""
    from PIL import Image

    random = np.random.default_rng(0)
    for split in splits:
        for name, channel in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(COUNTS[split]):
                pixels = random.integers(0, 100, (20 + number, 24, 3), np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def remove(path: Path) -> None:
    shutil.rmtree(path)
