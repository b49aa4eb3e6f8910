"""A comparison as a table: on the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..training.extras import require
from .columns import Column, best, columns, crowded, topics
from .settings import EvaluationSettings
from .summary import Figure, Scalars, summarise

Models = Mapping[str, Sequence[Scalars]]  # label -> the figures of each model of that kind, one a seed
Rows = Mapping[str, Mapping[str, Figure]]


def print_table(title: str, models: Models, settings: EvaluationSettings, caption: str | None = None) -> None:
    """Print figures as a table; the best mean of each is bold.

    A kind of model is a row, or a column where there are many figures.

    Args:
        title: above the table.
        models: label -> the figures of the models of that kind, as many as there were seeds.
        settings: those figures were measured with.
        caption: below the table.
    """
    table = require("rich.table", "the table of results").Table(title=title, caption=caption)
    rows = rows_of(models)
    shown = columns_of(rows, settings)
    cells = _cells(rows, shown, "[bold]{}[/bold]")
    if crowded(shown):
        table.add_column("figure", no_wrap=True)
        for label in rows:
            table.add_column(printable(label), justify="right")
        for some in topics(shown).values():
            for column in some:
                table.add_row(*map(printable, (column.titled, *(cells[label][column.figure] for label in rows))))
            table.add_section()
    else:
        table.add_column("model", no_wrap=True)
        for column in shown:
            table.add_column(printable(column.titled), justify="right")
        for label in rows:
            table.add_row(*map(printable, (label, *cells[label].values())))
    console().print(table)


def printable(text: str) -> str:
    """A text as standard output prints it, for a layout: a sign that it has not may become several."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, sys.stdout.errors or "replace").decode(encoding)


def markdown(models: Models, settings: EvaluationSettings) -> str:
    """One Markdown table: mean ± standard error, the best mean of each bold. Its rows are those of ``print_table``."""
    rows = rows_of(models)
    shown = columns_of(rows, settings)
    cells = _cells(rows, shown, "**{}**")
    if crowded(shown):
        lines = [["figure", *rows], ["---", *("---:" for _ in rows)]]
        lines += [[column.titled, *(cells[label][column.figure] for label in rows)] for column in shown]
    else:
        lines = [["model", *(column.titled for column in shown)], ["---", *("---:" for _ in shown)]]
        lines += [[label, *cells[label].values()] for label in rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def comma_separated(models: Models, settings: EvaluationSettings) -> str:
    """The same as CSV with every digit: a mean and a standard error a figure, empty where there is none."""
    rows = rows_of(models)
    names = [column.figure for column in columns_of(rows, settings)]
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(["model", "runs", *(part for name in names for part in (name, f"{name}_standard_error"))])
    for label, figures in rows.items():
        values = [value for name in names for value in figures.get(name, Figure(None))]
        writer.writerow([label, len(models[label]), *("" if value is None else repr(value) for value in values)])
    return content.getvalue()


def rows_of(models: Models) -> dict[str, dict[str, Figure]]:
    """Means and standard errors of each kind of model."""
    return {label: summarise(scalars) for label, scalars in models.items()}


def columns_of(rows: Rows, settings: EvaluationSettings) -> tuple[Column, ...]:
    """The columns of all figures that one of the rows has."""
    return columns(settings, [name for figures in rows.values() for name in figures])


def _cells(rows: Rows, shown: Sequence[Column], emphasis: str) -> dict[str, dict[str, str]]:
    """label -> figure -> what is written of it."""
    winners = {column.figure: best(column, rows) for column in shown}

    def cell(label: str, column: Column) -> str:
        mean, error = rows[label].get(column.figure, Figure(None))
        text = column.text(mean)
        text = emphasis.format(text) if label in winners[column.figure] else text
        return f"{text} {column.error_text(error)}".rstrip()

    return {label: {column.figure: cell(label, column) for column in shown} for label in rows}


def console() -> Any:
    """Where tables are printed: as wide as the terminal or, since a file has no width, wide enough."""
    return require("rich.console", "the table of results").Console(width=None if sys.stdout.isatty() else 132)
