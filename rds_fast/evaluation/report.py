"""The page of a comparison; one run, evaluated alone, is a comparison of one."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from ..training import data, runs
from . import page, pictures
from .columns import crowded
from .comparison import Comparison, Group
from .maps import attribution_maps
from .results import Curve
from .table import columns_of, rows_of
from .titles import BASELINE, common
from .verdicts import verdicts

# More verdicts than this, one a kind of model, nobody reads.
_MOST_VERDICTS = 12

# From more of them on they are read at a click.
_MOST_NOTES = 6

_PERCENT = 100.0


def render(
    comparison: Comparison,
    *,
    title: str,
    lead: str,
    splits: data.Splits | None = None,
    commands: Sequence[str] = (),
    duel: tuple[str, str] | None = None,
    extra: Sequence[str] = (),
) -> str:
    """The page as a string.

    Args:
        comparison: what it shows.
        title, lead: at its top; the lead is HTML.
        splits: the data of the runs, where they are loaded already; else they are loaded for the attribution maps.
        commands: command lines that repeat what the page shows.
        duel: titles of two groups that are to be set against each other (see ``verdicts``).
        extra: further sections, in HTML, before the settings.
    """
    colours = colours_of(comparison)
    sections = [
        page.section("The figures", _figures(comparison, colours, duel)),
        page.section("Curves", _curves(comparison, colours)),
        page.section("Where the models look", attribution_maps(comparison, colours, splits)),
        page.section("How they were trained", _training_curves(comparison, colours)),
        *extra,
        page.section("Tables", _tables(comparison)),
        page.section("Settings, runs, versions", _settings(comparison, commands)),
    ]
    return page.page(title, lead, sections)


def lead_of(comparison: Comparison) -> str:
    """What is compared, in two sentences of HTML."""
    first, runs_ = comparison.first, comparison.runs
    what = f"{first.evaluation.samples} samples of the {first.split} split of {first.training.data}"
    if len(runs_) == 1:
        return html.escape(f"{comparison.groups[0].title}, on {what}.")
    seeds = {len(group.runs) for group in comparison.groups}
    each = f"{seeds.pop()} runs each" if len(seeds) == 1 and seeds != {1} else f"{len(runs_)} runs"
    kinds = f"{len(comparison.groups)} kinds of models" if len(comparison.groups) > 1 else comparison.groups[0].title
    seeded = "Runs of one kind differ in nothing but the seed; figures are means, and ± is one standard error."
    return html.escape(f"{kinds}, {each}, on {what}. {seeded if len(runs_) > len(comparison.groups) else ''}").strip()


def colours_of(comparison: Comparison) -> dict[str, str]:
    """A colour for each group, the same throughout the page; grey is for cross-entropy."""
    palette = pictures.COLOURS
    has_baseline = comparison.groups[0].training.objective == BASELINE
    first = 0 if has_baseline else 1
    return {group.title: palette[(first + n) % len(palette)] for n, group in enumerate(comparison.groups)}


def _figures(comparison: Comparison, colours: Mapping[str, str], duel: tuple[str, str] | None) -> str:
    rows = rows_of(comparison.models)
    shown = columns_of(rows, comparison.settings)
    warnings = "".join(page.note(warning, "warning") for warning in comparison.warnings)
    table = page.figures_table(rows, shown, colours)
    meanings = page.descriptions({column.heading: column.meaning for column in shown if column.meaning})
    notes = notes_of(comparison)
    remarks = page.folded("Notes", page.sentences(notes, "remarks"), unfolded=len(notes) <= _MOST_NOTES)
    folded = page.folded("What the columns mean", meanings, unfolded=not crowded(shown))
    return warnings + table + verdicts_of(comparison, duel) + remarks + folded


def verdicts_of(comparison: Comparison, duel: tuple[str, str] | None = None) -> str:
    """The verdicts on the groups, and what their errors are; nothing without a cross-entropy to be set against."""
    said = spoken(comparison, duel)
    if not said:
        return ""
    if any(len(group.runs) > 1 for group in comparison.groups):
        errors = "Their errors are two standard errors, of the seeds and of the finite number of samples together."
    else:
        errors = (
            "One seed: their errors are two standard errors of the finite number of samples alone, and another seed "
            "would move the figures further."
        )
    return page.sentences(said) + page.note(errors)


def spoken(comparison: Comparison, duel: tuple[str, str] | None = None) -> list[str]:
    """The verdicts on the groups, the first cross-entropy being what the others are set against."""
    baselines = [group.title for group in comparison.groups if group.training.objective == BASELINE]
    if not baselines or not 1 < len(comparison.groups) <= _MOST_VERDICTS or comparison.warnings:
        return []
    models = {group.title: [run.record.evaluation for run in group.runs] for group in comparison.groups}
    return verdicts(models, baselines[0], duel)


def notes_of(comparison: Comparison) -> list[str]:
    """The notes of the evaluations, each once, with the groups that it is about where that is not all of them."""
    about: dict[str, list[str]] = {}
    for group in comparison.groups:
        for note in dict.fromkeys(note for run in group.runs for note in run.record.evaluation.notes):
            about.setdefault(note, []).append(group.title)
    everyone = len(comparison.groups)
    return [note if len(titles) == everyone else f"{'; '.join(titles)}: {note}" for note, titles in about.items()]


def _curves(comparison: Comparison, colours: Mapping[str, str]) -> str:
    """A panel a curve; two of one name that end in _in and _out share one, the latter dashed."""
    names = list(dict.fromkeys(name for run in comparison.runs for name in run.record.evaluation.curves))
    panels = {}
    for name in names:
        stem = name.removesuffix("_out")
        if stem != name and f"{stem}_in" in names:
            continue
        stem = name.removesuffix("_in")
        paired = stem != name and f"{stem}_out" in names
        title = f"{stem.replace('_', ' ')} (dashed: other data)" if paired else name.replace("_", " ")
        beside = _named(comparison, f"{stem}_out") if paired else {}
        panels[title] = pictures.curve_panel(title, _named(comparison, name), colours, dashed=beside)
    return _with_legend(panels, colours)


def _named(comparison: Comparison, name: str) -> dict[str, list[Curve]]:
    """The curves of one name of each group that has them."""
    found = {}
    for group in comparison.groups:
        curves = [run.record.evaluation.curves for run in group.runs]
        found[group.title] = [each[name] for each in curves if name in each]
    return {title: curves for title, curves in found.items() if curves}


def _with_legend(panels: Mapping[str, str], colours: Mapping[str, str]) -> str:
    legend = page.legend(colours) if panels and len(colours) > 1 else ""
    return legend + page.panels(panels)


def _training_curves(comparison: Comparison, colours: Mapping[str, str]) -> str:
    """From the runs' metrics.jsonl, epoch by epoch."""
    parts = (
        ("validation_accuracy", "Accuracy on the validation split", "%", _PERCENT),
        ("cross_entropy", "Cross-entropy while training", "nats", 1.0),
    )
    panels = {}
    for name, title, unit, factor in parts:
        found = {group.title: _histories(group, name, unit, factor) for group in comparison.groups}
        curves = {label: each for label, each in found.items() if each}
        if curves:
            panels[title] = pictures.curve_panel(title, curves, colours)
    drawn = _with_legend(panels, colours)
    caption = (
        "Lines are means over the seeds, bands reach from the least to the largest. The cross-entropy is averaged over "
        "an epoch, while the weights change."
    )
    return page.captioned(drawn, caption) if drawn else ""


def _histories(group: Group, name: str, unit: str, factor: float) -> list[Curve]:
    curves = []
    for run in group.runs:
        rows = [row for row in runs.read_metrics(run.folder) if row["kind"] == "epoch" and row.get(name) is not None]
        epochs, values = [row["epoch"] for row in rows], [factor * row[name] for row in rows]
        if epochs:
            curves.append(Curve("epoch", unit, tuple(epochs), tuple(values)))
    return curves


def _tables(comparison: Comparison) -> str:
    """Every table, each with the rows of all runs."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for group in comparison.groups:
        for run in group.runs:
            whose = {"model": group.title, "seed": run.record.training.seed} if len(comparison.runs) > 1 else {}
            for name, found in run.record.evaluation.tables.items():
                rows.setdefault(name, []).extend({**whose, **row} for row in found)
    return "".join(page.folded(name.replace("_", " "), page.plain_table(found)) for name, found in rows.items())


def _settings(comparison: Comparison, commands: Sequence[str]) -> str:
    first = comparison.first
    settings = {name: value for name, value in first.settings.to_settings().items() if value not in (None, [])}
    shared = common([group.first for group in comparison.groups])
    everything = [run.record for run in comparison.runs]
    rows = {
        "training, common to all": _listed({name: value for name, value in shared.items() if value not in (None, ())}),
        "evaluation": _listed(settings),
        "evaluated on": _distinct([record.device for record in everything]),
        "versions": _distinct([_listed({n: v for n, v in record.versions.items() if v}) for record in everything]),
    }
    listed = [
        {
            "model": group.title,
            "run": str(run.folder),
            "seed": run.record.training.seed,
            "seconds_of_training": _training_seconds(run.folder),
            "seconds_of_evaluation": round(sum(run.record.evaluation.seconds.values()), 1),
        }
        for group in comparison.groups
        for run in group.runs
    ]
    lines = f"<pre>{html.escape(chr(10).join(commands))}</pre>" if commands else ""
    return page.plain_table(listed) + page.descriptions(rows) + lines


def _training_seconds(folder: Any) -> float | None:
    epochs = [row for row in runs.read_metrics(folder) if row["kind"] == "epoch"]
    return round(epochs[-1]["seconds"], 1) if epochs and "seconds" in epochs[-1] else None


def _listed(settings: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return " ".join(map(str, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name.replace('_', ' ')} {text(value)}" for name, value in settings.items())


def _distinct(texts: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(texts))
