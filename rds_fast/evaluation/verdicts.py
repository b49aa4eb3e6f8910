"""Sentences about a table of figures, computed from it: whoever wins is named."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from .evaluate import Figures
from .sweep import BASELINE, OBJECTIVES

_RIVAL = "target-logit"
_OURS = "density"

Models = Sequence[Figures]  # of one objective, one a seed


def verdicts(rows: Mapping[str, Models]) -> list[str]:
    """What the figures of cross-entropy and some penalties say.

    A difference of accuracies counts as one only beyond two standard errors (see ``difference``).

    Args:
        rows: the models' figures by the names of ``OBJECTIVES``; cross-entropy among them.
    """
    penalised = {name: models for name, models in rows.items() if name != BASELINE}
    sentences = [_against_baseline(name, models, rows[BASELINE]) for name, models in penalised.items()]
    if penalised:
        sentences.append(_ranking(rows))
    if _RIVAL in penalised and _OURS in penalised:
        sentences.append(_duel(penalised[_OURS], penalised[_RIVAL]))
    return sentences


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
    return [getattr(figures, figure) for figures in models if getattr(figures, figure) is not None]


def _mean(models: Models, figure: str) -> float | None:
    values = _values(models, figure)
    return statistics.fmean(values) if values else None


def _variance_of_mean(values: Sequence[float]) -> float:
    """What the seeds say of it: nothing, where there is one."""
    return statistics.variance(values) / len(values) if len(values) > 1 else 0.0


def _against_baseline(name: str, models: Models, baseline: Models) -> str:
    parts = [
        f"accuracy {_change(models, baseline, 'accuracy')}",
        f"accuracy under L∞ PGD {_change(models, baseline, 'linf_accuracy')}",
    ]
    before, after = _mean(baseline, "share"), _mean(models, "share")
    if before is not None and after is not None:
        parts.append(f"null share {before:.2f} → {after:.2f}")
    return f"{OBJECTIVES[name].title}, against cross-entropy alone: {', '.join(parts)}."


def _change(one: Models, other: Models, figure: str) -> str:
    points, error = difference(one, other, figure)
    remark = ", within the error" if abs(points) <= error else ""
    return f"{_signed(points)} points (±{error:.1f}{remark})"


def _ranking(rows: Mapping[str, Models]) -> str:
    means = {name: statistics.fmean(figures.linf_accuracy for figures in models) for name, models in rows.items()}
    first, second = sorted(rows, key=lambda name: -means[name])[:2]
    points, error = difference(rows[first], rows[second])
    beyond = "beyond" if points > error else "within"
    return (
        f"Most accurate under L∞ PGD: {OBJECTIVES[first].title} ({100 * means[first]:.1f}%), then "
        f"{OBJECTIVES[second].title} ({100 * means[second]:.1f}%); the difference of {points:.1f} points is "
        f"{beyond} the error of ±{error:.1f}."
    )


def _duel(ours: Models, rival: Models) -> str:
    """The density penalty against the gradient of the target's logit, the baseline of Yang et al. (2024)."""
    points, error = difference(ours, rival)
    if abs(points) <= error:
        outcome = "neither wins under L∞ PGD"
    else:
        outcome = f"{'the density penalty' if points > 0 else 'the baseline'} wins under L∞ PGD"
    return (
        f"Density penalty against the gradient of the target's logit, the published baseline: {outcome} "
        f"({_signed(points)} ± {error:.1f} points){_duel_of_shares(ours, rival)}."
    )


def _duel_of_shares(ours: Models, rival: Models) -> str:
    """Of the shares only the seeds' error is known: with one seed the figures stand as they are."""
    one, other = _mean(ours, "share"), _mean(rival, "share")
    if one is None or other is None:
        return ""
    variance = _variance_of_mean(_values(ours, "share")) + _variance_of_mean(_values(rival, "share"))
    error = max(2 * math.sqrt(variance), 0.005)  # what two decimals do not show is no difference
    amount = "about as much" if abs(one - other) <= error else "less" if one < other else "more"
    return f"; it leaves {amount} of its attribution on the null block ({one:.2f}, the baseline {other:.2f})"


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")
