"""Data that a model was not trained on, brought to the shape of those it was."""

from __future__ import annotations

import torch
from torch import Tensor

from ..training import data
from ..training.names import check_name
from .samples import batches_of, drawn

NOISE = ("noise", "uniform")
# ITU-R BT.601, the weights by which Pillow and torchvision turn colours to grey.
_LUMA = (0.299, 0.587, 0.114)


def parse_source(source: str) -> tuple[str, str | None]:
    """The name and the folder, if any, of ``"NAME"`` or ``"NAME=FOLDER"``.

    Raises:
        ValueError: the name is neither a data set's nor one of ``NOISE``, or a folder is needed and missing.
    """
    name, _, folder = source.partition("=")
    check_name("a data set of ood_data", name, (*data.NAMES, *NOISE))
    if folder and name in NOISE:
        raise ValueError(f"ood_data holds {source!r}; {name} is made here and has no folder: give {name!r}")
    if name not in NOISE and not folder and data.DATA_SETS[name].needs_root:
        raise ValueError(f"ood_data holds {source!r} and no folder of its files; give '{name}=FOLDER'")
    return name, folder or None


def load_like(source: str, reference: data.Split, batch_size: int, seed: int) -> data.Split:
    """As many samples of another data set as a split has (fewer where it has fewer), in that split's shape and place.

    ``"uniform"`` is noise, uniform in [0, 1], each value by itself; ``"noise"`` is Gaussian with the mean and standard
    deviation of each channel of the split, clipped to [0, 1]. Any other source is the test split of a data set, its
    validation split where it has no test split, drawn at random by ``seed`` and fitted by ``fit_to``. Labels of noise
    are 0.

    Args:
        source: see ``parse_source``.
        reference: the samples in distribution, on the model's device.
        batch_size: samples fitted at a time.
        seed: of the noise and of the draw.

    Raises:
        ValueError: the source is unknown or has no samples, or its images cannot be fitted.
        FileNotFoundError: a file of it is missing.
    """
    name, folder = parse_source(source)
    device = reference.labels.device
    shape = tuple(next(batches_of(reference, 1)).images.shape[1:])
    if name in NOISE:
        images = _noise(name, reference, shape, batch_size, torch.Generator().manual_seed(seed))
        return data.Images(images, torch.zeros(len(images), dtype=torch.long), None).to(device)
    splits = data.load(name, folder, image_size=max(shape[1:]), labelled=False)
    other = splits.test if len(splits.test) else splits.validation
    if len(other) == 0:
        raise ValueError(f"{source} has neither test nor validation samples; give another data set in ood_data")
    chosen = drawn(other, len(reference), seed)
    batches = [fit_to(batch.images, shape) for batch in batches_of(chosen, batch_size)]
    return data.Images(torch.cat(batches), chosen.labels, None, other.classes).to(device)


def fit_to(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images as a model of other images takes them: (N, *shape), floats in [0, 1].

    Grey becomes colour by repeating its channel, colour becomes grey by its luma (0.299 R + 0.587 G + 0.114 B); then
    height and width are resized, each by its own factor, bilinearly and with antialiasing. Images that fit already are
    given back bit by bit.

    Args:
        images: (N, C, H, W), floats in [0, 1] or bytes.
        shape: (C', H', W').

    Raises:
        ValueError: C and C' differ, and neither is 1 beside 3.
    """
    images = data.in_unit_interval(images)
    channels, wanted = images.shape[1], shape[0]
    if channels == 1:
        images = images.expand(-1, wanted, -1, -1)
    elif channels == 3 and wanted == 1:
        images = (images * images.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    elif channels != wanted:
        raise ValueError(f"images of {channels} channels cannot be made ones of {wanted}; only 1 and 3 convert")
    if images.shape[2:] != shape[1:]:
        images = torch.nn.functional.interpolate(images, shape[1:], mode="bilinear", antialias=True)
    return images.clamp(0, 1)  # the weights of luma and resizing sum to 1 but for rounding


def _noise(
    name: str, reference: data.Split, shape: tuple[int, ...], batch_size: int, generator: torch.Generator
) -> Tensor:
    """Drawn on the CPU, so that it is the same on every device."""
    size = (len(reference), *shape)
    if name == "uniform":
        return torch.rand(size, generator=generator)
    total, squares = torch.zeros(2, shape[0], dtype=torch.float64)
    for batch in batches_of(reference, batch_size):
        pixels = data.in_unit_interval(batch.images).double().cpu()
        total += pixels.sum((0, 2, 3))
        squares += pixels.square().sum((0, 2, 3))
    count = len(reference) * shape[1] * shape[2]
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    drawn_values = torch.randn(size, generator=generator)
    return (drawn_values * deviation.float()[:, None, None] + mean.float()[:, None, None]).clamp(0, 1)
