"""Small images of a few classes, and classifiers of them: an honest one, and some that hide their gradients."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from rds_fast.training import Images

SIZE = 10  # pixels a side


@functools.cache
def images(samples: int, seed: int, classes: int = 5) -> Images:
    """(samples, 1, 10, 10): the smooth pattern of a class at low contrast beneath noise."""
    patterns = torch.rand(classes, 1, 5, 5, generator=torch.Generator().manual_seed(99))
    patterns = nn.functional.interpolate(patterns, scale_factor=2, mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    noise = 0.15 * torch.randn(samples, 1, SIZE, SIZE, generator=generator)
    return Images((0.25 + 0.5 * patterns[labels] + noise).clamp(0, 1), labels, None, classes)


@functools.cache
def honest(classes: int = 5) -> nn.Module:
    """A small network with batch norm, trained for a moment, in eval mode."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, classes)
        )
        split = images(600, 1, classes)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(60):
            part = slice(100 * (step % 6), 100 * (step % 6) + 100)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(split.images[part]), split.labels[part]).backward()
            optimizer.step()
        optimizer.zero_grad()
    return model.eval()


class Quantised(nn.Module):
    """The honest network behind a staircase, whose gradient is zero wherever it has one."""

    def __init__(self) -> None:
        super().__init__()
        self.network = honest()

    def forward(self, x: Tensor) -> Tensor:
        return self.network((8 * x).round() / 8)


class Saturated(nn.Module):
    """The honest network's logits times 10,000: no other prediction, and a cross-entropy without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.network = honest()

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.network(x)


class Random(nn.Module):
    """The honest network on noisy inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = honest()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + 0.3 * torch.randn_like(x))
