"""The figures as columns: what each is called, how it is written, which way is better, what it means."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..training.extras import require
from .evaluate import EvaluationSettings, Figures, mean_and_spread


class Column(NamedTuple):
    """One figure.

    Attributes:
        figure: its name in ``Figures``.
        heading: short.
        percent: it is a share in [0, 1], written in percent.
        better: 1 if more is better, -1 if less is, 0 if neither.
        meaning: one or two sentences for a newcomer.
    """

    figure: str
    heading: str
    percent: bool
    better: int
    meaning: str

    def text(self, value: float | None) -> str:
        """A value as it is printed; that of no value is a dash."""
        if value is None:
            return "–"
        if self.percent:
            return f"{100 * value:.1f}%"
        return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"

    def spread_text(self, spread: float | None) -> str:
        """The standard deviation of a value, in its unit; that of no spread is empty."""
        if spread is None:
            return ""
        return f"±{100 * spread:.1f}" if self.percent else f"±{spread:.2f}" if spread >= 0.005 else f"±{spread:.1g}"


def columns(settings: EvaluationSettings) -> tuple[Column, ...]:
    """The columns of a table of figures measured with these settings."""
    attack = f"projected gradient descent, {settings.steps} steps from a random start"
    return (
        Column("accuracy", "accuracy", True, 1, "Samples classified rightly."),
        Column(
            "linf_accuracy",
            f"PGD L∞ {settings.linf_epsilon:g}",
            True,
            1,
            f"Samples still classified rightly after every pixel was moved by up to {settings.linf_epsilon:g} (black "
            f"is 0, white is 1) in the worst way that was found: {attack}.",
        ),
        Column(
            "l2_accuracy",
            f"PGD L2 {settings.l2_epsilon:g}",
            True,
            1,
            f"The same when the change as a whole may have a Euclidean length of up to {settings.l2_epsilon:g}.",
        ),
        Column(
            "leakage",
            "leakage",
            False,
            -1,
            "Mean length of the part of the attribution ∇ₓ f_y, the input gradient of the true class's logit, that is "
            "on the null block, which says nothing about the class. Any gradient that is merely smaller lowers it.",
        ),
        Column(
            "share",
            "null share",
            False,
            -1,
            "That length divided by the length of the whole attribution, sample by sample: a gradient that is merely "
            "smaller does not change it. An attribution spread evenly over both blocks has 0.71.",
        ),
        Column(
            "gradient_norm",
            "‖∇ log p‖",
            False,
            0,
            "Mean length of the input gradient of the log density that the logits define: what the density penalty "
            "holds down. A property, not a goal.",
        ),
    )


def best(column: Column, rows: Mapping[str, Figures]) -> set[str]:
    """The names of the rows that are best in a column as printed; equal texts are equally good."""
    values = {name: getattr(figures, column.figure) for name, figures in rows.items()}
    present = {name: value for name, value in values.items() if value is not None}
    if column.better == 0 or len(present) < 2:
        return set()
    top = max(present.values(), key=lambda value: column.better * value)
    return {name for name, value in present.items() if column.text(value) == column.text(top)}


def print_table(
    title: str, models: Mapping[str, Sequence[Figures]], settings: EvaluationSettings, caption: str | None = None
) -> None:
    """Print figures as a table, one row a kind of model; the best mean of each column is bold.

    Args:
        title: above the table.
        models: label -> the figures of the models of that kind, as many as there were seeds.
        settings: those figures were measured with.
        caption: below the table.
    """
    table = require("rich.table", "the table of results").Table(title=title, caption=caption)
    table.add_column("model", no_wrap=True)
    shown = columns(settings)
    for column in shown:
        table.add_column(column.heading + {1: " ↑", -1: " ↓", 0: ""}[column.better], justify="right")
    rows = {label: mean_and_spread(figures) for label, figures in models.items()}
    winners = {column.figure: best(column, {label: mean for label, (mean, _) in rows.items()}) for column in shown}
    for label, (mean, spread) in rows.items():
        cells = []
        for column in shown:
            text = column.text(getattr(mean, column.figure))
            text = f"[bold]{text}[/bold]" if label in winners[column.figure] else text
            cells.append(f"{text} {column.spread_text(getattr(spread, column.figure, None))}".rstrip())
        table.add_row(label, *cells)
    console().print(table)


def console() -> Any:
    """Where tables are printed: as wide as the terminal or, since a file has no width, wide enough."""
    return require("rich.console", "the table of results").Console(width=None if sys.stdout.isatty() else 132)
