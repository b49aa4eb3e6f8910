"""The spurious-feature gap: accuracy where a class shows its spurious features most, less that where least."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..training import data
from .accuracy import classified_rightly
from .results import Results
from .samples import batches_of
from .settings import EvaluationSettings


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``spurious_gap``, the mean of ``spurious_gaps`` over classes, and a table of the classes.

    The scores are read from the file ``spuriosity`` (see ``data.read_spuriosity``) and are those of the whole split.
    Classes of fewer than twice ``spuriosity_k`` samples are left out; None where that leaves none.

    Raises:
        FileNotFoundError, ValueError: the file is missing, or does not fit the split.
    """
    assert settings.spuriosity is not None  # the registry asks for it
    scores = data.read_spuriosity(settings.spuriosity, split)
    right = [
        classified_rightly(model, data.in_unit_interval(batch.images), batch.labels)
        for batch in batches_of(split, settings.batch_size)
    ]
    gaps = spurious_gaps(torch.cat(right), split.labels, scores, settings.spuriosity_k)
    names = split.class_names or tuple(map(str, range(split.classes)))
    table = [
        {
            "class": names[each.label],
            "samples": each.samples,
            "highest": each.highest,
            "lowest": each.lowest,
            "gap": each.gap,
        }
        for each in gaps
    ]
    mean = statistics.fmean(each.gap for each in gaps) if gaps else None
    absent = len(split.labels.unique()) - len(gaps)
    return Results({"spurious_gap": mean}, tables={"spurious_gap": table}, notes=_notes(absent, settings.spuriosity_k))


class ClassGap(NamedTuple):
    """Of one class: how many samples there are, and the accuracy on the k ranked highest and on the k lowest."""

    label: int
    samples: int
    highest: float
    lowest: float

    @property
    def gap(self) -> float:
        """In [−1, 1]."""
        return self.highest - self.lowest


def spurious_gaps(right: Tensor, labels: Tensor, scores: Tensor, k: int) -> list[ClassGap]:
    """The gap of each class that has at least 2k samples (Moayeri, Wang, Singla and Feizi 2023, spuriosity rankings).

    The samples of a class are ranked by a spuriosity score: how strongly they show the features that go with the class
    and do not define it. A model that relies on those is better on the k highest than on the k lowest.

    Args:
        right: (N,), bool: classified rightly.
        labels: (N,), class indices.
        scores: (N,), the larger the more spurious; of equal ones the first ranks lower.
        k: samples that count as highest, and as lowest.

    Returns:
        The classes in order of their index.

    Raises:
        ValueError: the shapes differ, k is less than 1, or a score is NaN.
    """
    if not right.shape == labels.shape == scores.shape or right.dim() != 1:
        shapes = ", ".join(str(tuple(values.shape)) for values in (right, labels, scores))
        raise ValueError(f"right, labels and scores have shapes {shapes}; each must be (N,)")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    if bool((scores != scores).any()):
        raise ValueError("a spuriosity score is NaN; each sample needs a number")
    gaps = []
    for label in labels.unique().tolist():
        members = labels == label
        ranked = right[members][scores[members].argsort(stable=True)].double()
        if len(ranked) >= 2 * k:
            gaps.append(ClassGap(label, len(ranked), float(ranked[-k:].mean()), float(ranked[:k].mean())))
    return gaps


def _notes(absent: int, k: int) -> tuple[str, ...]:
    if not absent:
        return ()
    return (
        f"Left out of the spurious gap: {absent} classes of fewer than {2 * k} samples. They have no {k} most spurious "
        f"and {k} other ones.",
    )
