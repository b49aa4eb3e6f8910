"""The demonstration's page: the comparison's, with how the weights were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation import page, pictures, report
from ..evaluation.comparison import Comparison
from ..training import data
from .demo import label
from .sweep import candidates

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
    choice = page.section("How the weights were chosen", _choice(record, report.colours_of(comparison)))
    return report.render(
        comparison, title=_TITLE, lead=lead, splits=splits, commands=commands, duel=duel, extra=[choice]
    )


def _choice(record: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    selection, titles = record["selection"], {name: v["title"] for name, v in record["variants"].items()}
    found = {name: candidates(record, name) for name in record["choices"]}
    (baseline,) = found.pop(selection["baseline"])
    shown = {
        titles[name]: [(c.settings["weight"], c.accuracy, c.measure) for c in each] for name, each in found.items()
    }
    chosen = {titles[name]: record["choices"][name]["settings"]["weight"] for name in found}
    of_chosen = {titles[name]: colours[kind] for name in found if (kind := label(record, name)) in colours}
    weights = dict.fromkeys(weight for each in shown.values() for weight, _, _ in each)
    caption = (
        f"Every penalty had the same {len(weights)} candidates, {', '.join(f'{weight:g}' for weight in weights)}, and "
        f"one rule: {record['rule']}. Seeds: {', '.join(map(str, record['seeds']))}. The test split had no part in it."
    )
    baseline_point = (baseline.accuracy, baseline.measure)
    picture = pictures.weight_choice(shown, chosen, baseline_point, selection["margin"], of_chosen)
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
