"""AUROC and FPR at a TPR: by hand, against scikit-learn, and with ties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rds_fast.evaluation import auroc, fpr_at_tpr

# Few values, so that ties are many.
scores = st.lists(st.integers(-4, 4), min_size=1, max_size=40).map(lambda values: torch.tensor(values).float())


def test_by_hand() -> None:
    positive, negative = torch.tensor([3.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 4.0])
    # Of nine pairs: 3 beats 1 and 2; each 2 beats 1 and ties with 2.
    assert auroc(positive, negative) == (2 + 2 * 1.5) / 9
    assert fpr_at_tpr(positive, negative, tpr=1.0) == 2 / 3  # threshold 2
    assert fpr_at_tpr(positive, negative, tpr=0.3) == 1 / 3  # threshold 3


def test_the_extremes() -> None:
    low, high = torch.arange(10.0), torch.arange(10.0) + 10
    assert (auroc(high, low), fpr_at_tpr(high, low)) == (1.0, 0.0)
    assert (auroc(low, high), fpr_at_tpr(low, high)) == (0.0, 1.0)
    constant = torch.zeros(5)
    assert (auroc(constant, constant), fpr_at_tpr(constant, constant)) == (0.5, 1.0)
    infinite = torch.tensor([math.inf, -math.inf])
    assert auroc(infinite, torch.zeros(1)) == 0.5


def test_twenty_positives_may_lose_one_at_95_percent() -> None:
    positive = torch.arange(20.0)
    assert fpr_at_tpr(positive, torch.tensor([0.5, 1.0])) == 0.5  # the threshold is 1: ⌈0.95 · 20⌉ = 19 are let in
    assert fpr_at_tpr(torch.arange(100.0), torch.tensor([92.5, 93.0]), tpr=0.07) == 0.5  # 0.07 · 100 > 7 in floats


@settings(max_examples=200, deadline=None)
@given(positive=scores, negative=scores, tpr=st.sampled_from([0.05, 0.5, 0.8, 0.95, 1.0]))
def test_as_scikit_learn_computes_them(positive: Tensor, negative: Tensor, tpr: float) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    truth = [1] * len(positive) + [0] * len(negative)
    both = torch.cat((positive, negative)).numpy()
    assert auroc(positive, negative) == pytest.approx(metrics.roc_auc_score(truth, both), abs=1e-12)
    false_rates, true_rates, _ = metrics.roc_curve(truth, both, drop_intermediate=False)
    assert fpr_at_tpr(positive, negative, tpr) == false_rates[true_rates >= tpr - 1e-12].min()


@settings(max_examples=50, deadline=None)
@given(positive=scores, negative=scores)
def test_exchanging_the_kinds_reflects_the_area_and_scaling_does_nothing(positive: Tensor, negative: Tensor) -> None:
    area = auroc(positive, negative)
    assert auroc(negative, positive) == pytest.approx(1 - area, abs=1e-12)
    assert auroc(2.0**40 * positive, 2.0**40 * negative) == area
    assert fpr_at_tpr(2.0**40 * positive, 2.0**40 * negative) == fpr_at_tpr(positive, negative)


def test_what_is_wrong_is_named() -> None:
    some = torch.zeros(3)
    for function in (auroc, fpr_at_tpr):
        with pytest.raises(ValueError, match="negative holds NaN at 1 of 2"):
            function(some, torch.tensor([0.0, math.nan]))
        with pytest.raises(ValueError, match="positive has shape"):
            function(torch.empty(0), some)
    with pytest.raises(ValueError, match="tpr is 0"):
        fpr_at_tpr(some, some, tpr=0.0)
