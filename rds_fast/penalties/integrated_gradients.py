"""Integrated gradients, to the input or to a layer, by a sum over m points of a straight path.

With ℓ the cross-entropy or the logit f_y, x⁰ the baseline and z_k = x⁰ + (k/m)(x − x⁰), k = 0..m,

    to the input        IG = (x − x⁰) ⊙ (1/m) Σₖ ∇ℓ(z_k),                k = 1..m,
    to a layer h        IG = Σₖ ∇_h ℓ(z_k) ⊙ (h(z_k) − h(z_{k−1})),      k = 1..m:

the first is the second with h the identity. Completeness: Σ IG = ℓ(x) − ℓ(x⁰), up to an error of O(1/m), in either.

Sources: Sundararajan, Taly and Yan (2017); the points k = 1..m and the layer's path integral: Chen, Wu, Rastogi, Liang
and Jha (2019).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attacks.pgd import detached
from ..compilation import uncompiled
from ..ops.inputs import check_count, check_number
from ..reference import accumulation_dtype, precise
from .checks import check_choice, check_input, check_pair, refuse_compiled
from .losses import cross_entropies_of, target_logit
from .model_state import frozen_statistics, samples_interact
from .shared import differentiable_input, input_gradients, logits_of

# Without a graph to be kept, about so many values of inputs at most go through the model at once: 16 MiB in float32,
# and some hundred times that in the activations of a convolutional network.
_VALUES_AT_ONCE = 2**22


class PathTerms(NamedTuple):
    """What one forward of a path gives: the attribution (N, ...), in at least float32, and its end's logits (N, C)."""

    attribution: Tensor
    logits: Tensor


@uncompiled
def integrated_gradients(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    baseline: Tensor | float,
    *,
    steps: int = 50,
    create_graph: bool = False,
    layer: str | None = None,
    of: str = "cross_entropy",
) -> Tensor:
    """Integrated gradients from a baseline to x, for each sample: of the cross-entropy, or of the logit of y.

    ``IG = (x − x⁰) ⊙ (1/m) Σₖ ∇ℓ(x⁰ + (k/m)(x − x⁰))``, k = 1..m; with ``layer``, the path integral through that
    layer's outputs h, ``Σₖ ∇_h ℓ(z_k) ⊙ (h(z_k) − h(z_{k−1}))``. Their sum is ℓ(x) − ℓ(x⁰) up to O(1/m).

    All path points are one batch of m·N samples ((m + 1)·N with a layer). Without a graph a large one is taken in
    pieces, unless samples interact. The model stays in its mode: batch norm in train mode normalises over all path
    points of all samples together and so couples them, and dropout draws another mask at each point. Parameters'
    gradients, ``x.grad`` and buffers are left alone.

    Args:
        model: maps x to logits (N, C). For ``layer`` a ``torch.nn.Module``; not compiled, for ``create_graph``.
        x: (N, ...), floating point, the path's end.
        y: class indices (N,), a row of −100 having the attribution 0; or, for the cross-entropy, probabilities (N, C).
        baseline: x⁰, in x's shape or one that expands to it; a number stands for all of its values.
        steps: m, at least 1.
        create_graph: True makes the result differentiable, once, with respect to the parameters and to whichever of x
            and baseline requires a gradient; its forward runs under ``rds_fast.fast_double_backward``.
        layer: the name of a module, as in ``model.named_modules()``, that runs once in a forward and returns a tensor.
        of: ``"cross_entropy"``, what robust attribution regularisation trains with; or ``"target_logit"``, f_y, what
            attributions are shown of and compared by.

    Returns:
        (N, ...), of x's shape or, with a layer, of its output's; in x's dtype.

    Raises:
        TypeError: x or the baseline is not floating point, y or steps is of the wrong type, or the model is no module
            and a layer is given.
        ValueError: shapes do not fit, steps is below 1, ``of`` is unknown, or there is no such layer (the nearest name
            is suggested).
        IndexError: on CPU, a class index is out of range; on CUDA a device assertion fails, as in PyTorch.
        RuntimeError: there is no gradient path from x to the logits, or the layer ran not once; with ``create_graph``,
            gradients are disabled or the model is compiled.
    """
    steps = check_count("steps", steps)
    check_choice("of", of, tuple(_OUTPUTS))
    if not create_graph:
        return _without_graph(model, x, y, baseline, steps, layer, of)
    check_input(x)
    check_pair(x, y)
    refuse_compiled(model)
    module = find_layer(model, layer)
    with frozen_statistics(model):
        terms = path_terms(model, x, y, _baseline(baseline, x), steps, module, output_of=_OUTPUTS[of])
    return terms.attribution.to(x.dtype)


def _without_graph(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    baseline: Tensor | float,
    steps: int,
    layer: str | None,
    of: str,
) -> Tensor:
    """The same in pieces of the path, also where gradients are disabled."""
    with torch.inference_mode(False), torch.enable_grad():
        # Clones, because inference tensors allow no autograd.
        x, y = (t.detach().clone() if isinstance(t, Tensor) else t for t in (x, y))
        check_input(x)
        check_pair(x, y)
        start, frozen, module = _baseline(baseline, x).detach().clone(), detached(model), find_layer(model, layer)
        at_once = steps if samples_interact(model) else _VALUES_AT_ONCE // max(x.numel(), 1)
        attribution = torch.zeros((), device=x.device)
        for positions in _pieces(steps, at_once):
            terms = path_terms(
                frozen, x, y, start, steps, module, positions, create_graph=False, output_of=_OUTPUTS[of]
            )
            attribution = attribution + terms.attribution
        return attribution.to(x.dtype)


def path_terms(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    baseline: Tensor,
    steps: int,
    layer: nn.Module | None = None,
    positions: range | None = None,
    *,
    create_graph: bool = True,
    output_of: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> PathTerms:
    """The terms k in ``positions`` (default: all, 1..steps) of the sum, and the logits at the last of them.

    ``output_of``: ℓ, of logits and labels; default: the cross-entropy.
    """
    positions = positions or range(1, steps + 1)
    first = positions.start if layer is None else positions.start - 1  # a difference needs the point before, too
    points = differentiable_input(_path(x, baseline, range(first, positions.stop), steps))
    with _outputs_of(layer) as outputs:
        logits = logits_of(model, points, derivatives=2 if create_graph else 1)
    count, samples = positions.stop - first, x.shape[0]
    labels = y.expand(count, *y.shape).flatten(0, 1)
    place = points if layer is None else _only(outputs, len(points))
    output = (output_of or cross_entropies_of)(logits, labels)
    (gradient,) = input_gradients(output, (place,), create_graph=create_graph).undone()
    gradient = precise(gradient).unflatten(0, (count, samples))
    if layer is None:
        attribution = (precise(x) - precise(baseline)) * (gradient.sum(0) / steps)
    else:
        outputs_along = precise(place).unflatten(0, (count, samples))
        attribution = (gradient[1:] * outputs_along.diff(dim=0)).sum(0)
    return PathTerms(attribution if create_graph else attribution.detach(), logits[-samples:] if samples else logits)


def find_layer(model: Any, name: str | None) -> nn.Module | None:
    """The module of that name inside the model."""
    if name is None:
        return None
    if not isinstance(model, nn.Module):
        raise TypeError(f"layer is {name!r} and the model a {type(model).__name__}; a layer needs a torch.nn.Module")
    modules = {known: module for known, module in model.named_modules(remove_duplicate=False) if known}
    if name not in modules:
        nearest = difflib.get_close_matches(str(name), modules, n=1, cutoff=0.0)
        hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"layer is {name!r}; the model has no such module. {hint}See model.named_modules() for all")
    return modules[name]


def _baseline(baseline: Tensor | float, x: Tensor) -> Tensor:
    if not isinstance(baseline, Tensor):
        return torch.full_like(x, check_number("baseline", baseline))
    if not baseline.is_floating_point():
        raise TypeError(f"the baseline is {baseline.dtype}; it must be floating point, as x is")
    try:
        return baseline.to(x.dtype).expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"the baseline has shape {tuple(baseline.shape)}; it must be x's, {tuple(x.shape)}, or expand to it"
        ) from None


def _path(x: Tensor, baseline: Tensor, positions: range, steps: int) -> Tensor:
    """z_k of all samples for each k in turn, (len(positions) · N, ...). z_m is x to the last bit."""
    dtype = accumulation_dtype(x.dtype)
    share = torch.arange(positions.start, positions.stop, dtype=dtype, device=x.device) / steps
    points = torch.lerp(baseline.to(dtype), x.to(dtype), share.view(-1, *[1] * x.dim()))
    return points.to(x.dtype).flatten(0, 1)


def _pieces(steps: int, at_once: int) -> Iterator[range]:
    """1..steps in order, ``at_once`` in a piece and one at least."""
    for start in range(1, steps + 1, max(at_once, 1)):
        yield range(start, min(start + max(at_once, 1), steps + 1))


@contextmanager
def _outputs_of(layer: nn.Module | None) -> Iterator[list[Any]]:
    """What a layer returned, each time it ran inside."""
    outputs: list[Any] = []
    if layer is None:
        yield outputs
        return

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        outputs.append(output)
        # What follows may write to its input (an in-place ReLU), which would change the layer's output after the fact.
        return output.clone() if isinstance(output, Tensor) else output

    handle = layer.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def _only(outputs: list[Any], points: int) -> Tensor:
    if len(outputs) != 1:
        raise RuntimeError(
            f"the layer ran {len(outputs)} times in one forward; an attribution needs a module that runs once, such as "
            "the block that holds it"
        )
    (output,) = outputs
    if not isinstance(output, Tensor):
        raise TypeError(f"the layer returned a {type(output).__name__}; an attribution needs a module of one tensor")
    if output.shape[:1] != (points,):
        raise ValueError(
            f"the layer returned the shape {tuple(output.shape)} for {points} inputs; an attribution needs one row each"
        )
    if not output.requires_grad:
        raise RuntimeError("the layer's output does not depend differentiably on x; look for .detach() before it")
    return output


_OUTPUTS = {"cross_entropy": cross_entropies_of, "target_logit": target_logit}
