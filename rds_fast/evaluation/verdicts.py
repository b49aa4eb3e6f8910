"""Sentences about a table of figures, computed from it: whoever wins is named."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from .results import Evaluation

Models = Sequence[Evaluation]  # of one kind, one a seed

_ACCURACIES = {"accuracy": "accuracy", "linf_accuracy": "accuracy under L∞ PGD"}


def verdicts(kinds: Mapping[str, Models], baseline: str, duel: tuple[str, str] | None = None) -> list[str]:
    """What the figures of a baseline and of other kinds of models say.

    A difference of accuracies counts as one only beyond two standard errors (see ``difference``).

    Args:
        kinds: title -> the evaluations of its models; the baseline among them.
        baseline: the title of what the others are set against.
        duel: the titles of two kinds to be set against each other besides: ours, and a published rival.
    """
    others = {title: models for title, models in kinds.items() if title != baseline}
    sentences = [_against_baseline(title, models, baseline, kinds[baseline]) for title, models in others.items()]
    if others and all(_mean(models, "linf_accuracy") is not None for models in kinds.values()):
        sentences.append(_ranking(kinds))
        if duel is not None and set(duel) <= set(kinds):
            sentences.append(_duel(*duel, kinds))
    return [sentence for sentence in sentences if sentence]


def difference(one: Models, other: Models, figure: str = "linf_accuracy") -> tuple[float, float]:
    """(mean of one − mean of the other, two standard errors of it) for an accuracy, both in percentage points.

    Two sources of error are added: the seeds, where there are several, and the finite number of test samples. The
    latter is taken as if the two had been tested on different samples, which overstates it.
    """
    means, variance = [], 0.0
    for models in (one, other):
        values = _values(models, figure)
        mean = statistics.fmean(values)
        means.append(mean)
        variance += mean * (1 - mean) / models[0].samples + _variance_of_mean(values)
    return 100 * (means[0] - means[1]), 200 * math.sqrt(variance)


def _values(models: Models, figure: str) -> list[float]:
    values = [evaluation.scalars.get(figure) for evaluation in models]
    return [value for value in values if value is not None]


def _mean(models: Models, figure: str) -> float | None:
    values = _values(models, figure)
    return statistics.fmean(values) if len(values) == len(models) else None


def _variance_of_mean(values: Sequence[float]) -> float:
    """What the seeds say of it: nothing, where there is one."""
    return statistics.variance(values) / len(values) if len(values) > 1 else 0.0


def _against_baseline(title: str, models: Models, baseline_title: str, baseline: Models) -> str:
    """Empty where the two have no figure in common."""
    parts = [
        f"{words} {_change(models, baseline, figure)}"
        for figure, words in _ACCURACIES.items()
        if _mean(models, figure) is not None and _mean(baseline, figure) is not None
    ]
    before, after = _mean(baseline, "share"), _mean(models, "share")
    if before is not None and after is not None:
        parts.append(f"null share {before:.2f} → {after:.2f}")
    return f"{title}, against {baseline_title}: {', '.join(parts)}." if parts else ""


def _change(one: Models, other: Models, figure: str) -> str:
    points, error = difference(one, other, figure)
    remark = ", within the error" if abs(points) <= error else ""
    return f"{_signed(points)} points (±{error:.1f}{remark})"


def _ranking(kinds: Mapping[str, Models]) -> str:
    means = {title: statistics.fmean(_values(models, "linf_accuracy")) for title, models in kinds.items()}
    first, second = sorted(kinds, key=lambda title: -means[title])[:2]
    points, error = difference(kinds[first], kinds[second])
    beyond = "beyond" if points > error else "within"
    return (
        f"Most accurate under L∞ PGD: {first} ({100 * means[first]:.1f}%), then {second} "
        f"({100 * means[second]:.1f}%); the difference of {points:.1f} points is {beyond} the error of ±{error:.1f}."
    )


def _duel(ours: str, rival: str, kinds: Mapping[str, Models]) -> str:
    points, error = difference(kinds[ours], kinds[rival])
    if abs(points) <= error:
        outcome = "neither wins under L∞ PGD"
    else:
        outcome = f"{ours if points > 0 else rival} wins under L∞ PGD"
    return (
        f"{ours} against {rival}, the published baseline: {outcome} "
        f"({_signed(points)} ± {error:.1f} points){_duel_of_shares(kinds[ours], kinds[rival])}."
    )


def _duel_of_shares(ours: Models, rival: Models) -> str:
    """Of the shares only the seeds' error is known: with one seed the figures stand as they are."""
    one, other = _mean(ours, "share"), _mean(rival, "share")
    if one is None or other is None:
        return ""
    variance = _variance_of_mean(_values(ours, "share")) + _variance_of_mean(_values(rival, "share"))
    error = max(2 * math.sqrt(variance), 0.005)  # what two decimals do not show is no difference
    amount = "about as much" if abs(one - other) <= error else "less" if one < other else "more"
    return f"; the former leaves {amount} of its attribution on the null block ({one:.2f}, the latter {other:.2f})"


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")
