"""The rule by which a sweep chooses: as many candidates for each variant as it has, one rule for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """One point of the grid for one variant, its figures being means over the seeds.

    Attributes:
        settings: the values of the grid's axes.
        accuracy: in [0, 1].
        measure: what is to be as large as possible.
    """

    settings: Mapping[str, Any]
    accuracy: float
    measure: float


class Choice(NamedTuple):
    """The candidate chosen for a variant.

    Attributes:
        settings: its values of the grid's axes.
        within_margin: it is at most the margin less accurate than the baseline; else no candidate is.
        at_edge: its weight is the smallest or the largest of the candidates, so a better one may lie beyond.
    """

    settings: Mapping[str, Any]
    within_margin: bool
    at_edge: bool


def rule(measure: str, margin: float, baseline: str) -> str:
    """The rule in words."""
    return (
        f"highest {measure} among the candidates whose accuracy is at most {100 * margin:g} points below that of "
        f"{baseline} (if there is none: the candidate of the highest accuracy); means over the seeds, on the "
        "validation split"
    )


def choose(candidates: Sequence[Candidate], baseline_accuracy: float, margin: float) -> Choice:
    """Apply the rule to the candidates of one variant.

    Equal figures are resolved for the more accurate candidate, then for the one that comes first.

    Raises:
        ValueError: there are no candidates.
    """
    if not candidates:
        raise ValueError("there are no candidates to choose from")
    # Accuracies are ratios of whole numbers; without the slack 0.91 would not be within 0.02 of 0.93.
    eligible = [c for c in candidates if c.accuracy >= baseline_accuracy - margin - 1e-9]
    if eligible:
        best = min(eligible, key=lambda c: (-c.measure, -c.accuracy))
    else:
        best = min(candidates, key=lambda c: (-c.accuracy, -c.measure))
    weights = [c.settings["weight"] for c in candidates if "weight" in c.settings]
    at_edge = best.settings.get("weight") in (min(weights), max(weights)) if weights else False
    return Choice(best.settings, bool(eligible), at_edge)
