"""Out-of-distribution detection: the scores by hand, other data brought to a model's shape, and the metric."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from rds_fast.evaluation import auroc, fpr_at_tpr, in_distribution_scores, other_data, out_of_distribution
from rds_fast.evaluation.other_data import fit_to, load_like, parse_source
from rds_fast.evaluation.settings import EvaluationSettings
from rds_fast.training import Images, Splits


class Linear(nn.Module):
    """f = x W over two pixels, so that ∇ log p = W s."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2] @ self.weight.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_scores_by_hand(dtype: torch.dtype) -> None:
    model = Linear()
    x = torch.rand(7, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    logits = x.flatten(1).double() @ model.weight.detach().double()
    softmax = logits.exp() / logits.exp().sum(1, keepdim=True)
    with torch.no_grad():
        scores = in_distribution_scores(model, x)
    assert list(scores) == list(out_of_distribution.SCORES)
    expected = {
        "log_density": logits.exp().sum(1).log(),
        "gradient_norm": -(softmax @ model.weight.detach().double().T).norm(dim=1),
        "max_softmax": softmax.amax(1),
    }
    for name, values in expected.items():
        torch.testing.assert_close(scores[name].double(), values, rtol=1e-6, atol=1e-6)
        assert not scores[name].requires_grad
    assert model.weight.grad is None


def test_confidences_that_float32_would_tie_are_told_apart() -> None:
    scores = in_distribution_scores(Linear(), torch.tensor([[20.0, 0.0], [21.0, 0.0]]))
    assert scores["max_softmax"][0] < scores["max_softmax"][1] < 1


def test_scores_inside_inference_mode_and_their_errors() -> None:
    model, x = Linear(), torch.rand(3, 2)
    with torch.inference_mode():
        inside = in_distribution_scores(model, x)
    assert torch.equal(inside["gradient_norm"], in_distribution_scores(model, x)["gradient_norm"])
    with pytest.raises(ValueError, match="log-softmax"):
        in_distribution_scores(nn.Sequential(Linear(), nn.LogSoftmax(1)), x)
    with pytest.raises(RuntimeError, match="no gradient path"):
        in_distribution_scores(lambda x: x.detach(), x)
    with pytest.raises(TypeError, match="floating"):
        in_distribution_scores(Linear(), x.byte())


def test_other_images_take_the_shape_of_the_model_s() -> None:
    generator = torch.Generator().manual_seed(0)
    grey = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8, generator=generator)
    colour = torch.rand(2, 3, 4, 4, generator=generator)
    assert torch.equal(fit_to(grey, (1, 4, 4)), grey.float() / 255)  # bit by bit
    assert torch.equal(fit_to(colour, (3, 4, 4)), colour)
    assert torch.equal(fit_to(grey, (3, 4, 4)), (grey.float() / 255).repeat(1, 3, 1, 1))
    luma = 0.299 * colour[:, :1] + 0.587 * colour[:, 1:2] + 0.114 * colour[:, 2:]
    torch.testing.assert_close(fit_to(colour, (1, 4, 4)), luma)
    assert fit_to(colour, (3, 9, 5)).shape == (2, 3, 9, 5)
    assert fit_to(torch.ones(1, 3, 7, 7), (1, 12, 3)).unique().tolist() == pytest.approx([1.0])
    # Halving is a tent over four pixels, (1, 3, 3, 1)/8, and at the edge, where one is missing, (3, 3, 1)/7.
    edge = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4).repeat(1, 1, 4, 1)
    assert fit_to(edge, (1, 2, 2))[0, 0, 0].tolist() == pytest.approx([3 / 7, 0.0])
    with pytest.raises(ValueError, match="4 channels"):
        fit_to(torch.rand(1, 4, 2, 2), (3, 2, 2))


def reference(samples: int = 400) -> Images:
    """Dark in the first channel, bright and varied in the second."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(samples, 2, 3, 2, generator=generator)
    return Images(torch.stack((0.1 * images[:, 0], 0.6 + 0.4 * images[:, 1]), 1), torch.zeros(samples).long(), None, 3)


def test_noise() -> None:
    split = reference()
    uniform = load_like("uniform", split, 64, 0)
    assert uniform.take(torch.arange(400)).images.shape == (400, 2, 3, 2)
    assert torch.equal(uniform.images, load_like("uniform", split, 7, 0).images)
    assert not torch.equal(uniform.images, load_like("uniform", split, 64, 1).images)
    assert float(uniform.images.mean()) == pytest.approx(0.5, abs=0.02)
    noise = load_like("noise", split, 64, 0).images
    assert noise.min() >= 0
    assert noise.max() <= 1
    means, deviations = noise.mean((0, 2, 3)), noise.std((0, 2, 3))
    assert means.tolist() == pytest.approx([0.05, 0.8], abs=0.01)
    assert deviations.tolist() == pytest.approx([0.1 / math.sqrt(12), 0.4 / math.sqrt(12)], rel=0.1)


@pytest.fixture
def stripes(monkeypatch: pytest.MonkeyPatch) -> Splits:
    """A data set by the name of mnist: 30 grey images of bytes, no test split."""
    images = torch.zeros(30, 1, 6, 6, dtype=torch.uint8)
    images[:, :, ::2] = torch.arange(1, 31, dtype=torch.uint8)[:, None, None, None]
    labels = torch.arange(30) % 7
    splits = Splits(*(Images(images[:size], labels[:size], None, 7) for size in (5, 30, 0)))
    monkeypatch.setattr(other_data.data, "load", lambda name, root, **_: splits)
    return splits


def test_another_data_set_is_drawn_and_fitted(stripes: Splits) -> None:
    split = reference(20)
    split = dataclasses.replace(split, images=split.images[:, :1].expand(-1, 3, -1, -1))
    found = load_like("mnist=somewhere", split, 8, 0)  # its validation split, since it has no test split
    assert found.images.shape == (20, 3, 3, 2)  # as many as the split has
    assert found.images.dtype == torch.float32
    assert torch.equal(found.images[:, 0], found.images[:, 2])
    assert len(found.images[:, 0, 0, 0].unique()) == 20
    larger = dataclasses.replace(split, images=split.images.repeat(2, 1, 1, 1), labels=split.labels.repeat(2))
    assert len(load_like("mnist", larger, 8, 0)) == 30  # or as many as there are


def test_a_data_set_without_samples_is_refused(stripes: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_data.data, "load", lambda name, root, **_: stripes._replace(validation=stripes.test))
    with pytest.raises(ValueError, match="mnist has neither test nor validation samples"):
        load_like("mnist", reference(20), 8, 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mnsit", "did you mean 'mnist'"),
        ("noise=/tmp", "noise is made here"),
        ("svhn", "give 'svhn=FOLDER'"),
    ],
)
def test_unknown_sources_fail_before_any_work(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(ood_data=(source,))


def test_sources() -> None:
    assert parse_source("mnist") == ("mnist", None)
    assert parse_source("svhn=/data/a=b") == ("svhn", "/data/a=b")
    with pytest.raises(ValueError, match="named once"):
        EvaluationSettings(ood_data=("mnist", "mnist=/data"))
    assert EvaluationSettings(ood_data=("noise", "uniform", "mnist")).ood_data == ("noise", "uniform", "mnist")


class Brightness(nn.Module):
    """log p grows with brightness; so does the gradient's length, through the second logit."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).mean(1)
        return torch.stack((bright, 3 * bright.square()), 1)


@pytest.mark.parametrize("batch_size", [500, 33])
def test_the_metric(batch_size: int) -> None:
    split = reference(120)
    settings = EvaluationSettings(ood_data=("noise", "uniform"), batch_size=batch_size)
    results = out_of_distribution.measure(Brightness(), split, settings)
    assert len(results.scalars) == 2 * 3 * 2
    inside = in_distribution_scores(Brightness(), split.images)
    for source in ("noise", "uniform"):
        outside = in_distribution_scores(Brightness(), load_like(source, split, 50, 0).images)
        for score in out_of_distribution.SCORES:
            name = f"ood_{source}_{score}"
            assert results.scalars[f"{name}_auroc"] == pytest.approx(auroc(inside[score], outside[score]), abs=1e-3)
            expected = fpr_at_tpr(inside[score], outside[score])
            assert results.scalars[f"{name}_fpr95"] == pytest.approx(expected, abs=0.02)
            into, out = results.curves[f"{name}_in"], results.curves[f"{name}_out"]
            assert into.x == out.x
            assert sum(into.y) == pytest.approx(1)
            assert sum(out.y) == pytest.approx(1)
            mean = sum(x * y for x, y in zip(into.x, into.y, strict=True))
            width = into.x[1] - into.x[0]
            assert mean == pytest.approx(float(inside[score].double().mean()), abs=width / 2)
    assert all(0 <= value <= 1 for value in results.scalars.values())
    assert results.scalars["ood_uniform_log_density_auroc"] != 0.5


def test_the_histograms_of_a_constant_score() -> None:
    found = out_of_distribution._histograms(torch.zeros(4), torch.zeros(2), "score")
    assert sum(found["in"].y) == sum(found["out"].y) == 1
