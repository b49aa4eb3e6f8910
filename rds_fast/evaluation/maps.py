"""Attribution maps of several models on the same samples, side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping

import torch
from torch import Tensor

from ..training import data, runs
from . import page, pictures
from .comparison import Comparison
from .leakage import feature_leakage, input_gradient
from .samples import drawn

_CAPTION = (
    "The first sample of each class. The top row is what the model sees. Each other row is the size of ∇ₓ f_y, the "
    "change of the true class's logit with each pixel: bright pixels matter. Every map is divided by its own largest "
    "value, so the colours say where a model looks, not how strongly."
)
_SHARES = (
    " The number below a map is the share of its length that falls on the null block; 0 would be a model that looks at "
    "the other block alone."
)


def attribution_maps(comparison: Comparison, colours: Mapping[str, str], splits: data.Splits | None = None) -> str:
    """The maps of the first run of each group, as HTML; where the data are not at hand, a note that says why."""
    if len({run.record.fingerprint for run in comparison.runs}) > 1:
        return page.note("No maps: the runs were not measured on the same samples.")
    first = comparison.first
    try:
        whole: data.Split = getattr(splits or first.training.load_data(), first.split)
        measured = data.fingerprint(drawn(whole, first.settings.limit, first.settings.seed))
        models = {group.title: runs.load_model(group.runs[0].folder)[0] for group in comparison.groups}
    except (OSError, ImportError, ValueError) as error:
        return page.note(f"No maps: {error}")
    if measured != first.fingerprint:
        return page.note("No maps: the data are no longer those that were measured.")
    samples = whole.take(pictures.first_of_each_class(whole.labels).to(whole.index_device)).to("cpu")
    x = data.in_unit_interval(samples.images)
    rows = [_row("input", "", [pictures.image(image) for image in x])]
    for title, model in models.items():
        attribution = input_gradient(model, x, samples.labels)
        maps = [pictures.attribution_map(each) for each in attribution]
        rows.append(_row(title, f"--colour: {colours[title]}", maps, _shares(attribution, samples)))
    tall = x.shape[2] / x.shape[3]
    height = f"{76 * min(max(tall, 1.0), 2.0):.0f}px"
    table = f'<table class="maps" style="--height: {height}"><tbody>{"".join(rows)}</tbody></table>'
    return page.captioned(
        f'<div class="wide">{table}</div>', _CAPTION + (_SHARES if samples.signal_on_top is not None else "")
    )


def _shares(attribution: Tensor, samples: data.Images) -> list[str] | None:
    if samples.signal_on_top is None:
        return None
    shares = feature_leakage(attribution, samples.null_mask)[1]
    return ["–" if torch.isnan(share) else f"{float(share):.2f}" for share in shares]


def _row(title: str, style: str, uris: list[str], captions: list[str] | None = None) -> str:
    cells = []
    for number, uri in enumerate(uris):
        below = f"<small>{captions[number]}</small>" if captions else ""
        cells.append(f'<td><img src="{uri}" alt="{html.escape(title)}, sample {number + 1}">{below}</td>')
    mark = "<i></i>" if style else ""
    return f'<tr style="{style}"><th scope="row">{mark}{html.escape(_unbroken(title))}</th>{"".join(cells)}</tr>'


def _unbroken(title: str) -> str:
    """No line ends inside "λ = 2"."""
    return title.replace(" = ", "\u00a0=\u00a0")
