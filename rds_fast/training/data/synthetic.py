"""Random images of any size and number of classes: what a whole training job is timed and tried on.

A sample is half noise and half a coarse random pattern of its class, so that a loss that does not fall is a fault and
not the data's. Bytes are held, a quarter of what floats would take: 4,096 images of 224×224 are 0.6 GB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .images import Images, Splits
from .sources import Request

_CELLS = 8  # the patterns have this many cells in each direction
_CHUNK = 256  # images made at a time, which bounds the memory beside the result
_HELD_OUT = 8  # validation and test have an eighth of the training samples each


def load(request: Request) -> Splits:
    """Images (N, 3, image_size, image_size) of bytes, and labels of all classes in equal numbers (or one fewer).

    The same seed gives the same images. Validation and test have an eighth of the training samples each, and one at
    least.
    """
    image_size, classes, train_size = request.image_size, request.classes, request.train_size
    generator = torch.Generator().manual_seed(request.seed)
    patterns = torch.randint(0, 128, (classes, 3, _CELLS, _CELLS), dtype=torch.uint8, generator=generator)
    sizes = (train_size, *[max(1, train_size // _HELD_OUT)] * 2)
    return Splits(*(_images(patterns, size, image_size, generator) for size in sizes))


def _images(patterns: Tensor, samples: int, image_size: int, generator: torch.Generator) -> Images:
    labels = torch.arange(samples) % len(patterns)
    images = torch.empty(samples, 3, image_size, image_size, dtype=torch.uint8)
    cell = torch.arange(image_size) * _CELLS // image_size
    for chunk, classes in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True):
        torch.randint(0, 128, chunk.shape, generator=generator, out=chunk)
        chunk += patterns[classes][:, :, cell][:, :, :, cell]
    return Images(images, labels, None, len(patterns))
