"""feature_leakage, by hand; and the attribution it is measured on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rds_fast.evaluation import feature_leakage, input_gradient


def test_by_hand() -> None:
    attribution = torch.tensor([[3.0, 4.0, 0.0, 12.0], [1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    null_mask = torch.tensor([[True, True, False, False], [True, True, False, False], [False, False, True, True]])
    absolute, share = feature_leakage(attribution, null_mask)
    torch.testing.assert_close(absolute, torch.tensor([5.0, math.sqrt(2), 0.0]))
    torch.testing.assert_close(share, torch.tensor([5 / 13, math.sqrt(0.5), 0.0]))


@settings(deadline=None)
@given(scale=st.sampled_from([1e-42, 1e-30, 1e-3, 7.0, 1e15, 1e30]), seed=st.integers(0, 100))
def test_the_share_does_not_depend_on_the_scale_and_the_absolute_is_proportional(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Powers of two, so that scaling by a denormal factor rounds nothing.
    scale = 2.0 ** round(math.log2(scale))
    attribution = torch.randint(-8, 9, (4, 2, 3, 3), generator=generator).float()
    attribution[:, 0, 0, 0] = 1.0
    null_mask = torch.rand((4, 1, 3, 3), generator=generator) < 0.5
    absolute, share = feature_leakage(attribution, null_mask)
    scaled_absolute, scaled_share = feature_leakage(attribution * scale, null_mask)
    torch.testing.assert_close(scaled_share, share)
    torch.testing.assert_close(scaled_absolute, absolute * scale, rtol=1e-5, atol=1e-44)
    assert ((share >= 0) & (share <= 1)).all()


def test_masks_of_every_accepted_shape_agree() -> None:
    attribution = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.arange(4)[:, None].expand(4, 5) < 2
    expected = feature_leakage(attribution, rows.expand(3, 2, 4, 5))
    assert expected[0].dtype == torch.float64
    for mask in (rows.expand(2, 4, 5), rows.expand(1, 4, 5), rows.expand(3, 1, 4, 5), rows.expand(1, 1, 4, 5)):
        absolute, share = feature_leakage(attribution, mask)
        assert torch.equal(absolute, expected[0])
        assert torch.equal(share, expected[1])


def test_a_zero_attribution_has_no_share() -> None:
    absolute, share = feature_leakage(torch.zeros(2, 3), torch.tensor([True, False, False]))
    assert torch.equal(absolute, torch.zeros(2))
    assert share.isnan().all()


def test_16_bit_attributions_are_measured_in_float32() -> None:
    absolute, share = feature_leakage(torch.full((1, 4), 300.0, dtype=torch.float16), torch.ones(4, dtype=torch.bool))
    assert absolute.dtype == share.dtype == torch.float32
    assert absolute.item() == 600.0


@pytest.mark.parametrize(
    ("attribution", "mask", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool), TypeError, "floating"),
        (torch.zeros(2, 3), torch.ones(2, 3), TypeError, "bool"),
        (torch.zeros(2), torch.ones(2, dtype=torch.bool), ValueError, "N samples"),
        (torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool), ValueError, r"\(2, 3\)"),
        (torch.zeros(2, 3, 4, 4), torch.ones(4, 4, dtype=torch.bool), ValueError, r"\(4, 4\)"),
        (torch.zeros(3, 3, 4, 4), torch.ones(3, 4, 4, dtype=torch.bool), ValueError, "ambiguous"),
    ],
)
def test_wrong_input_is_named(attribution, mask, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        feature_leakage(attribution, mask)


def test_the_attribution_is_the_gradient_of_the_true_class_logit() -> None:
    model = nn.Linear(3, 2)
    gradient = input_gradient(model, torch.rand(4, 3), torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(gradient, model.weight.detach()[[0, 1, 1, 0]])
    assert model.weight.grad is None
