"""The ball {x' : ‖x' − x‖ ≤ ε} of the L∞ or the L2 norm around each sample: points, projections, steepest directions.

δ = x' − x is of shape (N, ...) and in at least float32; norms are over all dimensions but the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = ("linf", "l2")

# Scaling a perturbation onto the L2 sphere is aimed this much inside it, relatively: more than the rounding of a
# float32 norm, and nothing that an attack would miss.
_SPHERE_MARGIN = 2.0**-20


def uniform_point(x: Tensor, radius: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """δ of a point of the ball around each sample, uniform in its volume."""
    if norm == "linf":
        return (2 * torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator) - 1) * radius
    direction = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator).flatten(1)
    direction = direction / _where_zero(direction.norm(dim=1, keepdim=True), 1.0)
    # In D dimensions the share of the volume within r of the centre is (r/ε)^D.
    uniform = torch.rand((x.shape[0], 1), dtype=x.dtype, device=x.device, generator=generator)
    return (direction * radius * uniform ** (1.0 / direction.shape[1])).view(x.shape)


def ascent_direction(gradient: Tensor, norm: str) -> Tensor:
    """The direction of unit length in which the function grows fastest; zero where the gradient is zero."""
    if norm == "linf":
        return gradient.sign() + 0 * gradient  # sign(NaN) is 0: the product brings NaN back, to be reported
    flat = gradient.flatten(1)
    # Divided by its largest magnitude first: a saturated softmax leaves gradients whose squares underflow.
    flat = flat / _where_zero(flat.abs().amax(1, keepdim=True), 1.0)
    return (flat / _where_zero(flat.norm(dim=1, keepdim=True), 1.0)).view(gradient.shape)


def project(delta: Tensor, radius: float, norm: str) -> Tensor:
    """The nearest δ of the ball."""
    if norm == "linf":
        return delta.clamp(-radius, radius)
    flat = delta.flatten(1)
    length = flat.double().norm(dim=1, keepdim=True)
    target = radius * (1 - _SPHERE_MARGIN)
    scale = torch.where(length > target, target / _where_zero(length, 1.0), 1.0)
    return (flat * scale.to(flat.dtype)).view(delta.shape)


def displace(x: Tensor, delta: Tensor, bounds: tuple[float, float]) -> Tensor:
    """x + δ within the bounds, rounded towards x: |x' − x| ≤ |δ| exactly, so rounding cannot leave the ball.

    One step of the floating-point grid is enough: rounding moved x' by at most half of one. The comparison is in
    float64, where the difference of two narrower numbers is exact or rounds to no less than |δ|.
    """
    moved = (x.to(delta.dtype) + delta).to(x.dtype).clamp(*bounds)
    too_far = (moved.double() - x.double()).abs() > delta.double().abs()
    return torch.where(too_far, torch.nextafter(moved, x), moved)


def largest_not_above(value: float, dtype: torch.dtype) -> float:
    """``value`` rounded down to ``dtype``: an element of a tensor compared with the Python float itself passes."""
    rounded = torch.tensor(value, dtype=dtype)
    if rounded.item() > value:
        rounded = torch.nextafter(rounded, torch.zeros_like(rounded))
    return float(rounded.item())


def _where_zero(values: Tensor, replacement: float) -> Tensor:
    return torch.where(values == 0, replacement, values)
