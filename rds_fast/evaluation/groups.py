"""Accuracy group by group: what an average hides (Sagawa et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..training import data
from .accuracy import classified_rightly
from .results import Results
from .samples import batches_of
from .settings import EvaluationSettings


def group_accuracies(right: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The accuracy of each group.

    Args:
        right: (N,), bool: the sample is classified rightly.
        groups: (N,), integers in [0, count).
        count: how many groups there are.

    Returns:
        accuracy (count,), float64, NaN for a group without samples; and samples (count,), int64.

    Raises:
        ValueError: shapes do not fit, or a group is out of range.
    """
    if right.dim() != 1 or groups.shape != right.shape:
        raise ValueError(
            f"right has shape {tuple(right.shape)} and groups {tuple(groups.shape)}; both must be (N,), one a sample"
        )
    if len(groups) and (int(groups.min()) < 0 or int(groups.max()) >= count):
        raise ValueError(
            f"groups run from {int(groups.min())} to {int(groups.max())}; with {count} groups they must be in "
            f"[0, {count})"
        )
    samples = torch.bincount(groups, minlength=count)
    hits = torch.bincount(groups[right.bool()], minlength=count)
    return hits.double() / samples.double(), samples


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``worst_group_accuracy``, and each group's accuracy as a table; a note names the worst group.

    Data without groups have None for the worst group's accuracy, and a note.
    """
    if split.group_names is None:
        return Results({"worst_group_accuracy": None}, notes=("These data have no groups.",))
    right, groups = [], []
    for batch in batches_of(split, settings.batch_size):
        assert batch.groups is not None  # a split has both groups and names, or neither
        right.append(classified_rightly(model, data.in_unit_interval(batch.images), batch.labels))
        groups.append(batch.groups)
    accuracies, samples = group_accuracies(torch.cat(right), torch.cat(groups), len(split.group_names))
    rows = [
        {"group": name, "samples": number, "accuracy": accuracy if number else None}
        for name, number, accuracy in zip(split.group_names, samples.tolist(), accuracies.tolist(), strict=True)
    ]
    worst = min((row for row in rows if row["samples"]), key=lambda row: row["accuracy"])
    note = f"The worst group is {worst['group']}: {100 * worst['accuracy']:.1f}% of {worst['samples']} samples."
    return Results({"worst_group_accuracy": worst["accuracy"]}, tables={"groups": rows}, notes=(note, *_empty(rows)))


def _empty(rows: list[dict]) -> tuple[str, ...]:
    """A note on each group that has no samples here, and so no accuracy."""
    return tuple(f"The group {row['group']} has no samples here." for row in rows if not row["samples"])
