"""The Square attack: a random search that sees a model's logits and no gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..attacks.ball import displace, largest_not_above
from ..attacks.pgd import check_bounds, check_inside, detached
from ..reference import accumulation_dtype

# The share of the pixels that a square covers is this at first and halved after each of these shares of the queries
# (the schedule of Andriushchenko et al. 2020, there for 10,000 queries).
_FIRST_SHARE = 0.8
_HALVED_AFTER = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@torch.no_grad()
def square_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    queries: int = 5000,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial inputs in the L∞ ball without gradients (Andriushchenko et al. 2020).

    Every x' is a corner of the ball within the bounds: each value is the largest or the smallest allowed. It begins
    as vertical stripes, drawn for each column and channel. Each query paints one square, of a random place and a
    random side of the ball for each channel, and keeps it where it lowers the margin f_y − max_{i≠y} fᵢ; the squares
    shrink as the queries go. A sample is left alone once its margin is negative.

    The authors' code never paints the last row and column of an image; this does, and breaks more for it.

    What the logits' scale, a vanishing gradient or a step function hide from gradients, they do not hide from this.

    Args:
        model: maps (N, ...) to logits (N, C), C at least 2, in the mode it is to be attacked in; it is left as it was.
        x: samples (N, C, H, W), or of any other shape, which is taken for one row of pixels; floating, within the
            bounds.
        y: class indices (N,).
        epsilon: radius of the L∞ ball, in the units of x; 0 returns a copy of x.
        queries: forwards of the model, at least 1.
        bounds: smallest and largest value of an input.
        generator: the source of stripes and squares, on x's device; default: PyTorch's own.

    Returns:
        x' of x's shape and dtype: ``(x' - x).abs() <= epsilon`` and the bounds hold without any tolerance.

    Raises:
        TypeError: x is not floating, or bounds are not two numbers.
        ValueError: epsilon, queries or bounds are out of range, or x leaves the bounds.
    """
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon is {epsilon}; it must be a finite radius, 0 or more")
    if queries < 1:
        raise ValueError(f"queries is {queries}; it must be 1 or more")
    check_bounds(bounds)
    check_inside(x, bounds, read=True)
    if epsilon == 0 or x.numel() == 0:
        return x.clone()
    forward = detached(model)
    lowest, highest = _corners(_as_images(x), epsilon, bounds)
    moved = torch.where(_coin((len(x), lowest.shape[1], 1, lowest.shape[3]), x, generator), highest, lowest)
    margin = _margin(forward(moved.view(x.shape)), y)
    for query in range(1, queries):
        left = (margin >= 0).nonzero()[:, 0]
        if len(left) == 0:
            break
        square = _square(moved[left].shape, query / queries, x.device, generator)
        colour = _coin((len(left), lowest.shape[1], 1, 1), x, generator)
        candidate = torch.where(square, torch.where(colour, highest[left], lowest[left]), moved[left])
        found = _margin(forward(candidate.view(-1, *x.shape[1:])), y[left])
        better = found < margin[left]
        moved[left] = torch.where(better[:, None, None, None], candidate, moved[left])
        margin[left] = torch.where(better, found, margin[left])
    return moved.view(x.shape)


def _as_images(x: Tensor) -> Tensor:
    return x.contiguous() if x.dim() == 4 else x.reshape(len(x), 1, 1, -1)


def _corners(x: Tensor, epsilon: float, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """x − ε and x + ε within the bounds and, to the last bit, the ball."""
    radius = torch.full_like(x, largest_not_above(epsilon, x.dtype), dtype=accumulation_dtype(x.dtype))
    return displace(x, -radius, bounds), displace(x, radius, bounds)


def _coin(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, device=like.device, generator=generator) < 0.5


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """f_y − max_{i≠y} fᵢ (N,): negative where the sample is classified wrongly beyond doubt."""
    target = logits.gather(1, y[:, None])[:, 0]
    return target - logits.scatter(1, y[:, None], -math.inf).amax(1)


def _square(shape: torch.Size, progress: float, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(N, 1, H, W), bool: True on one square of each sample; progress is the share of the queries that are spent."""
    samples, _, height, width = shape
    share = _FIRST_SHARE / 2 ** sum(progress > after for after in _HALVED_AFTER)
    side = max(1, round(math.sqrt(share * height * width)))
    tall = min(side, height)
    wide = min(max(side, round(share * height * width / tall)), width)  # no square fits a row of pixels, nor an edge
    top = torch.randint(height - tall + 1, (samples, 1), device=device, generator=generator)
    left = torch.randint(width - wide + 1, (samples, 1), device=device, generator=generator)
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    rows = (row >= top) & (row < top + tall)
    columns = (column >= left) & (column < left + wide)
    return rows[:, None, :, None] & columns[:, None, None, :]
