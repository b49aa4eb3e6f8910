"""Projected gradient ascent inside an L∞ or L2 ball around each sample: of any function, and of the cross-entropy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..compilation import compiled_part, uncompiled
from ..distributed import is_sharded
from ..ops.inputs import check_count, check_number
from ..ops.logsumexp import without_autocast
from ..reference import accumulation_dtype
from .ball import NORMS, ascent_direction, displace, largest_not_above, project, uniform_point

# The cotangent of every gradient here. Only its direction counts, which a power of two leaves as it is, to the bit; in
# float16 it lifts what lies below 6e-8, float16's least number, and leaves room for gradients of up to 255.
_COTANGENT = 2.0**8


def ascend(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    epsilon: float,
    *,
    norm: str = "linf",
    steps: int,
    step_size: float | None = None,
    random_start: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """x' in the ball around each sample, by projected gradient ascent of each sample's own objective.

    With δ = x' − x, g = ∇ objective(x') of each sample and a the step size, each step is

        L∞:  δ ← clip(δ + a sign g, −ε, ε)            L2:  δ ← Π(δ + a g/‖g‖₂),  Π(δ) = δ min(1, ε/‖δ‖₂)

    followed by clipping x + δ to the bounds, which never lengthens δ. The last iterate is returned, as Madry et al.
    (2018) do: keeping the best of all iterates costs one more forward and says less about the step size chosen.

    Nothing but the objective is evaluated, once a step, and differentiated once, with respect to x' alone: no
    parameter's ``grad`` sees it. An objective that holds a gradient itself (an attribution, say) computes it with its
    graph; under ``rds_fast.fast_double_backward`` the step then costs less. Off the CPU no value of a tensor is read,
    so nothing waits for the device; what is not finite ends in an x' that is not.

    Args:
        objective: maps x' (N, ...), of x's dtype and requiring a gradient, to one value a sample, (N,), differentiable
            with respect to x'. It is called with gradients enabled, also inside ``torch.no_grad``.
        x: samples (N, ...), floating, within the bounds.
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
        TypeError: x is not floating, or a number is none.
        ValueError: epsilon, steps, step_size, norm, bounds or the objective's values are not as described; x leaves
            the bounds (on a GPU a device assertion fails).
        RuntimeError: the objective does not depend on x' differentiably.
    """
    check_attack(epsilon, norm, steps, step_size, bounds)
    check_floating(x)
    if x.dim() == 0:
        raise ValueError("x has no dimension; it must have shape (N, ...), one sample a row")
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone()  # a clone, because inference tensors allow no autograd
        if epsilon == 0 or x.numel() == 0:
            return x
        check_inside(x, bounds)
        radius = largest_not_above(epsilon, x.dtype)
        step = 2.5 * epsilon / steps if step_size is None else step_size
        # δ is kept beside x' in at least float32: in 16 bits a small step would be lost in rounding x'.
        origin = x.to(accumulation_dtype(x.dtype))
        delta = uniform_point(origin, radius, norm, generator) if random_start else torch.zeros_like(origin)
        for _ in range(steps):
            delta = (origin + delta).clamp(*bounds) - origin
            gradient = _gradient(objective, (origin + delta).to(x.dtype))
            delta = project(delta + step * ascent_direction(gradient.to(origin.dtype), norm), radius, norm)
        return displace(x, delta, bounds)


@uncompiled
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
    """Adversarial inputs by projected gradient ascent of the cross-entropy (Madry et al. 2018); see ``ascend``.

    Args:
        model: maps (N, ...) to logits (N, C). It is attacked in the mode it is in (call ``model.eval()`` first, as a
            rule); its parameters, their gradients, its buffers and its mode are left as they were.
        x: samples (N, ...), floating, within the bounds.
        y: class indices (N,).
        epsilon: radius of the ball, in the units of x; 0 returns a copy of x.
        norm, steps, step_size, random_start, bounds, generator: as for ``ascend``.

    Returns:
        x' of x's shape and dtype, without a graph. ``(x' - x).abs() <= epsilon`` holds element by element (for L2:
        ``(x' - x).flatten(1).norm(dim=1) <= epsilon``), and x' is within the bounds, without any tolerance.

    Raises:
        TypeError: x or the logits are not floating, or y not of integers.
        ValueError: labels, logits, epsilon, steps, step_size, norm or bounds are not as described.
        RuntimeError: the logits do not depend on x differentiably.
        FloatingPointError: their gradient is not finite.
    """
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y is {y.dtype}; it must hold class indices, int64")
    if x.dim() == 0 or y.shape != x.shape[:1]:
        raise ValueError(f"y has shape {tuple(y.shape)}; x of shape {tuple(x.shape)} needs one label a sample")
    check_attack(epsilon, norm, steps, step_size, bounds)
    check_inside(x, bounds, read=True)
    with torch.inference_mode(False):
        moved = ascend(
            _cross_entropy_of(detached(model), y.detach().long().clone()),
            x,
            epsilon,
            norm=norm,
            steps=steps,
            step_size=step_size,
            random_start=random_start,
            bounds=bounds,
            generator=generator,
        )
    if not bool(moved.isfinite().all()):
        raise FloatingPointError(
            "pgd met a gradient of the cross-entropy that is not finite: so are, perhaps, the model's logits. "
            "Check model(x) on these samples, and the model's weights."
        )
    return moved


def detached(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The model with its parameters detached and its buffers copied.

    No graph of the weights is built, and an attack in train mode moves the copies of batch norm's running statistics
    instead of the model's own. What is no module is returned as it is. A scripted module takes no other parameters for
    a call: it is copied. A sharded one cannot even be copied, and is returned as it is where no buffers would move.
    """
    if not isinstance(model, nn.Module):
        return model
    if is_sharded(model):
        if any(module.training and module._buffers and _tracks(module) for module in model.modules()):
            raise ValueError(
                "the model is sharded (FSDP) and in train mode, and an attack would move its buffers, such as batch "
                "norm's running statistics; attack it in eval mode: model.eval()"
            )
        return model
    if compiled_part(model)[1] == "torch.jit":
        with torch.no_grad():  # else the copies of parameters are results, not leaves
            model = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return model
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state.update({name: buffer.detach().clone() for name, buffer in model.named_buffers()})
    return lambda x: torch.func.functional_call(model, state, (x,))


def _tracks(module: nn.Module) -> bool:
    """Whether a module in train mode may write into its buffers: batch norm can be told not to."""
    return bool(getattr(module, "track_running_stats", True))


def check_attack(
    epsilon: float, norm: str, steps: int, step_size: float | None, bounds: tuple[float, float], prefix: str = ""
) -> None:
    """Raise TypeError or ValueError unless the settings describe an attack; ``prefix`` is that of two names."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it must be 'linf' or 'l2'")
    if not 0 <= check_number("epsilon", epsilon) < math.inf:
        raise ValueError(f"epsilon is {epsilon}; it must be a finite radius, 0 or more, in the units of x")
    check_count(f"{prefix}steps", steps)
    if step_size is not None and not 0 < check_number(f"{prefix}step_size", step_size) < math.inf:
        raise ValueError(f"{prefix}step_size is {step_size}; it must be positive, or None for 2.5 * epsilon / steps")
    check_bounds(bounds)


def check_bounds(bounds: tuple[float, float]) -> None:
    """Raise TypeError or ValueError unless the bounds are two numbers, the first below the second."""
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds are {bounds!r}; they must be two numbers, an input's smallest and largest value")
    low, high = (check_number("a bound", bound) for bound in bounds)
    if not low < high:
        raise ValueError(f"bounds are ({low}, {high}); the first must be below the second")


def check_floating(x: Tensor) -> None:
    """Raise TypeError unless x holds floating-point numbers, which can be moved a little."""
    if x.is_complex():
        raise TypeError(
            f"x is {x.dtype}; it must be floating: pass torch.view_as_real(x), and a model that begins with "
            "torch.view_as_complex"
        )
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; it must be floating: pass x.float()")


def check_inside(x: Tensor, bounds: tuple[float, float], *, read: bool = False) -> None:
    """x is within the bounds. On CUDA a value is read only if so said; else an assertion on the device watches."""
    check_floating(x)
    low, high = bounds
    inside = ((x >= low) & (x <= high)).all()
    if x.is_meta:
        return  # no values
    if x.is_cuda and not read:
        torch._assert_async(inside, f"x leaves the bounds ({low}, {high}), or holds NaN")
    elif not bool(inside):
        raise ValueError(
            f"x leaves the bounds ({low}, {high}), or holds NaN. Scale x into them, or pass the bounds of your inputs, "
            "for example bounds=(-math.inf, math.inf) for standardised ones."
        )


def _gradient(objective: Callable[[Tensor], Tensor], moved: Tensor) -> Tensor:
    """∇ of the sum of the objectives, up to the factor ``_COTANGENT``."""
    moved = moved.detach().requires_grad_()
    values = objective(moved)
    if values.shape != moved.shape[:1]:
        raise ValueError(
            f"the objective has shape {tuple(values.shape)}; it must be ({moved.shape[0]},), one value a sample"
        )
    cotangents = torch.full((), _COTANGENT, dtype=values.dtype, device=values.device).expand_as(values)
    gradient = None
    if values.requires_grad:
        with without_autocast(moved.device):  # autocast is for forwards
            gradient = torch.autograd.grad(values, moved, cotangents, allow_unused=True)[0]
    if gradient is None:
        raise RuntimeError(
            "what is to be maximised does not depend differentiably on x, so there is no gradient to attack with. "
            "Is the input detached, or are gradients disabled, inside the model?"
        )
    return gradient


def _cross_entropy_of(model: Callable[[Tensor], Tensor], y: Tensor) -> Callable[[Tensor], Tensor]:
    """x' to the cross-entropy of each sample, (N,), in at least float32."""
    lowest, highest = (int(y.min()), int(y.max())) if len(y) else (0, 0)  # read once: on a GPU reading waits for it

    def objective(moved: Tensor) -> Tensor:
        logits = model(moved)
        if not logits.is_floating_point():
            raise TypeError(f"the model's logits are {logits.dtype}; pgd needs floating-point ones")
        if logits.dim() != 2 or logits.shape[0] != moved.shape[0]:
            raise ValueError(f"the model's logits have shape {tuple(logits.shape)}; pgd needs ({moved.shape[0]}, C)")
        if logits.shape[1] == 1:
            raise ValueError(
                f"the model's logits have shape {tuple(logits.shape)}, one logit a sample, and the cross-entropy of a "
                "softmax over one class is 0 everywhere; return two, such as torch.cat([torch.zeros_like(f), f], dim=1)"
            )
        if lowest < 0 or highest >= logits.shape[1]:
            classes = f"classes 0 to {logits.shape[1] - 1}"
            raise ValueError(f"y holds labels from {lowest} to {highest}; the model has {classes}")
        return cross_entropy(logits.to(accumulation_dtype(logits.dtype)), y, reduction="none")

    return objective
