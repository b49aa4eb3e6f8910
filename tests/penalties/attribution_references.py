"""Robust attribution regularisation written out in eager PyTorch: paths, sizes, and the attack on them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from penalty_references import CLASSES
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def images(samples: int = 6, dtype: torch.dtype = torch.float64, seed: int = 2) -> tuple[Tensor, Tensor]:
    """In [0, 1], some values at either end, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, 3, 6, 6, dtype=torch.float64, generator=generator).mul(1.2).sub(0.1).clamp(0, 1)
    return x.to(dtype), torch.randint(CLASSES, (samples,), generator=generator)


def losses(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y, reduction="none")


def attribution(model: nn.Sequential, start: Tensor, end: Tensor, y: Tensor, steps: int, layer: int | None) -> Tensor:
    """From ``start`` to ``end``, the path's points as one batch; to the output of the module of number ``layer``."""
    points = [start + k / steps * (end - start) for k in range(steps + 1)]
    if layer is None:
        batch = torch.cat(points[1:])
        batch = batch if batch.requires_grad else batch.requires_grad_()
        values = losses(model, batch, y.repeat(steps))
        (gradient,) = torch.autograd.grad(values.sum(), batch, create_graph=True)
        return (end - start) * sum(gradient.chunk(steps)) / steps
    h = model[: layer + 1](torch.cat(points))
    values = losses(model[layer + 1 :], h, y.repeat(steps + 1))
    (gradient,) = torch.autograd.grad(values.sum(), h, create_graph=True)
    values_of_h, gradients = h.chunk(steps + 1), gradient.chunk(steps + 1)
    return sum(gradients[k] * (values_of_h[k] - values_of_h[k - 1]) for k in range(1, steps + 1))


def size(attributions: Tensor, kind: str) -> Tensor:
    """(N,)."""
    flat = attributions.flatten(1)
    return flat.abs().sum(1) if kind == "l1" else flat.square().sum(1).sqrt()


def size_along(
    model: nn.Sequential, x: Tensor, moved: Tensor, y: Tensor, steps: int, kind: str, layer: int | None
) -> Tensor:
    if kind == "sum":
        return losses(model, moved, y) - losses(model, x, y)
    return size(attribution(model, x, moved, y, steps, layer), kind)


def worst(objective: Callable[[Tensor], Tensor], x: Tensor, epsilon: float, steps: int, seed: int) -> Tensor:
    """L∞ PGD in [0, 1] from a uniform start, with steps of 2.5 ε / steps along the sign."""
    uniform = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
    moved = (x + epsilon * (2 * uniform - 1)).clamp(0, 1)
    for _ in range(steps):
        leaf = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf).sum(), leaf)
        moved = (moved + 2.5 * epsilon / steps * gradient.sign()).clamp(x - epsilon, x + epsilon).clamp(0, 1)
    return moved.detach()


def statistics_after(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The buffers after one forward of x."""
    model = copy.deepcopy(model)
    model(x)
    return dict(model.named_buffers())
