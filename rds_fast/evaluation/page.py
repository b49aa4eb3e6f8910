"""The parts of a report's page: one HTML file that needs no other, no network and no script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..training.checkpoints import write_atomically
from ..training.names import readable
from .columns import ARROWS, Column, best, crowded, topics
from .summary import Figure

STYLE = "report.css"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<p class="lead">{lead}</p>
</header>
{sections}
</main>
</body>
</html>
"""


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """A whole page; ``lead`` is HTML, and so are the sections."""
    style = resources.files(__package__).joinpath(STYLE).read_text(encoding="utf-8")
    present = "\n".join(part for part in sections if part)
    return _PAGE.format(style=style, title=html.escape(title), lead=lead, sections=present)


def write(path: Path, content: str) -> None:
    """Write a page as UTF-8, at once or not at all; what is no text in a path or a command line is replaced."""
    write_atomically(path, readable(content).encode("utf-8", "replace"))


def section(title: str, body: str) -> str:
    """A section; nothing where its body is empty."""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{body}\n</section>" if body else ""


def note(text: str, kind: str = "note") -> str:
    """A remark in words; ``kind`` is ``"note"`` or ``"warning"``."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if text else ""


def sentences(texts: Sequence[str], kind: str = "verdicts") -> str:
    """A list of sentences."""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f'<ul class="{kind}">{items}</ul>' if texts else ""


def captioned(picture: str, caption: str) -> str:
    """A picture, in HTML, and what it shows."""
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def panels(drawings: Mapping[str, str]) -> str:
    """Small pictures side by side, each under its title."""
    each = "".join(f"<figure><h3>{html.escape(title)}</h3>{drawing}</figure>" for title, drawing in drawings.items())
    return f'<div class="panels">{each}</div>' if drawings else ""


def descriptions(rows: Mapping[str, str]) -> str:
    """Terms and what they mean or are."""
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in rows.items())
    return f"<dl>{items}</dl>"


def folded(title: str, body: str, *, unfolded: bool = False) -> str:
    """What is shown at a click."""
    opening = "<details open>" if unfolded else "<details>"
    return f"{opening}<summary>{html.escape(title)}</summary>{body}</details>" if body else ""


def legend(colours: Mapping[str, str]) -> str:
    """The colour of each label."""
    items = "".join(
        f'<li style="--colour: {colour}"><i></i>{html.escape(label)}</li>' for label, colour in colours.items()
    )
    return f'<ul class="legend">{items}</ul>'


def figures_table(rows: Mapping[str, Mapping[str, Figure]], shown: Sequence[Column], colours: Mapping[str, str]) -> str:
    """Means with their standard errors, the best of each marked; a model is a row, or a column beside many figures."""
    if crowded(shown):
        table = f'<table class="figures tall">{_figures_as_rows(rows, shown, colours)}</table>'
    else:
        table = f'<table class="figures">{_models_as_rows(rows, shown, colours)}</table>'
    return f'<div class="wide">{table}</div>'


def _models_as_rows(
    rows: Mapping[str, Mapping[str, Figure]], shown: Sequence[Column], colours: Mapping[str, str]
) -> str:
    head = "".join(f"<th>{_titled(column)}</th>" for column in shown)
    winners = {column.figure: best(column, rows) for column in shown}
    body = []
    for label in rows:
        cells = "".join(_cell(column, label, rows, label in winners[column.figure]) for column in shown)
        first = f'<th scope="row"><i></i>{html.escape(label)}</th>'
        body.append(f'<tr style="--colour: {colours[label]}">{first}{cells}</tr>')
    return f"<thead><tr><th>model</th>{head}</tr></thead><tbody>{''.join(body)}</tbody>"


def _figures_as_rows(
    rows: Mapping[str, Mapping[str, Figure]], shown: Sequence[Column], colours: Mapping[str, str]
) -> str:
    head = "".join(f'<th style="--colour: {colours[label]}"><i></i>{html.escape(label)}</th>' for label in rows)
    body = []
    for topic, some in topics(shown).items():
        body.append(f'<tr><th class="topic" colspan="{len(rows) + 1}">{html.escape(topic)}</th></tr>')
        for column in some:
            winners = best(column, rows)
            cells = "".join(
                _cell(column, label, rows, label in winners, f"--colour: {colours[label]}") for label in rows
            )
            body.append(f'<tr><th scope="row">{_titled(column)}</th>{cells}</tr>')
    return f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody>"


def _titled(column: Column) -> str:
    senses = {1: f"{ARROWS[1]} more is better", -1: f"{ARROWS[-1]} less is better", 0: "&nbsp;"}
    return f"{html.escape(column.heading)}<small>{senses[column.better]}</small>"


def _cell(column: Column, label: str, rows: Mapping[str, Mapping[str, Figure]], winner: bool, style: str = "") -> str:
    """A number above a bar: of the whole for shares in percent, else of the column's largest number, if of several."""
    values = {other: figures.get(column.figure, Figure(None)) for other, figures in rows.items()}
    value, error = values[label]
    several = [f.mean for f in values.values() if f.mean is not None] if len(rows) > 1 else []
    full = 1.0 if column.percent else max(several, default=0.0)
    width = min(max(100 * value / full, 0), 100) if value is not None and full > 0 else 0
    kind = ' class="best"' if winner else ""
    kind += f' style="{style}"' if style else ""
    return (
        f"<td{kind}>{column.text(value)}<small>{column.error_text(error)}</small>"
        f'<b style="width: {width:.1f}%"></b></td>'
    )


def plain_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same columns: words to the left, numbers to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    words = {name for row in rows for name, value in row.items() if isinstance(value, str)}
    head = "".join(_plain_head(name, name in words) for name in names)
    body = "".join(f"<tr>{''.join(_plain_cell(row.get(name)) for name in names)}</tr>" for row in rows)
    return f'<div class="wide"><table class="plain"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plain_head(name: str, of_words: bool) -> str:
    opening = '<th class="word">' if of_words else "<th>"
    return f"{opening}{html.escape(name.replace('_', ' '))}</th>"


def _plain_cell(value: Any) -> str:
    if isinstance(value, str):
        return f'<td class="word">{html.escape(value)}</td>'
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"<td>{html.escape(text)}</td>"
