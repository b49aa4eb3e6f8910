"""An attack on integrated gradients: the same prediction for other reasons, within an L∞ ball."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..attacks.ball import ascent_direction, displace, largest_not_above, project, uniform_point
from ..attacks.pgd import check_attack, check_floating, detached
from ..compilation import compiled_part
from ..ops.inputs import check_count, check_number
from ..penalties.integrated_gradients import PathTerms, integrated_gradients, path_terms
from ..penalties.losses import target_logit
from ..reference import accumulation_dtype
from ..training.names import check_name
from .attributions import pixel_scores
from .rank_correlation import kendall_tau, top_k_intersection, top_k_mask

KEEP = ("top_k", "kendall")


def attribution_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    k: int = 100,
    steps: int = 100,
    step_size: float = 0.01,
    restarts: int = 3,
    path_steps: int = 100,
    attack_path_steps: int = 10,
    keep: str = "top_k",
    softplus: float | None = 20.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Inputs near x of the same predicted class, whose attributions differ most from those of x.

    The top-k attack of Ghorbani, Abid and Zou (2019), as Chen et al. (2019) evaluate with it. Let IG be the
    integrated gradients of f_y, the logit of class y, from a black image, s its pixel scores (|IG| summed over
    channels) and T the k highest-scored pixels of x at ``path_steps`` points. Each step is

        δ ← clip(δ − a sign ∇ Σ_{i ∈ T} sᵢ(x + δ) / Σᵢ sᵢ(x + δ), −ε, ε),

    then x + δ is clipped to the bounds. The gradient is that of the network with every ReLU replaced by a softplus
    log(1 + exp(βz)) / β, as in both papers: a ReLU network's logit has no curvature to descend on. All else is of the
    network itself. The first of the restarts begins at x and the others at uniform random points of the ball (those of
    Chen et al. all begin at x).

    What is returned is the iterate, over all restarts, that ``keep`` finds least like x among those whose predicted
    class is that of x; x itself where there is none. Both the steps and the choice integrate over
    ``attack_path_steps`` points.

    Args:
        model: maps (N, ...) to logits (N, C), attacked in the mode it is in; left as it was in every respect. ReLUs
            inside fused modules (``rds_fast.nn.fuse``) are not replaced: attack the model that was not fused.
        x: samples (N, C, ...) or (N, D), floating, within the bounds.
        y: class indices (N,), the classes whose logits are attributed.
        epsilon: L∞ radius, in the units of x.
        k: pixels of T, at most as many as there are.
        steps, step_size, restarts: of the attack.
        path_steps, attack_path_steps: points of the integral that gives T, and of those inside the attack. N times as
            many are one batch.
        keep: ``"top_k"``, the least top-k intersection of the scores, or ``"kendall"``, their least Kendall's τ, as in
            the code of Chen et al.
        softplus: β. Both papers have 1, a smoother network than most are: 20 found more wherever it was tried. None
            takes the gradient of the network as it is.
        bounds: smallest and largest value of an input.
        generator: the source of the random starts, on x's device; default: PyTorch's own.

    Returns:
        x' of x's shape and dtype, without a graph. ``(x' - x).abs() <= epsilon`` and the bounds hold element by
        element, without any tolerance; ``model(x').argmax(1)`` is ``model(x).argmax(1)``.

    Raises:
        TypeError: x is not floating, y not int64, or a number is none.
        ValueError: a setting is out of range, shapes do not fit, or x leaves the bounds.
        IndexError: on CPU, a class index is out of range; on CUDA a device assertion fails, as in PyTorch.
        RuntimeError: the model is compiled or scripted, or the logits do not depend on x differentiably.
        FloatingPointError: a gradient is not finite.
    """
    found, compiler = compiled_part(model)
    if compiler is not None:
        raise RuntimeError(
            f"the model {found} ({compiler}), and the attack needs its second derivatives and replaces its ReLUs; "
            "attack the Python module that it was made from"
        )
    check_attack(epsilon, "linf", steps, step_size, bounds)
    counts = {"restarts": restarts, "path_steps": path_steps, "attack_path_steps": attack_path_steps}
    for name, count in counts.items():
        check_count(name, count)
    check_name("keep", keep, KEEP)
    if softplus is not None and not 0 < check_number("softplus", softplus) < math.inf:
        raise ValueError(f"softplus is {softplus}; it must be positive, or None for the network's own gradient")
    _check_samples(x, y, bounds)
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.detach().clone(), y.detach().clone()
        if epsilon == 0 or x.numel() == 0:
            return x
        attack = _Attack(detached(model), x, y, k, path_steps, attack_path_steps, keep, softplus)
        radius = largest_not_above(epsilon, x.dtype)
        origin = x.to(accumulation_dtype(x.dtype))
        for restart in range(restarts):
            delta = uniform_point(origin, radius, "linf", generator) if restart else torch.zeros_like(origin)
            for _ in range(steps):
                moved = displace(x, delta, bounds)
                direction = ascent_direction(attack.gradient(moved).to(origin.dtype), "linf")
                delta = project(moved.to(origin.dtype) - origin - step_size * direction, radius, "linf")
                attack.offer(displace(x, delta, bounds))
            if not bool(delta.isfinite().all()):
                raise FloatingPointError(
                    "the attribution attack met a gradient that is not finite. Check model(x) on these samples, and "
                    "the model's weights"
                )
        return attack.best()


class _Attack:
    """What is known of x, and the best x' so far."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        k: int,
        path_steps: int,
        attack_path_steps: int,
        keep: str,
        softplus: float | None,
    ) -> None:
        self.model, self.x, self.y = model, x, y
        self.smooth = model if softplus is None else functools.partial(_with_softplus, model, softplus)
        self.steps = attack_path_steps
        self.predicted = self._predict(x)
        scores = pixel_scores(integrated_gradients(model, x, y, 0.0, steps=path_steps, of="target_logit"))
        self.top = top_k_mask(scores, k)
        self.likeness = functools.partial(top_k_intersection, scores, k=k)
        if keep == "kendall":
            self.likeness = functools.partial(kendall_tau, scores)
        self.moved = x
        self.least = torch.ones(len(x), dtype=torch.float64, device=x.device)  # x itself: nothing is more alike

    @torch.no_grad()
    def _predict(self, x: Tensor) -> Tensor:
        return self.model(x).argmax(1)

    def gradient(self, moved: Tensor) -> Tensor:
        """∇ of the share of the attribution that is on T."""
        moved = moved.detach().requires_grad_()
        scores = pixel_scores(self._path(self.smooth, moved, create_graph=True).attribution)
        total = scores.sum(1)
        share = (scores * self.top).sum(1) / torch.where(total == 0, 1.0, total)
        return torch.autograd.grad(share.sum(), moved)[0]

    def offer(self, moved: Tensor) -> None:
        """Keep the samples of ``moved`` that are less like x than what was kept, and predicted alike."""
        attribution, logits = self._path(self.model, moved, create_graph=False)
        likeness = self.likeness(pixel_scores(attribution))
        better = (likeness < self.least) & (logits.argmax(1) == self.predicted)
        self.least = torch.where(better, likeness, self.least)
        self.moved = torch.where(better.view(-1, *[1] * (moved.dim() - 1)), moved, self.moved)

    def _path(self, model: Callable[[Tensor], Tensor], moved: Tensor, *, create_graph: bool) -> PathTerms:
        black = torch.zeros_like(moved)
        return path_terms(model, moved, self.y, black, self.steps, create_graph=create_graph, output_of=target_logit)

    def best(self) -> Tensor:
        # Predicted once more, in a batch as large as x: in another one, sums that round otherwise could tip the scale.
        same = self._predict(self.moved) == self.predicted
        return torch.where(same.view(-1, *[1] * (self.x.dim() - 1)), self.moved, self.x)


def _with_softplus(model: Callable[[Tensor], Tensor], beta: float, x: Tensor) -> Tensor:
    """The logits of the model with softplus in place of ReLU."""
    with _SoftplusForReLU(beta):
        return model(x)


class _SoftplusForReLU(TorchFunctionMode):
    """ReLUs inside, as modules, functions or methods, are log(1 + exp(βz)) / β."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _RELUS:
            return func(*args, **kwargs)
        return self._softplus(func, *args, **kwargs)

    def _softplus(self, func: Callable[..., Any], input: Tensor, inplace: bool = False) -> Tensor:
        if inplace or func in _IN_PLACE:
            return input.copy_(F.softplus(input.clone(), self.beta))
        return F.softplus(input, self.beta)


_IN_PLACE = frozenset((torch.relu_, Tensor.relu_))
_RELUS = frozenset((F.relu, torch.relu, Tensor.relu, *_IN_PLACE))


def _check_samples(x: Tensor, y: Tensor, bounds: tuple[float, float]) -> None:
    check_floating(x)
    if x.dim() < 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; they must be (N, ...) and (N,)")
    low, high = bounds
    if not bool(((x >= low) & (x <= high)).all()):
        raise ValueError(f"x leaves the bounds ({low}, {high}), or holds NaN; scale x into them, or pass your own")
