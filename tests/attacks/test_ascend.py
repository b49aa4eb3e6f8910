"""ascend: objectives of one's own, those that hold a gradient among them; what it must leave alone, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rds_fast
from rds_fast.attacks import ascend, pgd


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).to(
        dtype
    )


def images(samples: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(samples, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gradient_size(model: nn.Module, x: Tensor) -> Tensor:
    """‖∇ log Σ exp f(x)‖₂² of each sample: an objective that is a gradient itself."""
    (gradient,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def test_it_is_pgd_of_any_objective() -> None:
    assert rds_fast.evaluation.pgd is pgd
    model, x, y = network(), images(), torch.tensor([0, 1, 2, 0])
    for norm in ("linf", "l2"):
        ours = ascend(
            lambda moved: nn.functional.cross_entropy(model(moved), y, reduction="none"),
            x,
            0.1,
            norm=norm,
            steps=5,
            generator=torch.Generator().manual_seed(3),
        )
        assert torch.equal(ours, pgd(model, x, y, 0.1, norm=norm, steps=5, generator=torch.Generator().manual_seed(3)))


def test_one_step_against_the_formula() -> None:
    """x + a sign ∇ and x + a ∇/‖∇‖, of an objective whose gradient is known: Σ c x²."""
    x, c = images(), torch.linspace(-1, 2, 36, dtype=torch.float64).view(1, 6, 6)
    gradient = 2 * c * x

    def objective(moved: Tensor) -> Tensor:
        return (c * moved.square()).flatten(1).sum(1)

    settings: dict[str, Any] = {"steps": 1, "random_start": False, "bounds": (-math.inf, math.inf)}
    moved = ascend(objective, x, 0.1, step_size=0.05, **settings)
    torch.testing.assert_close(moved, x + 0.05 * gradient.sign(), rtol=0, atol=1e-15)
    moved = ascend(objective, x, 1.0, norm="l2", step_size=0.5, **settings)
    length = gradient.flatten(1).norm(dim=1).view(4, 1, 1, 1)
    torch.testing.assert_close(moved, x + 0.5 * gradient / length, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fast", [True, False])
def test_an_objective_that_is_a_gradient(fast: bool) -> None:
    """Each step against autograd twice, in plain PyTorch; and the objective grows."""
    model, x = network(), images()

    def objective(moved: Tensor) -> Tensor:
        if not fast:
            return gradient_size(model, moved)
        with rds_fast.fast_double_backward():
            return gradient_size(model, moved)

    moved = ascend(objective, x, 0.1, steps=3, step_size=0.03, random_start=False)
    expected = x.clone()
    for _ in range(3):
        leaf = expected.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(gradient_size(model, leaf).sum(), leaf)
        expected = (expected + 0.03 * gradient.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-15)
    before, after = (gradient_size(model, point.clone().requires_grad_()) for point in (x, moved))
    assert (after > before).all()


def test_each_sample_climbs_alone() -> None:
    """The objectives' sum is what is differentiated: no sample's step depends on another's."""
    model, x, y = network(), images(), torch.tensor([0, 1, 2, 0])

    def climb(x: Tensor, y: Tensor) -> Tensor:
        return pgd(model, x, y, 0.1, norm="l2", steps=4, random_start=False)

    torch.testing.assert_close(climb(x, y)[1:2], climb(x[1:2], y[1:2]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_trace_is_left(context: Any) -> None:
    model = network()
    x = images().requires_grad_()
    with context():
        moved = ascend(lambda moved: gradient_size(model, moved), x, 0.1, steps=2)
    assert not moved.requires_grad
    assert not moved.is_inference()
    assert x.grad is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_memory_format_and_meta() -> None:
    x = images().expand(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    for norm in ("linf", "l2"):
        moved = ascend(lambda moved: moved.square().flatten(1).sum(1), x, 0.1, norm=norm, steps=2)
        assert moved.is_contiguous(memory_format=torch.channels_last)
        seen = []
        ascend(lambda moved: (seen.append(moved), moved.flatten(1).sum(1))[1], x, 0.1, norm=norm, steps=2)  # noqa: B023
        assert all(moved.is_contiguous(memory_format=torch.channels_last) for moved in seen)
        assert ascend(lambda moved: moved.flatten(1).sum(1), x.to("meta"), 0.1, norm=norm, steps=2).shape == x.shape


def test_the_backward_is_outside_autocast() -> None:
    """As PyTorch asks for: the objective's forward is inside, in bfloat16."""
    model, x = network(torch.float32), images(dtype=torch.float32)
    seen: list[tuple[torch.dtype, bool]] = []

    def objective(moved: Tensor) -> Tensor:
        logits = model(moved)
        logits.register_hook(lambda g: seen.append((logits.dtype, torch.is_autocast_enabled("cpu"))))
        return logits.float().logsumexp(1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved = ascend(objective, x, 0.1, steps=1)
    assert seen == [(torch.bfloat16, False)]
    assert moved.dtype == torch.float32


def test_float16_gradients_below_its_least_number_are_followed() -> None:
    """The gradient is 1e-8 a coordinate, which float16 would round to 0: its least number is 6e-8."""
    x = torch.full((2, 8), 0.5, dtype=torch.float16)
    scale = torch.full((), 1e-4, dtype=torch.float16)
    moved = ascend(lambda moved: (moved * scale * scale).sum(1), x, 0.125, steps=4, random_start=False)
    torch.testing.assert_close(moved, torch.full_like(x, 0.625), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "floating"),
        ({"x": torch.tensor(0.5)}, ValueError, r"shape \(N, \.\.\.\)"),
        ({"x": torch.full((2, 3), -0.5)}, ValueError, "bounds"),
        ({"norm": "l1"}, ValueError, "'linf' or 'l2'"),
        ({"epsilon": torch.tensor(0.1)}, TypeError, "epsilon is a Tensor"),
        ({"epsilon": math.nan}, ValueError, "epsilon"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"steps": 2.5}, TypeError, "steps is 2.5"),
        ({"steps": True}, TypeError, "steps is True"),
        ({"step_size": -1.0}, ValueError, "step_size"),
        ({"step_size": "large"}, TypeError, "step_size"),
        ({"bounds": (1.0, 1.0)}, ValueError, "bounds"),
        ({"bounds": (0.0, 0.5, 1.0)}, TypeError, "two numbers"),
        ({"bounds": "01"}, TypeError, "two numbers"),
        ({"bounds": (0.0, "1")}, TypeError, "a bound is '1'"),
        ({"objective": lambda moved: moved.sum()}, ValueError, r"shape \(\); it must be \(2,\)"),
        ({"objective": lambda moved: moved.detach().sum(1)}, RuntimeError, "does not depend differentiably"),
        ({"objective": lambda _: torch.ones(2, requires_grad=True)}, RuntimeError, "does not depend differentiably"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"objective": lambda moved: moved.sum(1), "x": torch.rand(2, 3), "epsilon": 0.1, "steps": 2, **change}
    with pytest.raises(error, match=message):
        ascend(**arguments)


def test_what_is_not_finite_is_not_hidden() -> None:
    moved = ascend(lambda moved: (moved - 2.0).sqrt().sum(1), torch.rand(2, 3), 0.1, steps=2)
    assert moved.isnan().all()
