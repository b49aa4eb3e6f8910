"""Pixel perturbation: what is removed, by hand; the curves and areas, by hand and against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rds_fast.evaluation import remove_pixels
from rds_fast.evaluation.pixel_perturbation import area, measure
from rds_fast.evaluation.results import Curve
from rds_fast.evaluation.settings import EvaluationSettings
from rds_fast.training.data import Images


def test_removal_by_hand() -> None:
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]]])
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    most = remove_pixels(x, scores, 0.5, order="most")  # pixels 0 and 2 of both channels; kept: 2, 4 and 20, 40
    assert most.tolist() == [[[[3.0, 2.0], [3.0, 4.0]], [[30.0, 20.0], [30.0, 40.0]]]]
    least = remove_pixels(x, scores, 0.25, order="least", fill=0.5)
    assert least.tolist() == [[[[1.0, 0.5], [3.0, 4.0]], [[10.0, 0.5], [30.0, 40.0]]]]
    assert torch.equal(remove_pixels(x, scores, 0.0), x)
    nothing_kept = remove_pixels(x, scores, 1.0)
    assert nothing_kept[0, :, 0, 0].tolist() == [2.5, 25.0]
    assert nothing_kept[0].flatten(1).var(1).tolist() == [0.0, 0.0]


def test_vectors_have_a_pixel_a_value_and_equal_scores_go_in_order() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    assert remove_pixels(x, torch.zeros(1, 4), 0.5, fill=0.0).tolist() == [[0.0, 0.0, 3.0, 6.0]]
    assert remove_pixels(x, torch.zeros(1, 4), 0.5, order="least", fill=0.0).tolist() == [[0.0, 0.0, 3.0, 6.0]]
    assert remove_pixels(x, torch.zeros(1, 4), 0.25).tolist() == [[pytest.approx(11 / 3), 2.0, 3.0, 6.0]]


@settings(deadline=None)
@given(
    ratio=st.floats(0, 1), size=st.integers(1, 40), seed=st.integers(0, 1000), order=st.sampled_from(["most", "least"])
)
def test_as_many_pixels_are_removed_as_was_said_and_the_kept_stay(
    ratio: float, size: int, seed: int, order: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, scores = torch.rand(3, 2, size, generator=generator), torch.rand(3, size, generator=generator)
    removed = remove_pixels(x, scores, ratio, order=order, fill=-1.0)
    gone = removed[:, 0] == -1
    assert (gone.sum(1) == round(ratio * size)).all()
    assert torch.equal(removed[:, 1] == -1, gone)
    assert torch.equal(removed.masked_fill(gone[:, None], 0), x.masked_fill(gone[:, None], 0))
    for row, mask in zip(scores, gone, strict=True):
        if mask.any() and not mask.all():
            one, other = row[mask], row[~mask]
            assert one.min() >= other.max() if order == "most" else one.max() <= other.min()
    # The mean of the kept ones leaves each channel's mean over them as it was.
    filled = remove_pixels(x, scores, ratio, order=order)
    kept = ~gone if not gone.all() else torch.ones_like(gone)
    expected = (x * kept[:, None]).sum(2) / kept.sum(1, keepdim=True)
    torch.testing.assert_close(filled.mean(2), expected)


def test_no_samples_channels_last_and_16_bits() -> None:
    assert remove_pixels(torch.zeros(0, 3, 2, 2), torch.zeros(0, 4), 0.5).shape == (0, 3, 2, 2)
    generator = torch.Generator().manual_seed(0)
    x, scores = torch.rand(2, 3, 4, 4, generator=generator), torch.rand(2, 16, generator=generator)
    expected = remove_pixels(x, scores, 0.3)
    assert torch.equal(remove_pixels(x.contiguous(memory_format=torch.channels_last), scores, 0.3), expected)
    half = remove_pixels(x.half(), scores, 0.3)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2)}, r"\(2,\)"),
        ({"scores": torch.zeros(2, 5)}, r"\(2, 5\)"),
        ({"scores": torch.zeros(2, 2, 4)}, r"\(2, 2, 4\)"),
        ({"ratio": 1.5}, "ratio"),
        ({"order": "best"}, "order"),
    ],
)
def test_wrong_input_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.zeros(2, 3, 2, 2), "scores": torch.zeros(2, 4), "ratio": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        remove_pixels(**arguments)


def test_the_area_is_numpys() -> None:
    x, y = (0.0, 0.1, 0.4, 0.9), (1.0, 0.75, 0.5, 0.0)
    assert area(Curve("", "", x, y)) == pytest.approx(np.trapezoid(y, x))


class FirstPixel(nn.Module):
    """Class 1 where the first pixel is above 0.5: its logit's gradient is on that pixel alone."""

    def forward(self, x: Tensor) -> Tensor:
        first = 10 * (x.flatten(1)[:, 0] - 0.5)
        return torch.stack((-first, first), 1)


def test_curves_by_hand() -> None:
    # The first pixel decides. It is 1 or 0 and the others the opposite, so without it the prediction turns round.
    images = torch.zeros(4, 1, 2, 5)
    images[:2, 0, 0, 0] = 1
    images[2:] = 1 - images[:2]
    labels = torch.tensor([1, 1, 0, 0])
    settings = EvaluationSettings(perturbation_ratios=(0.1, 0.5, 0.9))
    results = measure(FirstPixel(), Images(images, labels, None, 2), settings)
    assert set(results.scalars) == {"pixel_most_auc", "pixel_least_auc"}
    most, least = results.curves["pixel_most_accuracy"], results.curves["pixel_least_accuracy"]
    assert most.x == least.x == (0.0, 0.1, 0.5, 0.9)
    assert most.y == (1.0, 0.0, 0.0, 0.0)
    # Nine tenths of the pixels are all that do not matter.
    assert least.y == (1.0, 1.0, 1.0, 1.0)
    assert results.scalars == {"pixel_most_auc": pytest.approx(0.05), "pixel_least_auc": pytest.approx(0.9)}
    sure = 1 / (1 + np.exp(-10))
    assert results.curves["pixel_least_probability"].y == pytest.approx((sure,) * 4)
    assert results.curves["pixel_most_probability"].y == pytest.approx((sure, 1 - sure, 1 - sure, 1 - sure))


@pytest.mark.parametrize(
    "method", ["input_gradient", "integrated_gradients", "saliency", "input_x_gradient", "deeplift"]
)
def test_batches_and_bytes_change_nothing(method: str) -> None:
    if method not in ("input_gradient", "integrated_gradients"):
        pytest.importorskip("captum")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    images = torch.randint(0, 256, (10, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Images(images, torch.arange(10) % 3, None, 3)
    settings = {"perturbation_attribution": method, "fill": "0.5", "attribution_limit": 7, "path_steps": 5}
    whole = measure(model, split, EvaluationSettings(**settings))
    parts = measure(model, split, EvaluationSettings(**settings, batch_size=2))
    floats = Images(images / 255.0, split.labels, None, 3)
    assert whole.scalars == pytest.approx(parts.scalars)
    assert whole.scalars == pytest.approx(measure(model, floats, EvaluationSettings(**settings)).scalars)
    for name, curve in whole.curves.items():
        assert curve.y == pytest.approx(parts.curves[name].y)
