"""The report's pictures: drawings as SVG to stand in a page, images and maps as data URIs. None needs another file."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..training.extras import require
from .results import Curve

# Okabe & Ito's colours, told apart in every common form of colour blindness; the grey is for cross-entropy.
COLOURS = ("#7a8696", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a0522d")

# In a page these become the page's own colours, so that a drawing follows its light or dark dress.
_INK, _SOFT, _LINE, _SHADE = "#1d2733", "#5f6b7a", "#e2e6ec", "#eef6f2"
_PAGE_COLOURS = {_INK: "var(--ink)", _SOFT: "var(--soft)", _LINE: "var(--line)", _SHADE: "var(--shade)"}

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _SOFT,
    "axes.facecolor": "none",
    "axes.labelcolor": _SOFT,
    "axes.titlecolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "grid.color": _LINE,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "svg.fonttype": "path",
    "svg.hashsalt": "rds_fast",  # the same picture has the same bytes
}


def curve_panel(
    title: str,
    curves: Mapping[str, Sequence[Curve]],
    colours: Mapping[str, str],
    *,
    dashed: Mapping[str, Sequence[Curve]] | None = None,
) -> str:
    """One figure as a function of another, for several kinds of models: the mean over the seeds and their range.

    Args:
        title: what it shows, for readers without eyes; the page sets it above the axes.
        curves: label -> the curves of the models of that kind. Over points that they do not share no mean is drawn.
        colours: label -> colour.
        dashed: further curves of the same kinds, to be told from the others.

    Returns:
        An SVG element. It holds no legend: the page has one.
    """
    with _style():
        figure = _figure(5.0, 3.1)
        axis = figure.subplots()
        for some, line in ((curves, "-"), (dashed or {}, "--")):
            for label, each in some.items():
                _draw(axis, each, line, colours[label])
        first = next(iter(curves.values()))[0]
        axis.set(xlabel=first.x_label, ylabel=first.y_label)
        if all(float(x).is_integer() for each in curves.values() for curve in each for x in curve.x):
            axis.xaxis.get_major_locator().set_params(integer=True)
        figure.subplots_adjust(left=0.15, right=0.97, top=0.97, bottom=0.18)
        return _svg(figure, title)


def _draw(axis: Any, curves: Sequence[Curve], line: str, colour: str) -> None:
    """The curves of one kind of models."""
    x = curves[0].x
    marks = {"marker": "o", "markersize": 3.5} if len(x) <= 15 else {}
    if any(curve.x != x for curve in curves):
        for curve in curves:
            axis.plot(curve.x, curve.y, line, color=colour, lw=1.5, alpha=0.7)
        return
    values = list(zip(*(curve.y for curve in curves), strict=True))
    if len(curves) > 1:
        axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.18, lw=0)
    axis.plot(x, [sum(v) / len(v) for v in values], line, color=colour, lw=2, **marks)


def weight_choice(
    candidates: Mapping[str, Sequence[tuple[float, float, float]]],
    chosen: Mapping[str, float],
    baseline: tuple[float, float],
    margin: float,
    colours: Mapping[str, str],
) -> str:
    """Accuracy against accuracy under PGD of every candidate weight, on the validation split, as an SVG element.

    Args:
        candidates: title -> (weight, accuracy, accuracy under PGD) of each candidate.
        chosen: title -> the weight that was chosen.
        baseline: the two accuracies of cross-entropy alone.
        margin: the loss of accuracy that the rule allows.
        colours: title -> colour, as on the rest of the page; the others take what is left.
    """
    with _style():
        figure = _figure(10.0, 4.2)
        axis = figure.subplots()
        axis.axvspan(100 * (baseline[0] - margin), 101, color=_SHADE, zorder=0)
        axis.plot(100 * baseline[0], 100 * baseline[1], "s", color=COLOURS[0], markersize=8, label="cross-entropy")
        left = (colour for colour in COLOURS[1:] if colour not in colours.values())
        for title, points in candidates.items():
            colour = colours.get(title) or next(left, COLOURS[0])
            accuracies, robust = [100 * p[1] for p in points], [100 * p[2] for p in points]
            axis.plot(accuracies, robust, "-o", color=colour, label=title, linewidth=1.5, markersize=4)
            ring = {"markersize": 14, "markerfacecolor": "none", "markeredgecolor": colour, "markeredgewidth": 2}
            for weight, x, y in zip((p[0] for p in points), accuracies, robust, strict=True):
                if weight == chosen.get(title):
                    axis.plot(x, y, "o", **ring)
        lowest = min(p[1] for points in candidates.values() for p in points)
        highest = max(baseline[0], *(p[1] for points in candidates.values() for p in points))
        axis.set(
            title="Each dot is a weight; the ringed one was chosen, within the shaded 2 points of cross-entropy",
            xlabel="accuracy, validation split (%); candidates that lose more than 20 points are off the picture",
            ylabel="accuracy under L∞ PGD (%)",
            xlim=(100 * max(lowest, baseline[0] - 0.2) - 1, 100 * highest + 1),
        )
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.subplots_adjust(left=0.065, right=0.79, top=0.92, bottom=0.12)
        return _svg(figure, "accuracy and accuracy under PGD of every candidate weight")


def image(x: Tensor) -> str:
    """An image (C, H, W) in [0, 1], C 1 or 3, as a data URI."""
    pixels = x.detach().cpu().float().clamp(0, 1)
    return _png(pixels.expand(3, -1, -1).permute(1, 2, 0))


def attribution_map(attribution: Tensor) -> str:
    """The magnitude of an attribution (C, H, W), summed over channels, as a data URI.

    It is divided by its largest value, so the colour says where a model looks and not how large its gradient is.
    """
    magnitude = attribution.detach().cpu().float().abs().sum(0)
    largest = float(magnitude.max())
    if not (math.isfinite(largest) and largest > 0):
        magnitude, largest = torch.zeros_like(magnitude), 1.0
    colours = require("matplotlib", "the report's pictures").colormaps["magma"]
    return _png(torch.from_numpy(colours((magnitude / largest).numpy())[:, :, :3]))


def first_of_each_class(labels: Tensor, most: int = 10) -> Tensor:
    """The indices of the first sample of each class, in the order of the classes, of the first ``most`` of them."""
    return torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()[:most]])


def _style() -> Any:
    return require("matplotlib", "the report's pictures").rc_context(_STYLE)


def _figure(width: float, height: float) -> Any:
    # Not by pyplot, which keeps figures alive and would choose a backend with windows where there is a display.
    return require("matplotlib.figure", "the report's pictures").Figure(figsize=(width, height))


def _png(pixels: Tensor) -> str:
    """(H, W, 3) in [0, 1] as a data URI of as many pixels."""
    content = io.BytesIO()
    save = require("matplotlib.image", "the report's pictures").imsave
    save(content, pixels.contiguous().numpy(), format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _svg(figure: Any, title: str) -> str:
    """A figure as an SVG element of a page: without what a file needs, its names its own, its colours the page's."""
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    for colour, of_page in _PAGE_COLOURS.items():
        svg = svg.replace(colour, of_page)
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    width, height = (float(inches) * 72 for inches in figure.get_size_inches())
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_escaped(title)}"'
    return re.sub(r"<svg [^>]*", lambda _: opening, svg, count=1)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
