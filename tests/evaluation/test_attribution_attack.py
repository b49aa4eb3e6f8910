"""attribution_attack: what it finds on a trained network, its ball, the prediction it keeps, what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rds_fast.evaluation import attribution_attack, attributions, kendall_tau, pixel_scores, top_k_intersection
from rds_fast.evaluation.attribution_attack import _SoftplusForReLU


def trained(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained to tell three noisy patterns apart, and samples that it classifies rightly."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(3, 1, 6, 6, generator=generator)
    y = torch.arange(3).repeat(20)
    x = (0.5 * patterns[y] + 0.5 * torch.rand(60, 1, 6, 6, generator=generator)).clamp(0, 1)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    model.eval()
    right = model(x).argmax(1) == y
    assert right.float().mean() > 0.9
    return model, x[right][:12], y[right][:12]


def scores(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return pixel_scores(attributions(model, x, y, "integrated_gradients", path_steps=50))


def attacked(model: nn.Module, x: Tensor, y: Tensor, epsilon: float = 0.1, seed: int = 0, **changes: object) -> Tensor:
    options = {
        "k": 8,
        "steps": 12,
        "step_size": 0.02,
        "restarts": 2,
        "path_steps": 50,
        "attack_path_steps": 5,
        **changes,
    }
    return attribution_attack(model, x, y, epsilon, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_changes_the_top_more_than_noise_does_and_leaves_predictions(seed: int) -> None:
    model, x, y = trained(seed)
    moved = attacked(model, x, y)
    noise = 2 * torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)) - 1
    before, after, random = (scores(model, each, y) for each in (x, moved, (x + 0.1 * noise).clamp(0, 1)))
    assert top_k_intersection(before, after, 8).mean() < top_k_intersection(before, random, 8).mean() - 0.1
    assert torch.equal(model(moved).argmax(1), model(x).argmax(1))


def test_what_is_kept_is_the_least_of_what_was_asked_for() -> None:
    model, x, y = trained()
    before = scores(model, x, y)
    by_top, by_tau = (
        scores(model, attacked(model, x, y, keep=keep, attack_path_steps=50), y) for keep in ("top_k", "kendall")
    )
    # As many points in the attack as here, so that it sees what is measured.
    assert (top_k_intersection(before, by_top, 8) <= top_k_intersection(before, by_tau, 8)).all()
    assert (kendall_tau(before, by_tau) <= kendall_tau(before, by_top)).all()
    assert not torch.equal(by_top, by_tau)


def test_more_restarts_find_no_less_and_softplus_finds_more() -> None:
    model, x, y = trained()
    before = scores(model, x, y)

    def found(**changes: object) -> Tensor:
        return top_k_intersection(before, scores(model, attacked(model, x, y, attack_path_steps=50, **changes), y), 8)

    one, three = found(restarts=1), found(restarts=3)
    assert (three <= one).all()  # the first begins at x, whatever follows
    assert one.mean() < found(restarts=1, softplus=None).mean()


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    epsilon=st.one_of(st.sampled_from([0.1, 0.3, 8 / 255, 1e-3, 2.0]), st.floats(1e-6, 3.0)),
    seed=st.integers(0, 1000),
)
def test_the_result_is_in_the_ball_and_the_bounds_exactly(dtype: torch.dtype, epsilon: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    x = torch.rand(4, 20, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = model(x).argmax(1)
    moved = attacked(model, x, y, epsilon, seed, k=5, steps=3, step_size=epsilon, path_steps=4, attack_path_steps=2)
    assert moved.dtype == dtype
    for difference in (moved - x, moved.double() - x.double()):
        assert difference.abs().max() <= epsilon
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert torch.equal(model(moved).argmax(1), y)


def test_where_every_step_changes_the_prediction_x_is_kept() -> None:
    class Edge(nn.Module):
        """Predicts class 0 only on a given input, to the last bit."""

        def __init__(self, x: Tensor) -> None:
            super().__init__()
            self.register_buffer("x", x)
            self.first = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            other = (x[:, None] != self.x).any(2).all(1)
            return self.first(x).relu() + torch.stack((1e3 * ~other, 1e3 * other), 1)

    torch.manual_seed(0)
    x = torch.rand(3, 5)
    model = Edge(x)
    assert model(x).argmax(1).tolist() == [0, 0, 0]
    moved = attacked(model, x, torch.zeros(3, dtype=torch.long), k=2)
    assert torch.equal(moved, x)


def test_the_seed_decides_and_no_generator_but_the_given_one_is_drawn_from() -> None:
    model, x, y = trained()
    state = torch.get_rng_state()
    one = attacked(model, x, y, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, attacked(model, x, y, seed=1))
    assert not torch.equal(attacked(model, x, y, seed=1, steps=2), attacked(model, x, y, seed=2, steps=2))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train(training)
    model[0].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(5, 9, requires_grad=True)
    with torch.no_grad():
        moved = attacked(model, x, torch.tensor([0, 1, 2, 0, 1]), k=3, steps=2)
    assert not moved.requires_grad
    assert x.grad is None
    assert all(module.training is training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not model[0].weight.requires_grad
    assert model[0].bias.grad is None
    assert torch.equal(model[3].bias.grad, torch.ones(3))


def test_epsilon_zero_no_samples_and_channels_last() -> None:
    model, x, y = trained()
    assert torch.equal(attacked(model, x, y, 0.0), x)
    assert attacked(model, x[:0], y[:0]).shape == (0, 1, 6, 6)
    colours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = colours(x).argmax(1)
    moved = attacked(colours, x, y)
    other = attacked(colours, x.contiguous(memory_format=torch.channels_last), y)
    assert not torch.equal(moved, x)
    torch.testing.assert_close(other, moved, rtol=0, atol=1e-9)


def test_one_class_and_a_zero_attribution_are_no_trouble() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.rand(3, 6)
    moved = attacked(model, x, torch.zeros(3, dtype=torch.long), k=2)
    assert (moved - x).abs().max() <= 0.1
    black = torch.zeros(2, 6)  # the baseline itself: its attribution is 0
    moved = attacked(model, black, torch.zeros(2, dtype=torch.long), k=2)
    assert torch.equal(moved, black)


@pytest.mark.parametrize(
    "relu",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        torch.relu,
        lambda z: z.relu(),
        lambda z: z.clone().relu_(),
        lambda z: torch.relu_(z.clone()),
        lambda z: F.relu_(z.clone()),
    ],
)
def test_every_spelling_of_relu_becomes_softplus(relu) -> None:
    z = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    with _SoftplusForReLU(2.0):
        result = relu(z * 1)
    torch.testing.assert_close(result, torch.log1p(torch.exp(2 * z)) / 2)
    (gradient,) = torch.autograd.grad(result.sum(), z, create_graph=True)
    torch.testing.assert_close(gradient, torch.sigmoid(2 * z))
    (curvature,) = torch.autograd.grad(gradient.sum(), z)
    torch.testing.assert_close(curvature, 2 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z))
    torch.testing.assert_close(relu(z * 1), z.clamp(min=0))  # outside it is what it was


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 5, dtype=torch.long)}, TypeError, "floating"),
        ({"x": torch.full((2, 5), 1.5)}, ValueError, "bounds"),
        ({"x": torch.full((2, 5), math.nan)}, ValueError, "NaN"),
        ({"y": torch.zeros(3, dtype=torch.long)}, ValueError, r"\(2, 5\)"),
        ({"epsilon": -1.0}, ValueError, "epsilon"),
        ({"k": 6}, ValueError, "k is 6"),
        ({"k": 0}, ValueError, "k is 0"),
        ({"steps": 0}, ValueError, "steps"),
        ({"restarts": 0}, ValueError, "restarts"),
        ({"path_steps": 0}, ValueError, "path_steps"),
        ({"attack_path_steps": 0}, ValueError, "attack_path_steps"),
        ({"step_size": 0.0}, ValueError, "step_size"),
        ({"softplus": -1.0}, ValueError, "softplus"),
        ({"keep": "topk"}, ValueError, "did you mean 'top_k'"),
        (
            {"model": nn.Linear(5, 3).requires_grad_(False).apply(lambda m: m.weight.fill_(math.nan))},
            FloatingPointError,
            "not finite",
        ),
    ],
)
def test_wrong_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"model": nn.Linear(5, 3), "x": torch.rand(2, 5), "y": torch.tensor([0, 1])}
    arguments |= {"epsilon": 0.1, "k": 2, "steps": 2, **change}
    with pytest.raises(error, match=message):
        attribution_attack(**arguments)
