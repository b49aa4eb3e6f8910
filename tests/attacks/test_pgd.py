"""pgd: its optimum on a linear model, its ball and bounds, and what it must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rds_fast.evaluation import pgd

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Linear(nn.Module):
    """Two classes, f = (0, w·x): the cross-entropy of class 0 grows along w everywhere."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight
        return torch.stack((torch.zeros_like(score), score), 1)


class BatchNormNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def perturbed(x: Tensor, epsilon: float, norm: str, bounds: tuple[float, float] = (0.0, 1.0), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(x[0].numel(), generator=generator, dtype=torch.float64).to(x.dtype)
    labels = torch.zeros(len(x), dtype=torch.long)
    return pgd(Linear(weight), x, labels, epsilon, norm=norm, steps=5, bounds=bounds, generator=generator)


def assert_inside(moved: Tensor, x: Tensor, epsilon: float, norm: str, bounds: tuple[float, float]) -> None:
    """The comparisons of a user: in x's dtype and in float64, with no tolerance."""
    for difference in (moved - x, moved.double() - x.double()):
        size = difference.abs().amax() if norm == "linf" else difference.flatten(1).norm(dim=1).amax()
        assert size <= epsilon
        assert size.item() <= epsilon
    assert moved.min() >= bounds[0]
    assert moved.max() <= bounds[1]


def test_linf_reaches_the_vertex_of_the_ball_on_a_linear_model() -> None:
    x = torch.full((4, 2, 3), 0.5, dtype=torch.float64)
    weight = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0], dtype=torch.float64)
    moved = pgd(Linear(weight), x, torch.zeros(4, dtype=torch.long), 0.125)
    torch.testing.assert_close(moved, x + 0.125 * weight.sign().view(2, 3), rtol=0, atol=0)


def test_linf_stops_at_the_bounds() -> None:
    x = torch.tensor([[0.0, 0.03, 0.97, 1.0]])
    moved = pgd(Linear(torch.tensor([-1.0, -1.0, 1.0, 1.0])), x, torch.zeros(1, dtype=torch.long), 0.1)
    assert torch.equal(moved, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))


@pytest.mark.parametrize("random_start", [True, False])
def test_l2_reaches_the_pole_of_the_ball_on_a_linear_model(random_start: bool) -> None:
    x = torch.full((4, 6), 0.5, dtype=torch.float64)
    weight = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0], dtype=torch.float64)
    labels = torch.zeros(4, dtype=torch.long)
    # On the sphere the angle to the pole shrinks by 1 + step_size/epsilon in each step.
    moved = pgd(Linear(weight), x, labels, 0.25, norm="l2", random_start=random_start, step_size=0.25)
    torch.testing.assert_close(moved, x + 0.25 * weight / weight.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    epsilon=st.one_of(st.sampled_from([0.1, 0.3, 8 / 255, 1e-3, 2.0]), st.floats(1e-6, 5.0)),
    scale=st.sampled_from([1e-4, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_result_is_in_the_ball_and_the_bounds_exactly(
    norm: str, dtype: torch.dtype, epsilon: float, scale: float, seed: int
) -> None:
    x = (scale * torch.rand(3, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)
    assert_inside(perturbed(x, epsilon, norm, seed=seed), x, epsilon, norm, (0.0, 1.0))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_ball_holds_without_bounds_far_from_zero(norm: str) -> None:
    # Far from zero the grid of float32 is coarse beside epsilon: x + epsilon rounds out of the ball in half the cases.
    x = 1000 * torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    unbounded = (-math.inf, math.inf)
    moved = perturbed(x, 0.1, norm, unbounded)
    assert_inside(moved, x, 0.1, norm, unbounded)
    assert not torch.equal(moved, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_rounding_of_a_norm_is_no_way_out_of_the_l2_ball(dtype: torch.dtype) -> None:
    # All coordinates alike and at 0, where x + δ is exact: nothing but the norm itself is rounded.
    for size in range(1, 200):
        x = torch.zeros(1, size, dtype=dtype)
        labels = torch.zeros(1, dtype=torch.long)
        moved = pgd(Linear(torch.ones(size, dtype=dtype)), x, labels, 0.1, norm="l2", steps=3, random_start=False)
        assert_inside(moved, x, 0.1, "l2", (0.0, 1.0))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_model_never_sees_inputs_outside_the_bounds(norm: str) -> None:
    model = Linear(torch.ones(4))
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    pgd(model, torch.tensor([[0.0, 0.1, 0.9, 1.0]]), torch.zeros(1, dtype=torch.long), 0.5, norm=norm, steps=10)
    assert len(seen) == 10
    assert min(x.min() for x in seen) >= 0
    assert max(x.max() for x in seen) <= 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2, 5, 7), (2, 200_000)], ids=["one value", "images", "long rows"])
def test_shapes(norm: str, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    moved = perturbed(x, 0.3, norm)
    assert moved.shape == x.shape
    assert_inside(moved, x, 0.3, norm, (0.0, 1.0))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_epsilon_zero_returns_x(norm: str) -> None:
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(perturbed(x, 0.0, norm), x)


def test_no_samples() -> None:
    moved = pgd(Linear(torch.ones(4)), torch.empty(0, 4), torch.empty(0, dtype=torch.long), 0.1)
    assert moved.shape == (0, 4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_generator_decides_the_start(norm: str) -> None:
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    assert torch.equal(perturbed(x, 0.1, norm, seed=1), perturbed(x, 0.1, norm, seed=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_random_start_is_uniform_in_the_ball(norm: str) -> None:
    # With a step of next to nothing the result is the start. In D = 3 dimensions half of the volume of a ball lies
    # within 2^(-1/3) of its radius, and half of a cube within the same share of its edge.
    x = torch.full((4000, 3), 0.5)
    moved = pgd(
        Linear(torch.ones(3)),
        x,
        torch.zeros(4000, dtype=torch.long),
        0.25,
        norm=norm,
        steps=1,
        step_size=1e-9,
        generator=torch.Generator().manual_seed(0),
    )
    difference = moved - x
    radius = difference.norm(dim=1) if norm == "l2" else difference.abs().amax(1)
    inside = (radius < 0.25 * 2 ** (-1 / 3)).float().mean().item()
    assert abs(inside - 0.5) < 4 * 0.5 / math.sqrt(4000)
    assert difference.mean(0).abs().max() < 4 * 0.25 / math.sqrt(4000)


def test_without_random_start_one_step_is_the_fast_gradient_sign() -> None:
    x = torch.full((2, 3), 0.5)
    weight = torch.tensor([1.0, -1.0, 0.0])
    moved = pgd(Linear(weight), x, torch.zeros(2, dtype=torch.long), 0.1, steps=1, step_size=0.05, random_start=False)
    torch.testing.assert_close(moved - x, 0.05 * weight.sign().expand(2, 3), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(norm: str, training: bool) -> None:
    torch.manual_seed(0)
    model = BatchNormNet().train(training)
    model[0].weight.requires_grad_(False)
    model[4].bias.grad = torch.ones(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(5, 6, requires_grad=True)
    moved = pgd(model, x, torch.tensor([0, 1, 2, 0, 1]), 0.1, norm=norm, steps=3)
    assert not moved.requires_grad
    assert x.grad is None
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert model[0].bias.grad is None
    assert torch.equal(model[4].bias.grad, torch.ones(3))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_attacks_inside_a_block_without_gradients(context) -> None:
    model = Linear(torch.ones(3))
    with context():
        x = torch.full((2, 3), 0.5)
        moved = pgd(model, x, torch.zeros(2, dtype=torch.long), 0.125)
    assert torch.equal(moved, torch.full((2, 3), 0.625))


def test_a_zero_gradient_moves_nothing_and_is_no_nan() -> None:
    x = torch.full((2, 3), 0.5)
    for norm in ("linf", "l2"):
        moved = pgd(Linear(torch.zeros(3)), x, torch.zeros(2, dtype=torch.long), 0.1, norm=norm, random_start=False)
        assert torch.equal(moved, x)


def test_a_gradient_whose_square_underflows_is_followed_by_l2() -> None:
    x = torch.full((2, 3), 0.5)
    labels = torch.zeros(2, dtype=torch.long)
    moved = pgd(Linear(torch.full((3,), 1e-30)), x, labels, 0.1, norm="l2", random_start=False)
    torch.testing.assert_close((moved - x).norm(dim=1), torch.full((2,), 0.1), rtol=1e-5, atol=0)


def test_16_bit_inputs_move_by_steps_below_their_grid() -> None:
    # Near 1 bfloat16 has steps of 1/256, and each step of the attack is 0.1 / 1000.
    x = torch.full((2, 3), 0.75, dtype=torch.bfloat16)
    model = Linear(torch.ones(3, dtype=torch.bfloat16))
    moved = pgd(model, x, torch.zeros(2, dtype=torch.long), 0.1, steps=1000, step_size=1e-4, random_start=False)
    assert (moved.float() - x.float()).min() > 0.1 - 1 / 128


def test_it_finds_no_less_than_foolbox() -> None:
    foolbox = pytest.importorskip("foolbox")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.rand(200, 1, 4, 5)
    y = model(x).argmax(1)  # every sample starts as classified rightly
    for norm, epsilon, attack in (
        ("linf", 0.05, foolbox.attacks.LinfPGD(steps=40)),
        ("l2", 0.2, foolbox.attacks.L2PGD(steps=40)),
    ):
        theirs = attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=epsilon)[2].float().mean().item()
        moved = pgd(model, x, y, epsilon, norm=norm, generator=torch.Generator().manual_seed(0))
        ours = (model(moved).argmax(1) != y).float().mean().item()
        assert 0.05 < ours < 0.95  # neither trivial: a comparison of two failures says nothing
        assert ours >= theirs - 0.01


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().flatten(1)


class Undefined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 2.0).sqrt()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "floating"),
        ({"x": torch.zeros(2, 3, dtype=torch.complex64)}, TypeError, r"pass torch\.view_as_real\(x\)"),
        ({"x": torch.full((2, 3), 1.5)}, ValueError, "bounds"),
        ({"x": torch.full((2, 3), math.nan)}, ValueError, "NaN"),
        ({"y": torch.zeros(2)}, TypeError, "class indices"),
        ({"y": torch.zeros(3, dtype=torch.long)}, ValueError, "one label a sample"),
        ({"y": torch.tensor([0, 2])}, ValueError, "0 to 1"),
        ({"y": torch.tensor([-1, 0])}, ValueError, "from -1"),
        ({"norm": "l1"}, ValueError, "'linf' or 'l2'"),
        ({"epsilon": -0.1}, ValueError, "epsilon"),
        ({"epsilon": math.inf}, ValueError, "epsilon"),
        ({"steps": 0}, ValueError, "steps"),
        ({"step_size": 0.0}, ValueError, "step_size"),
        ({"bounds": (1.0, 0.0)}, ValueError, "bounds"),
        ({"model": Detached()}, RuntimeError, "detached"),
        ({"model": Undefined(), "y": torch.tensor([0, 1])}, FloatingPointError, "not finite"),
        ({"model": nn.Flatten(0)}, ValueError, r"\(2, C\)"),
        (
            {"model": nn.Linear(3, 1)},
            ValueError,
            r"logits have shape \(2, 1\), one logit a sample, .*return two, such as",
        ),
    ],
)
def test_wrong_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"model": Linear(torch.ones(3)), "x": torch.rand(2, 3), "y": torch.zeros(2, dtype=torch.long)}
    arguments |= {"epsilon": 0.1, **change}
    with pytest.raises(error, match=message):
        pgd(**arguments)
