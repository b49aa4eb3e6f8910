"""The report's pictures, each as a data URI, so that a page holding them needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..training.extras import require

# Okabe & Ito's colours, told apart in every common form of colour blindness.
COLOURS = ("#5f6b7a", "#0072b2", "#d55e00", "#009e73", "#cc79a7")

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a3",
    "axes.labelcolor": "#3b4654",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e6e9ee",
    "axes.axisbelow": True,
    "xtick.color": "#3b4654",
    "ytick.color": "#3b4654",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "rds_fast",  # the same picture has the same bytes
}


def attribution_grid(images: Tensor, attributions: Mapping[str, Tensor], shares: Mapping[str, Tensor]) -> str:
    """Samples side by side, and below each the attribution of every model.

    Each map is divided by its own largest magnitude, so the colour says where a model looks and not how large its
    gradient is; the number above it is the null block's share.

    Args:
        images: (K, 1, H, W) in [0, 1].
        attributions: title -> (K, 1, H, W).
        shares: title -> (K,).
    """
    count, rows = len(images), 1 + len(attributions)
    with _style():
        figure = _figure(0.92 * count + 1.5, 2.02 * rows)
        axes = figure.subplots(rows, count, squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.16})
        figure.subplots_adjust(left=1.45 / (0.92 * count + 1.5), right=0.995, top=0.995, bottom=0.005)
        for column, image in enumerate(images[:, 0]):
            axes[0][column].imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for row, (title, maps) in enumerate(attributions.items(), 1):
            for column, values in enumerate(maps[:, 0].abs()):
                top = float(values.max()) or 1.0
                axes[row][column].imshow(values.numpy() / top, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
                share = float(shares[title][column])
                axes[row][column].set_title(
                    "–" if share != share else f"{share:.2f}", fontsize=8, fontweight="normal", loc="center", pad=2
                )
        for row, title in enumerate(("input", *attributions)):
            for axis in axes[row]:
                axis.set(xticks=[], yticks=[])
                axis.grid(False)
                axis.spines[:].set_visible(False)
            colour = "#1d2733" if row == 0 else COLOURS[(row - 1) % len(COLOURS)]
            axes[row][0].set_ylabel(
                title.replace(" ‖", "\n‖"),
                rotation=0,
                ha="right",
                va="center",
                labelpad=8,
                fontsize=10,
                fontweight="bold",
                color=colour,
            )
        return _png(figure)


def training_curves(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> str:
    """Validation accuracy and training cross-entropy, epoch by epoch: the mean over the seeds and their range.

    Args:
        histories: title -> the rows of metrics.jsonl of each of its models.
    """
    panels = (
        ("validation_accuracy", "Accuracy on the validation split", "%", 100.0),
        ("cross_entropy", "Cross-entropy while training", "nats", 1.0),
    )
    with _style():
        figure = _figure(10.0, 3.6)
        axes = figure.subplots(1, len(panels))
        for axis, (name, title, unit, factor) in zip(axes, panels, strict=True):
            for (label, models), colour in zip(histories.items(), COLOURS, strict=False):
                epochs = [[factor * row[name] for row in history if row["kind"] == "epoch"] for history in models]
                values = list(zip(*epochs, strict=True))
                x = range(1, len(values) + 1)
                axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
                axis.plot(x, [sum(v) / len(v) for v in values], "-o", color=colour, label=label, lw=2, markersize=3)
            axis.set(title=title, xlabel="epoch", ylabel=unit)
            axis.xaxis.get_major_locator().set_params(integer=True)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(labels))
        figure.subplots_adjust(left=0.065, right=0.99, top=0.91, bottom=0.25, wspace=0.18)
        return _svg(figure)


def weight_choice(
    candidates: Mapping[str, Sequence[tuple[float, float, float]]],
    chosen: Mapping[str, float],
    baseline: tuple[float, float],
    margin: float,
) -> str:
    """Accuracy against accuracy under PGD of every candidate weight, on the validation split.

    Args:
        candidates: title -> (weight, accuracy, accuracy under PGD) of each candidate.
        chosen: title -> the weight that was chosen.
        baseline: the two accuracies of cross-entropy alone.
        margin: the loss of accuracy that the rule allows.
    """
    with _style():
        figure = _figure(10.0, 4.2)
        axis = figure.subplots()
        axis.axvspan(100 * (baseline[0] - margin), 101, color="#f1f5f2", zorder=0)
        axis.plot(100 * baseline[0], 100 * baseline[1], "s", color=COLOURS[0], markersize=8, label="cross-entropy")
        for (title, points), colour in zip(candidates.items(), COLOURS[1:], strict=False):
            accuracies, robust = [100 * p[1] for p in points], [100 * p[2] for p in points]
            axis.plot(accuracies, robust, "-o", color=colour, label=title, linewidth=1.5, markersize=4)
            for weight, x, y in zip((p[0] for p in points), accuracies, robust, strict=True):
                if weight == chosen.get(title):
                    axis.plot(
                        x, y, "o", markersize=14, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=2
                    )
        lowest = min(p[1] for points in candidates.values() for p in points)
        axis.set(
            title="Each dot is a weight; the ringed one was chosen, within the shaded 2 points of cross-entropy",
            xlabel="accuracy, validation split (%); candidates that lose more than 20 points are off the picture",
            ylabel="accuracy under L∞ PGD (%)",
            xlim=(
                100 * max(lowest, baseline[0] - 0.2) - 1,
                100 * max(baseline[0], *(p[1] for c in candidates.values() for p in c)) + 1,
            ),
        )
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.subplots_adjust(left=0.065, right=0.79, top=0.92, bottom=0.12)
        return _svg(figure)


def _style() -> Any:
    return require("matplotlib", "the report's pictures").rc_context(_STYLE)


def _figure(width: float, height: float) -> Any:
    # Not by pyplot, which keeps figures alive and would choose a backend with windows where there is a display.
    return require("matplotlib.figure", "the report's pictures").Figure(figsize=(width, height))


def _png(figure: Any) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _svg(figure: Any) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def first_of_each_class(labels: Tensor) -> Tensor:
    """The indices of the first sample of each class, in the order of the classes."""
    return torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()])
