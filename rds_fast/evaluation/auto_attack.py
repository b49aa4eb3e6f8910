"""AutoAttack (Croce & Hein 2020): four attacks without free parameters, each on what the ones before it left.

The attacks are those of the package pyautoattack, with the settings of its "standard" version. It is called attack by
attack, and every result is judged here, because the package's own bookkeeping

- counts a perturbation of NaN as a success, after which no other attack tries the sample;
- lets rounding leave the ball by about 1e-7;
- needs four classes for the targeted loss, and as many target classes as it is told, or fails;
- seeds PyTorch's global generators, adds to the gradients of the model's parameters, writes into the logits that a
  model returns, and ends the tracing of a debugger.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attacks.ball import NORMS, displace, largest_not_above, project
from ..attacks.pgd import check_attack, detached
from ..training import data
from ..training.extras import require
from .accuracy import classified_rightly
from .results import Results
from .robust_accuracy import outlasts, over_batches, robust_to_the_settings_pgd
from .samples import drawn
from .settings import EvaluationSettings

PACKAGE = "pyautoattack"
_BOUNDS = (0.0, 1.0)  # the package knows no others
_TARGETS = 9  # classes that the targeted attacks aim at, at most: the most likely wrong ones
_NAMES = {"linf": "Linf", "l2": "L2"}
_SPOKEN = {"linf": "L∞", "l2": "L2"}

# What the package would say of vanishing gradients is the business of the metric sanity.
_LOGGER = logging.getLogger("rds_fast.evaluation.autoattack")
_LOGGER.addHandler(logging.NullHandler())
_LOGGER.propagate = False

Perturb = Callable[[Tensor, Tensor], Tensor]


class AutoAttackOutcome(NamedTuple):
    """What AutoAttack left.

    Attributes:
        moved: (N, C, H, W): the adversarial input that was found; where none was, x.
        robust: "natural", then each attack in its turn -> (N,), bool: classified rightly so far. The last counts.
        notes: which attacks were left out or exchanged, and why.
    """

    moved: Tensor
    robust: dict[str, Tensor]
    notes: tuple[str, ...]


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    norm: str = "linf",
    steps: int = 100,
    queries: int = 5000,
    seed: int = 0,
) -> AutoAttackOutcome:
    """The samples that withstand AutoAttack in the L∞ or L2 ball within [0, 1].

    In turn, each on the samples that are still classified rightly: APGD of the cross-entropy; APGD of the targeted
    difference-of-logits ratio and FAB, both towards each of the 9 likeliest wrong classes; and the Square attack.

    Args:
        model: maps (N, C, H, W) to logits (N, K), K at least 2, in eval mode; its parameters, their gradients, its
            buffers and the global random state are left as they were.
        x: samples (N, C, H, W), float32 or float64 (the attacks compute in float32), in [0, 1].
        y: class indices (N,).
        epsilon: radius of the ball; 0 attacks nothing.
        norm: ``"linf"`` or ``"l2"``.
        steps: iterations of APGD and FAB, each time they run.
        queries: forwards of the Square attack.
        seed: of all random draws.

    Raises:
        TypeError: x is neither float32 nor float64.
        ValueError: x, the logits or a setting are not as described.
        RuntimeError: a perturbation of the package leaves the ball or the range by more than rounding.
        ImportError: pyautoattack is not installed.
    """
    check_attack(epsilon, norm, steps, None, _BOUNDS)
    with torch.inference_mode(False), torch.no_grad():
        x, y = x.detach().clone(), y.long().clone()  # clones, because inference tensors allow no autograd
        attacks, notes = _attacks(model, x, _check(model, x, y), epsilon, norm, steps, queries, seed)
        moved, robust = x.clone(), classified_rightly(model, x, y)
        outcome = {"natural": robust.clone()}
        for name, perturb in attacks.items():
            left = robust.nonzero()[:, 0]
            if len(left) and epsilon > 0:
                with _undisturbed(seed):
                    found = perturb(x[left].float().contiguous(), y[left])
                found = _inside(found.detach().to(x.dtype), x[left], epsilon, norm, name)
                fooled = ~classified_rightly(model, found, y[left])
                moved[left[fooled]] = found[fooled]
                robust[left[fooled]] = False
            outcome[name] = robust.clone()
    return AutoAttackOutcome(moved, outcome, notes)


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``autoattack_linf_accuracy`` and ``autoattack_l2_accuracy`` on ``strong_limit`` samples.

    A table for each norm has the accuracy after each attack, and that under PGD as the settings have it, on the same
    samples. Where one of the two breaks significantly more than the other, a note says so.
    """
    results, notes = Results(), dict[str, None]()
    few = drawn(split, settings.strong_limit, settings.seed)
    for norm in NORMS:
        ball = f"the {_SPOKEN[norm]} ball"
        robust, remarks = _on_split(model, few, settings, norm)
        notes.update(dict.fromkeys(remarks))
        pgd = robust_to_the_settings_pgd(model, few, settings, norm)
        *_, last = robust.values()
        if outlasts(last, pgd):
            notes[f"PGD in {ball} breaks more samples than AutoAttack, which therefore fails here."] = None
        if outlasts(pgd, last):
            notes[f"PGD in {ball} breaks fewer samples than AutoAttack: its accuracy says too much."] = None
        results.scalars[f"autoattack_{norm}_accuracy"] = float(last.double().mean())
        results.tables[f"autoattack_{norm}"] = [
            {"after": name, "accuracy": float(right.double().mean())} for name, right in {**robust, "pgd": pgd}.items()
        ]
    return Results(results.scalars, {}, results.tables, tuple(notes))


def _on_split(
    model: nn.Module, split: data.Split, settings: EvaluationSettings, norm: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The columns of ``AutoAttackOutcome.robust`` over all batches, and the notes."""
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    epsilon = {"linf": settings.linf_epsilon, "l2": settings.l2_epsilon}[norm]

    def outcome(x: Tensor, y: Tensor) -> Tensor:
        nonlocal notes, names
        found = autoattack(
            model,
            x,
            y,
            epsilon,
            norm=norm,
            steps=settings.strong_steps,
            queries=settings.square_queries,
            seed=settings.seed,
        )
        notes, names = found.notes, tuple(found.robust)
        return torch.stack(tuple(found.robust.values()), 1)

    columns = over_batches(split, settings, outcome)
    return dict(zip(names, columns.unbind(1), strict=True)), notes


def _check(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """The number of classes."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x is {x.dtype}; autoattack needs float32 or float64: pass x.float()")
    if x.dim() != 4 or y.shape != x.shape[:1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; autoattack needs images (N, C, H, W) and labels (N,)"
        )
    if not bool(((x >= _BOUNDS[0]) & (x <= _BOUNDS[1])).all()):
        raise ValueError("x leaves [0, 1], or holds NaN; autoattack needs images in [0, 1], normalised in the model")
    logits = model(x[:1])
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"the logits have shape {tuple(logits.shape)}; autoattack needs (N, K), K at least 2 classes")
    return logits.shape[1]


def _attacks(
    model: nn.Module, x: Tensor, classes: int, epsilon: float, norm: str, steps: int, queries: int, seed: int
) -> tuple[dict[str, Perturb], tuple[str, ...]]:
    """The attacks that this number of classes and shape of images allow, in the order of the standard version."""
    apgd = _module("autopgd_base")
    common: dict[str, Any] = {"norm": _NAMES[norm], "eps": epsilon, "seed": seed, "device": x.device, "n_restarts": 1}
    gradient = {**common, "n_iter": steps}
    forward, targets = _float32(model, x.dtype), min(_TARGETS, classes - 1)
    fab = _module("fab_pt").FABAttack_PT(forward, targeted=True, n_target_classes=targets, **gradient)
    attacks = {"apgd-ce": apgd.APGDAttack(forward, loss="ce", logger=_LOGGER, **gradient).perturb}
    notes = []
    if classes >= 4:
        targeted = apgd.APGDAttack_targeted(forward, n_target_classes=targets, logger=_LOGGER, **gradient)
        attacks["apgd-t"] = targeted.perturb
    elif classes == 3:
        attacks["apgd-dlr"] = apgd.APGDAttack(forward, loss="dlr", logger=_LOGGER, **gradient).perturb
        notes.append("AutoAttack's targeted loss needs 4 classes; for 3 the untargeted one was taken.")
    else:
        notes.append("AutoAttack's loss of logit ratios needs 3 classes; for 2 it was left out.")
    attacks["fab-t"] = fab.perturb
    if _square_fits(x.shape[2], x.shape[3], norm):
        square = _module("square").SquareAttack(forward, p_init=0.8, n_queries=queries, resc_schedule=False, **common)
        attacks["square"] = square.perturb
    else:
        notes.append(f"AutoAttack's L2 Square attack cannot tile {x.shape[2]}×{x.shape[3]} pixels; it was left out.")
    return attacks, tuple(notes)


def _module(name: str) -> ModuleType:
    return require(f"{PACKAGE}.{name}", "AutoAttack")


def _square_fits(height: int, width: int, norm: str) -> bool:
    """Whether the package's first tiles, whose side is a fifth of the height, stay inside the image in L2."""
    if norm == "linf":
        return True
    side = height // 5
    if side < 2:
        return side == 1
    first = (height - 5 * side) // 2
    return all(first + size // side * side <= size for size in (height, width))


def _float32(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The model as the package takes one: float32 in, logits of its own in float32 out, no graph of the weights."""
    forward = detached(model)
    return lambda x: forward(x.to(dtype)).to(torch.float32, copy=True)


@contextlib.contextmanager
def _undisturbed(seed: int) -> Iterator[None]:
    """The package seeds the generators of every device; afterwards they are as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _inside(found: Tensor, x: Tensor, epsilon: float, norm: str, attack: str) -> Tensor:
    """What the package found, to the last bit in the ball and the range; x in the place of what is not finite."""
    delta = (found - x).double().flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    finite = found.flatten(1).isfinite().all(1)
    # Half a unit in the last place of float32 a value near 1, and the rounding of the package's own norms.
    slack = 2.0**-22 * (1.0 if norm == "linf" else math.sqrt(delta.shape[1])) + 2.0**-18 * epsilon
    outside = finite & ((size > epsilon + slack) | (found.flatten(1) < 0).any(1) | (found.flatten(1) > 1).any(1))
    if bool(outside.any()):
        raise RuntimeError(
            f"{attack} of pyautoattack left the {norm} ball of {epsilon:g} or the range [0, 1] on "
            f"{int(outside.sum())} of {len(x)} samples (largest perturbation {float(size[finite].max()):g}); its "
            "results cannot be used. Install the version of the package that rds_fast's tests run with, 0.2.0"
        )
    radius = largest_not_above(epsilon, x.dtype)
    pulled = displace(x, project(found - x, radius, norm), _BOUNDS)
    # What is inside already stays as it is: FAB's results lie so close to the boundary that one bit counts.
    exact = _within(found, x, radius, norm)[:, None, None, None]
    kept = torch.where(exact, found, pulled)
    return torch.where(finite[:, None, None, None], kept, x)


def _within(found: Tensor, x: Tensor, radius: float, norm: str) -> Tensor:
    """(N,), bool: in the ball by the difference in x's dtype and by that in float64."""
    inside = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for delta in (found - x, found.double() - x.double()):
        flat = delta.flatten(1)
        inside &= (flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)) <= radius
    return inside
