"""Random changes of training images, drawn for each sample from the seed, the epoch and the sample's index alone.

So a resumed run sees the same images, whatever the batch they come in and the number of workers. Whole batches are
changed at once, on their device.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .randomness import sample_numbers

_PADDING = 4


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is changed in a training image, in this order.

    Attributes:
        resized_crop: a random part of 8 to 100% of the area, scaled to the whole size, and a flip with probability ½;
            of images from files alone, which come in any size (Szegedy et al. 2015).
        crop: 4 black pixels are added on each side, and a window of the original size is cut out at random.
        flip: left and right are exchanged with probability ½.
        cutout: side in pixels of a square around a random pixel, as far as it lies in the image, that is painted over;
            0: none (DeVries & Taylor 2017). They set it to 0 in images whose mean is subtracted; here it takes
            the image's own mean of each channel.
    """

    resized_crop: bool = False
    crop: bool = False
    flip: bool = False
    cutout: int = 0

    def __call__(self, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """Crop, flip and cutout.

        Args:
            images: (K, C, H, W), floats or bytes; they are left as they are.
            indices: (K,), int64: the samples, on any device.
            seed, epoch: of the training.
        """
        if not (self.crop or self.flip or self.cutout):
            return images
        numbers = sample_numbers(seed, epoch, indices.to(images.device, non_blocking=True), 5).T
        if self.crop or self.flip:
            images = self._moved(images, *numbers[:3])
        return _cut_out(images, self.cutout, *numbers[3:]) if self.cutout else images

    def _moved(self, images: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
        """The crops, flipped or not; each argument (K,) decides one of the three."""
        height, width = images.shape[2:]
        rows = torch.arange(height, device=images.device).expand(len(images), -1)
        columns = torch.arange(width, device=images.device).expand(len(images), -1)
        if self.flip:
            columns = torch.where(mirrored[:, None] % 2 == 1, width - 1 - columns, columns)
        if self.crop:
            images = nn.functional.pad(images, [_PADDING] * 4)
            rows = rows + down[:, None] % (2 * _PADDING + 1)
            columns = columns + right[:, None] % (2 * _PADDING + 1)
        cropped = images.gather(2, rows[:, None, :, None].expand(-1, images.shape[1], -1, images.shape[3]))
        return cropped.gather(3, columns[:, None, None].expand(-1, images.shape[1], height, -1))


def _cut_out(images: Tensor, side: int, row: Tensor, column: Tensor) -> Tensor:
    """The images with a square painted over, whose middle (K,) and (K,) decide."""
    height, width = images.shape[2:]
    top, left = row % height - side // 2, column % width - side // 2
    rows = torch.arange(height, device=images.device) - top[:, None]
    columns = torch.arange(width, device=images.device) - left[:, None]
    covered = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None]
    mean = images.double().mean((2, 3), keepdim=True)
    mean = mean if images.is_floating_point() else mean.round()
    return torch.where(covered[:, None], mean.to(images.dtype), images)


NO_AUGMENTATION = Augmentation()
AUGMENTATIONS = ("none", "crop", "crop-flip", "crop-cutout", "crop-flip-cutout", "resized-crop-flip")


def named_augmentation(name: str, cutout: int) -> Augmentation:
    """The augmentation of a name out of ``AUGMENTATIONS``; ``cutout`` is the side of the square where it has one."""
    parts = name.split("-")
    if "resized" in parts:  # its flip is part of what the workers do
        return Augmentation(resized_crop=True)
    return Augmentation(crop="crop" in parts, flip="flip" in parts, cutout=cutout if "cutout" in parts else 0)
