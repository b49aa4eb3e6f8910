"""Calibration: whether a classifier that is 80% sure is right 80% of the time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..reference import accumulation_dtype
from ..training import data
from .results import Curve, Results
from .samples import batches_of
from .settings import EvaluationSettings

BINS = 15


class Reliability(NamedTuple):
    """Samples binned by confidence, bin b of B the confidences in (b/B, (b+1)/B]; each (B,), in float64.

    Attributes:
        samples: how many fell into the bin.
        confidence: their mean confidence; NaN where there are none.
        accuracy: the share of them classified rightly; NaN where there are none.
    """

    samples: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def expected_calibration_error(self) -> Tensor:
        """Σ_b (n_b / N) |accuracy_b − confidence_b|, a scalar; NaN without samples."""
        gap = torch.where(self.samples > 0, (self.accuracy - self.confidence).abs(), 0.0)
        return (self.samples * gap).sum() / self.samples.sum()


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """The reliability diagram (DeGroot & Fienberg 1983) of the largest probability of each sample.

    A bin holds its upper end and not its lower (Guo et al. 2017), so that a confidence of exactly 1 falls into the
    last bin with its neighbours; a confidence of 0, which only one without classes could have, into the first.

    Args:
        probabilities: (N, C), floating, in [0, 1]: softmax of the logits.
        labels: (N,), class indices.
        bins: how many, of equal width.

    Raises:
        TypeError: probabilities are not floating.
        ValueError: shapes do not fit, bins is below 1, or a probability is NaN or outside [0, 1].
    """
    _check_probabilities(probabilities, labels, bins)
    confidence, predicted = probabilities.max(1)
    confidence = confidence.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    bin_of = torch.bucketize(confidence, edges[1:-1])
    one_hot = torch.nn.functional.one_hot(bin_of, bins).double()
    samples = one_hot.sum(0)
    accuracy = (predicted == labels).double() @ one_hot / samples
    return Reliability(samples, confidence @ one_hot / samples, accuracy)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Tensor:
    """The mean gap between confidence and accuracy over bins of confidence, a scalar (Naeini et al. 2015).

    With n_b samples, mean confidence c_b and accuracy a_b in bin b, ECE = Σ_b (n_b / N) |a_b − c_b| in [0, 1]: 0 for a
    classifier whose confidence is its accuracy, in every bin. NaN without samples. Arguments and errors as of
    ``reliability``.
    """
    return reliability(probabilities, labels, bins).expected_calibration_error


@torch.no_grad()
def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``ece``, the expected calibration error over 15 bins; the reliability curve, and its bins as a table."""
    probabilities, labels = [], []
    for batch in batches_of(split, settings.batch_size):
        logits = model(data.in_unit_interval(batch.images))
        probabilities.append(logits.to(accumulation_dtype(logits.dtype)).softmax(1))
        labels.append(batch.labels)
    found = reliability(torch.cat(probabilities), torch.cat(labels))
    rows = [
        {"from": index / BINS, "to": (index + 1) / BINS, "samples": int(samples), "confidence": mean, "accuracy": share}
        for index, (samples, mean, share) in enumerate(zip(*(column.tolist() for column in found), strict=True))
        if samples
    ]
    curve = Curve(
        "confidence", "accuracy", tuple(row["confidence"] for row in rows), tuple(row["accuracy"] for row in rows)
    )
    error = float(found.expected_calibration_error)
    return Results({"ece": None if math.isnan(error) else error}, {"reliability": curve}, {"reliability": rows})


def _check_probabilities(probabilities: Tensor, labels: Tensor, bins: int) -> None:
    if not probabilities.is_floating_point():
        raise TypeError(f"probabilities are {probabilities.dtype}; they must be floating")
    if probabilities.dim() != 2 or probabilities.shape[1] == 0 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities have shape {tuple(probabilities.shape)} and labels {tuple(labels.shape)}; "
            "they must be (N, C), C 1 or more, and (N,)"
        )
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be 1 or more")
    if not bool(((probabilities >= 0) & (probabilities <= 1 + 1e-6)).all()):
        raise ValueError("probabilities leave [0, 1] or hold NaN; pass logits.softmax(1), not the logits")
