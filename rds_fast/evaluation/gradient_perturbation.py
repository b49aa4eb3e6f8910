"""Input-gradient and density perturbation: what becomes of a prediction along ±∇ₓ f_y and ±∇ₓ log p."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.logsumexp import logsumexp
from ..training import data
from .pixel_perturbation import area
from .results import Curve, Results
from .samples import batches_of, drawn
from .settings import EvaluationSettings

# Distances along each direction, as shares of l2_epsilon: ten equal steps each way.
_SHARES = tuple(step / 10 for step in range(-10, 11))


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """Accuracy, and the change of what is followed, as each sample moves along a gradient of its own.

    For F = f_y, the true class's logit (``input_perturbation_…``), and F = log p, the log-sum-exp of all logits
    (``density_perturbation_…``), the samples are

        x(t) = clip(x + t ∇F(x) / ‖∇F(x)‖₂, 0, 1),    t from −l2_epsilon to l2_epsilon,

    straight lines: the gradient is that at x throughout. A sample whose gradient is zero stays where it is. Curves:
    ``…_accuracy``, and ``…_change``, the mean of F(x(t)) − F(x). Scalars: ``…_down_auc`` and ``…_up_auc``, the areas
    under the accuracy for t ≤ 0 and t ≥ 0 by the trapezoid rule (l2_epsilon at most). On one draw of
    ``attribution_limit`` samples, the same for every model.

    The names are those of the experiments of Yang et al. (2024); the definition is ours, since theirs was not found.
    """
    sample = drawn(split, settings.attribution_limit, settings.seed)
    distances = [share * settings.l2_epsilon for share in _SHARES]
    results = Results()
    for name, function in (("input", target_logit), ("density", log_density)):
        rows = [_follow(model, batch, function, distances) for batch in batches_of(sample, settings.batch_size)]
        right, change = (torch.cat(part).mean(0).tolist() for part in zip(*rows, strict=True))
        _describe(results, f"{name}_perturbation", distances, right, change)
    return results


def target_logit(logits: Tensor, y: Tensor) -> Tensor:
    """f_y (N,)."""
    return logits.gather(1, y[:, None])[:, 0]


def log_density(logits: Tensor, y: Tensor) -> Tensor:
    """log p (N,) up to a constant."""
    return logsumexp(logits, 1)


def _follow(
    model: nn.Module, batch: data.Images, function: Callable[[Tensor, Tensor], Tensor], distances: list[float]
) -> tuple[Tensor, Tensor]:
    """Right or not, and the change of the function, (N, distances) each."""
    with torch.inference_mode(False):  # labels too are kept for the backward, and inference tensors cannot be
        x, y = data.in_unit_interval(batch.images), batch.labels.clone()
    direction = unit_gradient(lambda moved: function(model(moved), y), x)
    right, change = [], []
    with torch.no_grad():
        before = function(model(x), y).double()
        for distance in distances:
            logits = model((x + distance * direction).clamp(0, 1))
            right.append((logits.argmax(1) == y).double())
            change.append(function(logits, y).double() - before)
    return torch.stack(right, 1), torch.stack(change, 1)


def unit_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇F / ‖∇F‖₂ of each sample (N, ...); zero where the gradient is zero.

    Args:
        function: x (N, ...) to F (N,).
        x: floating.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()  # a clone, because inference tensors allow no autograd
        (gradient,) = torch.autograd.grad(function(x).sum(), x)
    flat = gradient.flatten(1)
    for norm in (torch.inf, 2):  # by the largest magnitude first, so that no square underflows
        length = torch.linalg.vector_norm(flat, norm, dim=1, keepdim=True)
        flat = flat / torch.where(length == 0, 1.0, length)
    return flat.view(x.shape)


def _describe(results: Results, name: str, distances: list[float], accuracy: list[float], change: list[float]) -> None:
    followed = {"input_perturbation": "the true class's logit", "density_perturbation": "log p"}[name]
    label = f"L2 distance along the gradient of {followed}"
    results.curves[f"{name}_accuracy"] = Curve(label, "accuracy", tuple(distances), tuple(accuracy))
    results.curves[f"{name}_change"] = Curve(label, f"change of {followed}", tuple(distances), tuple(change))
    middle = len(distances) // 2
    for side, part in (("down", slice(middle + 1)), ("up", slice(middle, None))):
        curve = Curve(label, "accuracy", tuple(distances[part]), tuple(accuracy[part]))
        results.scalars[f"{name}_{side}_auc"] = area(curve)
