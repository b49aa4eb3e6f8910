"""The spurious-feature gap: accuracy where a class's spurious features are strongest, less that where they are weakest."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ClassGap(NamedTuple):
    """Of one class: how many samples there are, and the accuracy on the K ranked highest and lowest."""

    label: int
    samples: int
    highest: float
    lowest: float

    @property
    def gap(self) -> float:
        return self.highest - self.lowest


def spurious_gaps(right: Tensor, labels: Tensor, scores: Tensor, k: int) -> list[ClassGap]:
    """The gap of each class that has at least 2k samples (Moayeri, Wang, Singla and Feizi 2023, spuriosity rankings).

    The samples of a class are ranked by a spuriosity score, how strongly the features show that go with the class and
    do not define it. A model that relies on them is better on the k highest than on the k lowest.

    Args:
        right: (N,), bool: classified rightly.
        labels: (N,), class indices.
        scores: (N,), the larger the more spurious; of equal ones the first ranks lower.
        k: images that count as highest, and as lowest.

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
