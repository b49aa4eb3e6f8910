"""The expected calibration error: by hand, at the edges of its bins, and as torchmetrics computes it."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from rds_fast.evaluation import expected_calibration_error, reliability
from rds_fast.evaluation.calibration import measure
from rds_fast.evaluation.settings import EvaluationSettings
from rds_fast.training import Images
from rds_fast.training.extras import require_torchvision


def two_classes(confidences: list[float], right: list[bool]) -> tuple[Tensor, Tensor]:
    """Probabilities of class 0 (predicted, as long as they are above 1/2), and labels."""
    first = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack((first, 1 - first), 1), torch.tensor([0 if each else 1 for each in right])


def test_by_hand() -> None:
    # Bins of a fifth. (0.6, 0.8]: confidences 0.7 and 0.75, one right. (0.8, 1]: 0.9, right.
    probabilities, labels = two_classes([0.7, 0.75, 0.9], [True, False, True])
    found = reliability(probabilities, labels, bins=5)
    assert found.samples.tolist() == [0, 0, 0, 2, 1]
    assert found.confidence[3:].tolist() == pytest.approx([0.725, 0.9])
    assert found.accuracy[3:].tolist() == [0.5, 1.0]
    assert bool(found.accuracy[:3].isnan().all())
    expected = (2 * abs(0.5 - 0.725) + 1 * abs(1 - 0.9)) / 3
    assert float(expected_calibration_error(probabilities, labels, bins=5)) == pytest.approx(expected, rel=1e-12)


def test_a_bin_holds_its_upper_end() -> None:
    probabilities, labels = two_classes([0.75, 0.76, 1.0], [True, True, True])
    assert reliability(probabilities, labels, bins=4).samples.tolist() == [0, 0, 1, 2]
    one_class = torch.ones(3, 1)
    assert reliability(one_class, torch.zeros(3, dtype=torch.long), bins=1).samples.tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_as_torchmetrics_computes_it(dtype: torch.dtype, bins: int) -> None:
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("needs torchmetrics")
    require_torchvision("torchvision", "torchmetrics")  # which cannot import it by itself beside a CPU torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(bins)
    probabilities = (3 * torch.randn(400, 7, generator=generator, dtype=dtype)).softmax(1)
    labels = torch.randint(7, (400,), generator=generator)
    theirs = multiclass_calibration_error(probabilities, labels, num_classes=7, n_bins=bins, norm="l1")
    ours = expected_calibration_error(probabilities, labels, bins)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6)
    assert float(ours) > 0.1


def test_the_calibrated_are_told_from_the_overconfident() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]  # drawn as the model says
    assert float(expected_calibration_error(logits.softmax(1), labels)) < 0.02
    assert float(expected_calibration_error((4 * logits).softmax(1), labels)) > 0.15


def test_no_samples_have_no_error() -> None:
    assert bool(expected_calibration_error(torch.empty(0, 3), torch.empty(0, dtype=torch.long)).isnan())


class Given(nn.Module):
    """The logits are the image's first pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2]


def test_the_metric() -> None:
    # softmax(0, 1) is 0.731 sure of class 1; softmax(½, ½) is 0.5 sure of class 0.
    images = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.5, 0.5]]).view(4, 1, 1, 2)
    split = Images(images, torch.tensor([1, 1, 0, 0]), None, 2)
    for batch_size in (500, 3):
        results = measure(Given(), split, EvaluationSettings(batch_size=batch_size))
        sure = 1 / (1 + torch.tensor(-1.0).exp().item())
        expected = (3 * abs(2 / 3 - sure) + abs(1 - 0.5)) / 4
        assert results.scalars["ece"] == pytest.approx(expected, abs=1e-6)
        assert results.curves["reliability"].x == pytest.approx((0.5, sure))
        assert results.curves["reliability"].y == pytest.approx((1.0, 2 / 3))
        assert [row["samples"] for row in results.tables["reliability"]] == [1, 3]
        assert results.tables["reliability"][1]["from"] == pytest.approx(10 / 15)


def test_what_is_wrong_is_named() -> None:
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="not the logits"):
        expected_calibration_error(torch.tensor([[3.0, -1.0], [0.0, 1.0]]), labels)
    with pytest.raises(ValueError, match="NaN"):
        expected_calibration_error(torch.full((2, 2), torch.nan), labels)
    with pytest.raises(ValueError, match=r"labels \(3,\)"):
        expected_calibration_error(torch.full((2, 2), 0.5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="bins is 0"):
        expected_calibration_error(torch.full((2, 2), 0.5), labels, bins=0)
    with pytest.raises(TypeError, match="floating"):
        expected_calibration_error(torch.ones(2, 2, dtype=torch.long), labels)
