"""Normalisation of the images inside the model, so that inputs, gradients and attacks stay in units of pixels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import data

_FILES_MEASURED = 10_000
_BATCH = 256
_PREFIX = "model."


class Normalization(nn.Module):
    """(x − mean) / std of each channel; both (C,) are buffers, so checkpoints hold them."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.training = False

    def train(self, mode: bool = True) -> Normalization:
        """Nothing: it has no mode. As it is always in evaluation, a penalty sees that no forward moves its buffers."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W), pixels in [0, 1]."""
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


class NormalizedModel(nn.Module):
    """A model of normalised images, as one of pixels.

    Its state dict is the model's, key by key, with ``normalization.mean`` and ``normalization.std`` besides: the model
    without it takes the same weights. A layer's path begins with ``model.``.
    """

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.normalization = Normalization(mean, std)
        self.model = model
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x (N, C, H, W), pixels in [0, 1]."""
        return self.model(self.normalization(x))


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    _rename(state, prefix + _PREFIX, prefix)


def _with_prefix(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *results: object
) -> None:
    own = f"{prefix}normalization."
    held = {name: state.pop(name) for name in list(state) if name.startswith(own)}
    _rename(state, prefix, prefix + _PREFIX)
    state.update(held)


def _rename(state: dict[str, Any], prefix: str, new: str) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[new + name.removeprefix(prefix)] = state.pop(name)


def channel_statistics(split: data.Split) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,), float32 on the CPU, of each channel over a split's pixels in [0, 1].

    Of images in memory all are measured, of those in files 10,000 at most, evenly spread. A channel that is the same
    everywhere gets the deviation 1, so that it becomes 0. Sums of bytes are exact, so no order or device changes them.
    """
    step = math.ceil(len(split) / _FILES_MEASURED) if isinstance(split, data.ImageFiles) else 1
    indices = torch.arange(0, len(split), step, device=split.index_device)
    sums: list[Tensor] = []
    pixels = 0
    for images, _ in split.batches(map(data.Batch, indices.split(_BATCH))):
        exact = images.double() if images.is_floating_point() else images.long()
        sums.append(torch.stack([exact.sum((0, 2, 3)), exact.square().sum((0, 2, 3))]))
        pixels += exact[:, 0].numel()
        unit = 1.0 if images.is_floating_point() else 255.0
    mean, mean_square = torch.stack(sums).sum(0).double().cpu() / pixels
    deviation = (mean_square - mean.square()).clamp_min(0).sqrt() / unit
    return (mean / unit).float(), torch.where(deviation > 0, deviation, 1.0).float()
