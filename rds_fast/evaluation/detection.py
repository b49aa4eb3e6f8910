"""How well a score tells two kinds of samples apart: positives, which ought to score high, from negatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The area under the receiver operating characteristic of a score.

    That is the probability that a positive scores higher than a negative, a tie counting half (Mann & Whitney 1947):

        AUROC = (Σ_ij [p_i > n_j] + ½ [p_i = n_j]) / (P · N),

    in [0, 1]; ½ for a score that says nothing. Counted in O((P + N) log N) from the negatives in order.

    Args:
        positive: (P,), the scores of the positives, P ≥ 1; infinite ones are welcome.
        negative: (N,), those of the negatives, N ≥ 1.

    Raises:
        ValueError: there are no positives or no negatives, or a score is NaN.
    """
    positive, negative = _check_scores(positive, negative)
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive)  # negatives less than each positive
    not_above = torch.searchsorted(ordered, positive, right=True)
    return float((below + not_above).sum().double() / (2.0 * len(positive) * len(negative)))


def fpr_at_tpr(positive: Tensor, negative: Tensor, tpr: float = 0.95) -> float:
    """The share of negatives that are let in where at least ``tpr`` of the positives are.

    A sample is let in if its score is at least the threshold t, and t is the highest that lets in the share ``tpr`` of
    the positives: the ⌈tpr · P⌉-th largest of their scores. Ties at t are let in, negatives and positives alike.

    Args:
        positive: (P,), the scores of the positives, P ≥ 1; infinite ones are welcome.
        negative: (N,), those of the negatives, N ≥ 1.
        tpr: the true-positive rate, in (0, 1].

    Returns:
        The false-positive rate, in [0, 1].

    Raises:
        ValueError: there are no positives or no negatives, a score is NaN, or tpr is out of range.
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr is {tpr}; it must be above 0 and at most 1")
    positive, negative = _check_scores(positive, negative)
    # 0.07 · 100 is 7.000000000000001: the rounding of a product must not ask for one positive more.
    needed = max(1, math.ceil(tpr * len(positive) * (1 - 1e-12)))
    threshold = positive.sort(descending=True).values[needed - 1]
    return float((negative >= threshold).double().mean())


def _check_scores(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, to which every floating score converts exactly."""
    for name, scores in (("positive", positive), ("negative", negative)):
        if scores.dim() != 1 or len(scores) == 0:
            raise ValueError(f"{name} has shape {tuple(scores.shape)}; it must be (samples,), with at least one score")
        if bool(scores.isnan().any()):
            raise ValueError(
                f"{name} holds NaN at {int(scores.isnan().sum())} of {len(scores)} samples; a score is a number"
            )
    return positive.detach().double(), negative.detach().double()
