"""Projected gradient descent: the accuracy that is left inside an L∞ or L2 ball around each sample."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..reference import accumulation_dtype

# Scaling a perturbation onto the L2 sphere is aimed this much inside it, relatively: more than the rounding of a
# float32 norm, and nothing that an attack would miss.
_SPHERE_MARGIN = 2.0**-20


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    norm: str = "linf",
    steps: int = 40,
    step_size: float | None = None,
    random_start: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial inputs by projected gradient ascent of the cross-entropy (Madry et al. 2018).

    With δ = x' − x, g = ∇ CE(f(x'), y) of each sample and a the step size, each step is

        L∞:  δ ← clip(δ + a sign g, −ε, ε)            L2:  δ ← Π(δ + a g/‖g‖₂),  Π(δ) = δ min(1, ε/‖δ‖₂)

    followed by clipping x + δ to the bounds, which never lengthens δ. The last iterate is returned, as Madry et al.
    do: keeping the best of all iterates costs one more forward and says less about the step size chosen.

    Args:
        model: maps (N, ...) to logits (N, C). It is attacked in the mode it is in (call ``model.eval()`` first, as a
            rule); its parameters, their gradients, its buffers and its mode are left as they were.
        x: samples (N, ...), floating, within the bounds.
        y: class indices (N,).
        epsilon: radius of the ball, in the units of x; 0 returns a copy of x.
        norm: ``"linf"`` or ``"l2"``, over all dimensions but the first.
        steps: gradient steps, at least 1.
        step_size: length of a step in the chosen norm; default ``2.5 * epsilon / steps``, enough to reach any point
            of the ball's surface from any start.
        random_start: begin at a point drawn uniformly from the ball (L2: uniformly in its volume), else at x.
        bounds: smallest and largest value of an input; infinite ones are no bounds.
        generator: the source of the random start, on x's device; default: PyTorch's own.

    Returns:
        x' of x's shape and dtype, without a graph. ``(x' - x).abs() <= epsilon`` holds element by element (for L2:
        ``(x' - x).flatten(1).norm(dim=1) <= epsilon``), and x' is within the bounds, without any tolerance.

    Raises:
        TypeError: x is not floating, or y not of integers.
        ValueError: labels, logits, epsilon, steps, step_size, norm or bounds are not as described.
        RuntimeError: the logits do not depend on x differentiably.
        FloatingPointError: their gradient is not finite.
    """
    _check_arguments(x, y, epsilon, norm, steps, step_size, bounds)
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.detach().clone(), y.detach().long().clone()  # a clone, because inference tensors allow no autograd
        if epsilon == 0 or x.numel() == 0:
            return x
        radius = _largest_not_above(epsilon, x.dtype)
        step = 2.5 * epsilon / steps if step_size is None else step_size
        forward = _without_side_effects(model)
        # δ is kept beside x' in at least float32: in 16 bits a small step would be lost in rounding x'.
        origin = x.to(accumulation_dtype(x.dtype))
        delta = _random_point(origin, radius, norm, generator) if random_start else torch.zeros_like(origin)
        labels = (int(y.min()), int(y.max()))  # read once, not in every step: on a GPU reading waits for it
        for _ in range(steps):
            delta = (origin + delta).clamp(*bounds) - origin
            gradient = _loss_gradient(forward, (origin + delta).to(x.dtype), y, labels)
            delta = _project(delta + step * _ascent_direction(gradient.to(origin.dtype), norm), radius, norm)
        if not bool(delta.isfinite().all()):
            raise FloatingPointError(
                "pgd met a gradient of the cross-entropy that is not finite: so are, perhaps, the model's logits. "
                "Check model(x) on these samples, and the model's weights."
            )
        return _displace(x, delta, bounds)


def _check_arguments(
    x: Tensor,
    y: Tensor,
    epsilon: float,
    norm: str,
    steps: int,
    step_size: float | None,
    bounds: tuple[float, float],
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; it must be floating to be perturbed: pass x.float()")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y is {y.dtype}; it must hold class indices, int64")
    if x.dim() == 0 or y.shape != x.shape[:1]:
        raise ValueError(f"y has shape {tuple(y.shape)}; x of shape {tuple(x.shape)} needs one label a sample")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm is {norm!r}; it must be 'linf' or 'l2'")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon is {epsilon}; it must be a finite radius, 0 or more")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size is {step_size}; it must be positive, or None for 2.5 * epsilon / steps")
    low, high = bounds
    if not low < high:
        raise ValueError(f"bounds are ({low}, {high}); the first must be below the second")
    if not bool(((x >= low) & (x <= high)).all()):
        raise ValueError(
            f"x leaves the bounds ({low}, {high}), or holds NaN. Scale x into them, or pass the bounds of your inputs, "
            "for example bounds=(-math.inf, math.inf) for standardised ones."
        )


def _without_side_effects(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model with its parameters detached and its buffers copied.

    No graph of the weights is built, and an attack in train mode moves the copies of batch norm's running statistics
    instead of the model's own.
    """
    if not isinstance(model, nn.Module):
        return model
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state.update({name: buffer.detach().clone() for name, buffer in model.named_buffers()})
    return lambda x: torch.func.functional_call(model, state, (x,))


def _loss_gradient(forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, labels: tuple[int, int]) -> Tensor:
    """∇ₓ of the sum of the samples' cross-entropies; ``labels``: the smallest and the largest of y."""
    x = x.detach().requires_grad_()
    logits = forward(x)
    if logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        raise ValueError(f"the model's logits have shape {tuple(logits.shape)}; pgd needs ({x.shape[0]}, C)")
    classes = logits.shape[1]
    if labels[0] < 0 or labels[1] >= classes:
        raise ValueError(f"y holds labels from {labels[0]} to {labels[1]}; the model has classes 0 to {classes - 1}")
    loss = cross_entropy(logits.to(accumulation_dtype(logits.dtype)), y, reduction="sum")
    gradient = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise RuntimeError(
            "the model's logits do not depend differentiably on its input, so there is no gradient to attack with. "
            "Is the input detached, or are gradients disabled, inside the model?"
        )
    return gradient


def _ascent_direction(gradient: Tensor, norm: str) -> Tensor:
    """The direction of unit length in which the loss grows fastest; zero where the gradient is zero."""
    if norm == "linf":
        return gradient.sign() + 0 * gradient  # sign(NaN) is 0: the product brings NaN back, to be reported
    flat = gradient.flatten(1)
    # Divided by its largest magnitude first: a saturated softmax leaves gradients whose squares underflow.
    flat = flat / _where_zero(flat.abs().amax(1, keepdim=True), 1.0)
    return (flat / _where_zero(flat.norm(dim=1, keepdim=True), 1.0)).view_as(gradient)


def _project(delta: Tensor, radius: float, norm: str) -> Tensor:
    if norm == "linf":
        return delta.clamp(-radius, radius)
    flat = delta.flatten(1)
    length = flat.double().norm(dim=1, keepdim=True)
    target = radius * (1 - _SPHERE_MARGIN)
    scale = torch.where(length > target, target / _where_zero(length, 1.0), 1.0)
    return (flat * scale.to(flat.dtype)).view_as(delta)


def _random_point(x: Tensor, radius: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """A point of the ball for each sample, uniform in its volume."""
    if norm == "linf":
        return (2 * torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator) - 1) * radius
    direction = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator).flatten(1)
    direction = direction / _where_zero(direction.norm(dim=1, keepdim=True), 1.0)
    # In D dimensions the share of the volume within r of the centre is (r/ε)^D.
    uniform = torch.rand((x.shape[0], 1), dtype=x.dtype, device=x.device, generator=generator)
    return (direction * radius * uniform ** (1.0 / direction.shape[1])).view_as(x)


def _displace(x: Tensor, delta: Tensor, bounds: tuple[float, float]) -> Tensor:
    """x + δ within the bounds, rounded towards x: |x' − x| ≤ |δ| exactly, so rounding cannot leave the ball.

    One step of the floating-point grid is enough: rounding moved x' by at most half of one. The comparison is in
    float64, where the difference of two narrower numbers is exact or rounds to no less than |δ|.
    """
    moved = (x.to(delta.dtype) + delta).to(x.dtype).clamp(*bounds)
    too_far = (moved.double() - x.double()).abs() > delta.double().abs()
    return torch.where(too_far, torch.nextafter(moved, x), moved)


def _largest_not_above(value: float, dtype: torch.dtype) -> float:
    """``value`` rounded down to ``dtype``: an element of a tensor compared with the Python float itself passes."""
    rounded = torch.tensor(value, dtype=dtype)
    if rounded.item() > value:
        rounded = torch.nextafter(rounded, torch.zeros_like(rounded))
    return float(rounded.item())


def _where_zero(values: Tensor, replacement: float) -> Tensor:
    return torch.where(values == 0, replacement, values)
