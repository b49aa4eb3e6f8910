"""attributions: by hand, against captum, and what they must leave alone."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from rds_fast import integrated_gradients
from rds_fast.evaluation import attributions, pixel_scores
from rds_fast.evaluation.attributions import METHODS

OURS = ("input_gradient", "integrated_gradients")


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 8), nn.ReLU(), nn.Linear(8, 3))
    return nn.Sequential(*layers).to(dtype).eval()


def samples(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.rand(4, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype), torch.tensor([0, 2, 1, 2])


def test_on_a_linear_model_by_hand() -> None:
    model = nn.Linear(3, 2)
    x, y = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]), torch.tensor([0, 1])
    gradient = model.weight.detach()[y]
    torch.testing.assert_close(attributions(model, x, y, "input_gradient"), gradient)
    torch.testing.assert_close(attributions(model, x, y, "integrated_gradients"), x * gradient)


def test_integrated_gradients_of_a_square_by_hand() -> None:
    # f = x²: the mean of 2 k x / m over k = 1..m is x (m + 1) / m.
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack((x[:, 0] ** 2, 0 * x[:, 0]), 1)

    x, y = torch.tensor([[3.0]]), torch.tensor([0])
    assert attributions(Square(), x, y, "integrated_gradients", path_steps=4).item() == pytest.approx(9 * 5 / 4)


def test_our_integrated_gradients_are_captums() -> None:
    captum = pytest.importorskip("captum.attr")
    model, (x, y) = network(), samples()
    ours = attributions(model, x, y, "integrated_gradients", path_steps=20)
    theirs = captum.IntegratedGradients(model).attribute(
        x.clone().requires_grad_(), baselines=0.0, target=y, n_steps=20, method="riemann_right"
    )
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-7, atol=0)  # captum's k / m are float32
    fine = attributions(model, x, y, "integrated_gradients", path_steps=2000)
    theirs = captum.IntegratedGradients(model).attribute(x.clone().requires_grad_(), target=y, n_steps=500)
    torch.testing.assert_close(fine, theirs.detach(), rtol=0, atol=1e-3)  # two quadratures of one integral


def test_completeness_for_the_logit() -> None:
    model, (x, y) = network(), samples()
    whole = integrated_gradients(model, x, y, 0.25, steps=4000, of="target_logit").flatten(1).sum(1)
    with torch.no_grad():
        change = (model(x) - model(torch.full_like(x, 0.25))).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(whole, change, rtol=0, atol=1e-3)


def test_the_relations_between_the_methods() -> None:
    pytest.importorskip("captum")
    model, (x, y) = network(), samples()
    gradient = attributions(model, x, y, "input_gradient")
    torch.testing.assert_close(attributions(model, x, y, "saliency"), gradient.abs())
    torch.testing.assert_close(attributions(model, x, y, "input_x_gradient"), x * gradient)
    torch.testing.assert_close(attributions(model, x, y, "smoothgrad", noise=1e-9, noise_samples=3), gradient)
    deeplift = attributions(model, x, y, "deeplift")
    with torch.no_grad():
        change = (model(x) - model(torch.zeros_like(x))).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(deeplift.flatten(1).sum(1), change)  # its summation-to-delta


def test_smoothgrad_is_decided_by_its_seed_and_leaves_the_generator_alone() -> None:
    pytest.importorskip("captum")
    model, (x, y) = network(), samples()
    state = torch.get_rng_state()
    one = attributions(model, x, y, "smoothgrad", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, attributions(model, x, y, "smoothgrad", seed=1))
    assert not torch.equal(one, attributions(model, x, y, "smoothgrad", seed=2))


@pytest.mark.parametrize("method", METHODS)
def test_model_and_input_are_left_as_they_were(method: str) -> None:
    if method not in OURS:
        pytest.importorskip("captum")
    model, (x, y) = network(), samples()
    before = x.clone()
    with torch.no_grad():
        attribution = attributions(model, x, y, method)
    assert attribution.shape == x.shape
    assert not attribution.requires_grad
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_without_captum_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setitem(sys.modules, "captum", None)
    model, (x, y) = network(), samples()
    with pytest.raises(ImportError, match="pip install"):
        attributions(model, x, y, "saliency")
    assert attributions(model, x, y, "input_gradient").shape == x.shape


def test_wrong_names_are_named_with_the_nearest() -> None:
    model, (x, y) = network(), samples()
    with pytest.raises(ValueError, match="did you mean 'saliency'"):
        attributions(model, x, y, "salience")
    with pytest.raises(ValueError, match="of is 'logit'"):
        integrated_gradients(model, x, y, 0.0, of="logit")


def test_pixel_scores_sum_magnitudes_over_channels() -> None:
    attribution = torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.5]]]])
    assert pixel_scores(attribution).tolist() == [[4.0, 2.5]]
    assert pixel_scores(torch.tensor([[1.0, -2.0]])).tolist() == [[1.0, 2.0]]
