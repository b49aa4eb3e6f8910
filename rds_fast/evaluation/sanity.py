"""Whether the accuracy under attack can be believed, or only the gradients are hidden (Athalye et al. 2018).

An attack that finds nothing may mean a robust model, or gradients that lead nowhere: those of saturated, rounded,
shattered or random outputs. The latter betray themselves (Carlini et al. 2019). With A(ε) the accuracy
under L∞ PGD of radius ε,

    unmoved          at ε = 0 every sample is classified as it is without an attack;
    falling          A does not rise from one radius to a larger one, whose ball holds the smaller one's;
    reaching zero    A(1) = 0: that ball is all of [0, 1]^D, so x' may be an image of any class. (A(½) may keep the
                     share of one class: each ball of radius ½ holds the uniformly grey image, which has one class.)
    gradient-free    the Square attack, which sees no gradient, does not break more samples than PGD;
    more steps       PGD of more steps does not break fewer samples;
    gradients        the cross-entropy has an input gradient that is not zero throughout.

A difference between two attacks counts beyond two standard errors of it on the same samples
(``robust_accuracy.outlasts``); A(1), and the share without a gradient, may be up to 1%. A model that gives every input
the same class cannot be told from a masked one, and fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..attacks.pgd import detached
from ..reference import accumulation_dtype
from ..training import data
from .accuracy import classified_rightly
from .results import Curve, Results
from .robust_accuracy import outlasts, over_batches, robust_on_split
from .samples import drawn
from .settings import EvaluationSettings
from .square import square_attack

WHOLE_RANGE = 1.0  # the L∞ radius whose ball is [0, 1]^D from every x in it
TOLERANCE = 0.01
_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of linf_epsilon


class Check(NamedTuple):
    """One sign of masked gradients that was looked for.

    Attributes:
        name: as in the list above.
        passed: it was not found.
        found: what was, as a clause that follows "with".
    """

    name: str
    passed: bool
    found: str


class Observations(NamedTuple):
    """What the checks judge. Each tensor is (N,), bool, of the same samples.

    Attributes:
        natural: classified rightly without an attack.
        at_radius: radius -> robust to PGD; 0 among them.
        after_steps: steps -> robust to PGD of that many steps at the settings' radius, rising.
        square: robust to the Square attack at that radius.
        without_gradient: the cross-entropy's input gradient is zero throughout.
    """

    natural: Tensor
    at_radius: Mapping[float, Tensor]
    after_steps: Mapping[int, Tensor]
    square: Tensor
    without_gradient: Tensor


def checks(observed: Observations) -> list[Check]:
    """The judgement on each sign, in the order of the list above."""
    radii, steps = sorted(observed.at_radius), sorted(observed.after_steps)
    rises = [
        f"{_percent(observed.at_radius[low])} at ε = {low:g} and {_percent(observed.at_radius[high])} at {high:g}"
        for low, high in itertools.pairwise(radii)
        if outlasts(observed.at_radius[high], observed.at_radius[low])
    ]
    most = observed.after_steps[steps[-1]]
    weaker = [
        f"{_percent(observed.after_steps[few])} after {few} steps and {_percent(most)} after {steps[-1]}"
        for few in steps[:-1]
        if outlasts(most, observed.after_steps[few])
    ]
    last = observed.at_radius[WHOLE_RANGE]
    changed = int((observed.natural != observed.at_radius[0.0]).sum())
    blind = observed.without_gradient[observed.natural]
    return [
        Check("unmoved", changed == 0, f"{changed} samples classified otherwise at ε = 0"),
        Check("falling", not rises, f"accuracy {'; '.join(rises) or 'that falls throughout'}"),
        Check("reaching zero", _share(last) <= TOLERANCE, f"accuracy {_percent(last)} at ε = {WHOLE_RANGE:g}"),
        Check(
            "gradient-free",
            not outlasts(most, observed.square),
            f"accuracy {_percent(observed.square)} under the Square attack and {_percent(most)} under PGD",
        ),
        Check("more steps", not weaker, f"accuracy {'; '.join(weaker) or 'that more steps do not raise'}"),
        Check("gradients", _share(blind) <= TOLERANCE, f"no gradient at all at {_percent(blind)} of the samples"),
    ]


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``masked``: 1 if any of the checks above fails on ``strong_limit`` samples, else 0; a note on each that does.

    Also ``square_accuracy``, under the Square attack at the L∞ radius of the settings; the curves of accuracy against
    the radius and against the steps; and the checks as a table. ``masked`` is None where no sample is classified
    rightly, so that there is nothing to attack.
    """
    observed = observe(model, drawn(split, settings.strong_limit, settings.seed), settings)
    if not bool(observed.natural.any()):
        return Results({"masked": None}, notes=("No sample is classified rightly: there is nothing to attack.",))
    judged = checks(observed)
    failed = [check for check in judged if not check.passed]
    scalars: dict[str, float | None] = {"masked": float(bool(failed)), "square_accuracy": _share(observed.square)}
    curves = {
        "sanity_radius": _curve("L∞ radius ε", observed.at_radius),
        "sanity_steps": _curve(f"steps of PGD at ε = {settings.linf_epsilon:g}", observed.after_steps),
    }
    rows = [{"check": check.name, "passed": "yes" if check.passed else "no", "found": check.found} for check in judged]
    notes = tuple(f"Gradients may be masked: the check “{check.name}” fails, with {check.found}." for check in failed)
    return Results(scalars, curves, {"sanity": rows}, notes)


def observe(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Observations:
    """Every attack that the checks need. Radii other than the settings' take the default step size."""
    epsilon = settings.linf_epsilon
    radii = sorted({0.0, 0.5, WHOLE_RANGE, *(multiple * epsilon for multiple in _MULTIPLES)})

    def under_pgd(radius: float, steps: int, step_size: float | None) -> Tensor:
        return robust_on_split(model, split, settings, radius, steps=steps, step_size=step_size)

    few = sorted({1, max(1, settings.steps // 4)} - {settings.steps})
    after_steps = {steps: under_pgd(epsilon, steps, None) for steps in few}
    after_steps[settings.steps] = under_pgd(epsilon, settings.steps, settings.linf_step_size)
    at_radius = {
        radius: after_steps[settings.steps] if radius == epsilon else under_pgd(radius, settings.steps, None)
        for radius in radii
    }
    generator = torch.Generator(split.labels.device).manual_seed(settings.seed)
    return Observations(
        natural=over_batches(split, settings, lambda x, y: classified_rightly(model, x, y)),
        at_radius=at_radius,
        after_steps=after_steps,
        square=over_batches(
            split,
            settings,
            lambda x, y: robust_to_square(model, x, y, epsilon, settings.square_queries, generator),
        ),
        without_gradient=over_batches(split, settings, lambda x, y: lacks_gradient(model, x, y)),
    )


def robust_to_square(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, queries: int, generator: torch.Generator | None = None
) -> Tensor:
    """(N,), bool: classified rightly as it is and after the Square attack, which sees no others."""
    robust = classified_rightly(model, x, y)
    left = robust.nonzero()[:, 0]
    if len(left):
        moved = square_attack(model, x[left], y[left], epsilon, queries=queries, generator=generator)
        robust[left] = classified_rightly(model, moved, y[left])
    return robust


def lacks_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N,), bool: the input gradient of the sample's cross-entropy is zero in every value."""
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.detach().clone().requires_grad_(), y.clone()  # inference tensors allow no autograd
        logits = detached(model)(x)
        loss = cross_entropy(logits.to(accumulation_dtype(logits.dtype)), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
    return (gradient == 0).flatten(1).all(1)


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _percent(right: Tensor) -> str:
    return f"{100 * _share(right):.1f}%"


def _curve(label: str, robust: Mapping[float, Tensor] | Mapping[int, Tensor]) -> Curve:
    points = sorted((float(along), _share(right)) for along, right in robust.items())
    return Curve(label, "accuracy", tuple(along for along, _ in points), tuple(share for _, share in points))
