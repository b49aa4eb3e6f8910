"""The figures as columns: what each is called, how it is written, which way is better, what it means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .settings import EvaluationSettings
from .summary import Figure

GENERAL = "Accuracy and attacks"
ATTRIBUTIONS = "Attributions"
DENSITY = "Density and other data"
SANITY = "Sanity of the attacks"

ARROWS = {1: "↑", -1: "↓", 0: ""}

MOST_COLUMNS = 8


class Column(NamedTuple):
    """One figure.

    Attributes:
        figure: its name among the scalars.
        topic: what it is about, in a word or two.
        heading: short.
        percent: it is a share in [0, 1], written in percent.
        better: 1 if more is better, -1 if less is, 0 if neither.
        meaning: one or two sentences for a newcomer.
    """

    figure: str
    topic: str
    heading: str
    percent: bool
    better: int
    meaning: str

    @property
    def titled(self) -> str:
        """The heading and which way is better."""
        return f"{self.heading} {ARROWS[self.better]}".rstrip()

    def text(self, value: float | None) -> str:
        """A value as it is printed; that of no value is a dash."""
        if value is None:
            return "–"
        if self.percent:
            return f"{100 * value:.1f}%"
        return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"

    def error_text(self, error: float | None) -> str:
        """The standard error of a value, in its unit; that of none is empty."""
        if error is None:
            return ""
        return f"±{100 * error:.1f}" if self.percent else f"±{error:.2f}" if error >= 0.005 else f"±{error:.1g}"


def columns(settings: EvaluationSettings, figures: Iterable[str]) -> tuple[Column, ...]:
    """The columns of the figures that were measured with these settings, in the order of a table."""
    present = list(dict.fromkeys(figures))
    known = {column.figure: column for column in _known(settings)}
    others = [_out_of_distribution(name) or _unknown(name) for name in present if name not in known]
    return tuple([column for name, column in known.items() if name in present] + others)


def crowded(shown: Sequence[Column]) -> bool:
    """Whether there are too many figures to be columns: then they are rows, under their topics."""
    return len(shown) > MOST_COLUMNS


def topics(shown: Iterable[Column]) -> dict[str, list[Column]]:
    """The figures by their topics."""
    found: dict[str, list[Column]] = {}
    for column in shown:
        found.setdefault(column.topic, []).append(column)
    return found


def best(column: Column, rows: Mapping[str, Mapping[str, Figure]]) -> set[str]:
    """The names of the rows that are best in a column as printed; equal texts are equally good; none if all are."""
    values = {name: figures.get(column.figure, Figure(None)).mean for name, figures in rows.items()}
    present = {name: value for name, value in values.items() if value is not None}
    if column.better == 0 or len(present) < 2:
        return set()
    top = max(present.values(), key=lambda value: column.better * value)
    winners = {name for name, value in present.items() if column.text(value) == column.text(top)}
    return winners if len(winners) < len(rows) else set()


def _known(settings: EvaluationSettings) -> tuple[Column, ...]:
    starts = "a random start" if settings.restarts == 1 else f"each of {settings.restarts} random starts"
    attack = f"projected gradient descent, {settings.steps} steps from {starts}"
    linf, l2 = f"L∞ {settings.linf_epsilon:g}", f"L2 {settings.l2_epsilon:g}"
    few = f"on {settings.strong_limit} samples at most"
    radius = settings.linf_epsilon if settings.attribution_epsilon is None else settings.attribution_epsilon
    moved = f"before and after an attack within L∞ {radius:g} that leaves the prediction as it is"
    return (
        Column("accuracy", GENERAL, "accuracy", True, 1, "Samples classified rightly."),
        Column(
            "worst_group_accuracy",
            GENERAL,
            "worst group",
            True,
            1,
            "The accuracy on that group of the samples on which it is lowest.",
        ),
        Column(
            "spurious_gap",
            GENERAL,
            "spurious gap",
            True,
            0,
            "Accuracy on the images of a class that rank highest by a spurious feature, less that on the lowest: the "
            "closer to 0, the less the model leans on it.",
        ),
        Column(
            "ece",
            GENERAL,
            "ECE",
            True,
            -1,
            "Expected calibration error: by how much the confidence, the largest probability, misses the accuracy.",
        ),
        Column(
            "linf_accuracy",
            GENERAL,
            f"PGD {linf}",
            True,
            1,
            f"Samples still classified rightly after every pixel was moved by up to {settings.linf_epsilon:g} (black "
            f"is 0, white is 1) in the worst way that was found: {attack}.",
        ),
        Column(
            "l2_accuracy",
            GENERAL,
            f"PGD {l2}",
            True,
            1,
            f"The same when the change as a whole may have a Euclidean length of up to {settings.l2_epsilon:g}.",
        ),
        Column(
            "autoattack_linf_accuracy",
            GENERAL,
            f"AutoAttack {linf}",
            True,
            1,
            f"The same under several attacks, one without gradients among them; {few}.",
        ),
        Column(
            "autoattack_l2_accuracy",
            GENERAL,
            f"AutoAttack {l2}",
            True,
            1,
            f"The same in the ball of Euclidean length; {few}.",
        ),
        Column(
            "square_accuracy",
            GENERAL,
            f"Square {linf}",
            True,
            1,
            f"Samples still classified rightly after a random search in the L∞ ball that sees no gradient; {few}.",
        ),
        Column(
            "masked",
            SANITY,
            "masked",
            True,
            -1,
            "Models that fail one of the checks: their gradients hide their weakness, and accuracy under PGD says too "
            "much.",
        ),
        Column(
            "leakage",
            ATTRIBUTIONS,
            "leakage",
            False,
            -1,
            "Mean length of the part of the attribution ∇ₓ f_y, the input gradient of the true class's logit, that is "
            "on the null block, which says nothing about the class. Any gradient that is merely smaller lowers it.",
        ),
        Column(
            "share",
            ATTRIBUTIONS,
            "null share",
            False,
            -1,
            "That length divided by the length of the whole attribution, sample by sample: a gradient that is merely "
            "smaller does not change it. An attribution spread evenly over both blocks has 0.71.",
        ),
        Column(
            "top_k_intersection",
            ATTRIBUTIONS,
            f"top-{settings.attribution_k}",
            True,
            1,
            f"Of the {settings.attribution_k} pixels of the largest attribution, the share that stays among them: "
            f"integrated gradients {moved}.",
        ),
        Column("kendall_tau", ATTRIBUTIONS, "Kendall's τ", False, 1, f"Rank correlation of attributions {moved}."),
        Column("spearman", ATTRIBUTIONS, "Spearman's ρ", False, 1, f"Rank correlation of attributions {moved}."),
        Column(
            "pixel_least_auc",
            ATTRIBUTIONS,
            "least relevant removed",
            False,
            1,
            "Area under the accuracy as pixels are removed, those of the smallest attribution first.",
        ),
        Column(
            "pixel_most_auc",
            ATTRIBUTIONS,
            "most relevant removed",
            False,
            -1,
            "Area under the accuracy as pixels are removed, those of the largest attribution first.",
        ),
        *_along_gradients(settings),
        Column(
            "gradient_norm",
            DENSITY,
            "‖∇ log p‖",
            False,
            0,
            "Mean length of the input gradient of the log density that the logits define: what the density penalty "
            "holds down. A property, not a goal.",
        ),
    )


def _along_gradients(settings: EvaluationSettings) -> list[Column]:
    """Of samples moved along and against a gradient of their own."""
    return [
        Column(
            f"{name}_perturbation_{way}_auc",
            ATTRIBUTIONS,
            f"accuracy along {sign}∇ {followed}",
            False,
            1 if (name, way) == ("input", "down") else 0,
            f"Area under the accuracy as each sample moves along {sign}∇ {followed} by a Euclidean length of 0 to "
            f"{settings.l2_epsilon:g}: at most {settings.l2_epsilon:g}.",
        )
        for name, followed in (("input", "f_y"), ("density", "log p"))
        for way, sign in (("down", "−"), ("up", "+"))
    ]


def _out_of_distribution(name: str) -> Column | None:
    match = re.fullmatch(r"ood_(.+?)_(.+)_(auroc|fpr95)", name)
    if match is None:
        return None
    other, score, measure = match.groups()
    meaning = {
        "auroc": f"Area under the ROC curve when {score.replace('_', ' ')} is to tell these data from {other}.",
        "fpr95": f"Share of {other} taken for these data where {score.replace('_', ' ')} accepts 95% of them.",
    }[measure]
    heading = f"{measure.upper()} {other}, {score.replace('_', ' ')}"
    return Column(name, DENSITY, heading, True, 1 if measure == "auroc" else -1, meaning)


def _unknown(name: str) -> Column:
    """A figure that nothing is known of here is shown by its name, and none is called best."""
    return Column(name, GENERAL, name.replace("_", " "), False, 0, "")
