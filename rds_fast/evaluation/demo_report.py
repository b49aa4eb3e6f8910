"""The demonstration's page: the comparison's, with how the weights were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..training import data
from . import page, pictures, report
from .comparison import Comparison
from .sweep import BASELINE, MARGIN, OBJECTIVES, average

_TITLE = "What a penalty on the input gradient does"
_LEAD = """Four classifiers learn to read handwritten digits from images of two blocks: one holds the digit, the other
always holds the same square and says nothing. One classifier minimises the cross-entropy alone. The others add a
penalty λ · ‖gradient with respect to the image‖: of the true class's logit f<sub>y</sub>, of the cross-entropy, or of
the log density log p(x) = log Σ exp f<sub>i</sub>(x) that the logits define. All figures are of the {samples} test
images; ± is one standard error over the seeds."""


def render(
    comparison: Comparison,
    record: Mapping[str, Any],
    commands: Sequence[str],
    *,
    duel: tuple[str, str] | None = None,
    splits: data.Splits | None = None,
) -> str:
    """The page as a string.

    Args:
        comparison: of the demonstration's runs.
        record: of the sweep that chose their weights.
        commands: command lines that repeat what the page shows.
        duel: the titles of ours and of the published baseline.
        splits: the data, where they are loaded already.
    """
    lead = _LEAD.format(samples=comparison.first.evaluation.samples)
    choice = page.section("How the weights were chosen", _choice(record))
    return report.render(
        comparison, title=_TITLE, lead=lead, splits=splits, commands=commands, duel=duel, extra=[choice]
    )


def _choice(record: Mapping[str, Any]) -> str:
    trials, weights, seeds = record["trials"], record["weights"], record["seeds"]
    baseline = average(trials, BASELINE, 0.0, seeds)
    titles = {name: OBJECTIVES[name].title for name in record["choices"]}
    candidates = {
        title: [(c.weight, c.accuracy, c.linf_accuracy) for c in (average(trials, name, w, seeds) for w in weights)]
        for name, title in titles.items()
    }
    chosen = {titles[name]: choice["weight"] for name, choice in record["choices"].items()}
    caption = (
        f"Every penalty had the same {len(weights)} candidates, {', '.join(f'{weight:g}' for weight in weights)}, and "
        f"one rule: {record['rule']}. Seeds: {', '.join(map(str, seeds))}. The test split had no part in it."
    )
    baseline_point = (baseline.accuracy, baseline.linf_accuracy)
    picture = pictures.weight_choice(candidates, chosen, baseline_point, MARGIN)
    return page.captioned(picture, caption) + page.note(" ".join(_flags(record, titles)))


def _flags(record: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    flags = []
    for name, choice in record["choices"].items():
        if not choice["within_margin"]:
            flags.append(
                f"{titles[name]}: no candidate is within 2 points of cross-entropy; the most accurate was taken."
            )
        elif choice["at_edge"]:
            flags.append(f"{titles[name]}: the choice is the first or last candidate; a better one may lie beyond.")
    return flags
