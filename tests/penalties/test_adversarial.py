"""Adversarial training: x', the loss and its gradients against eager PyTorch, and what is left alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import attribution_references as references
import pytest
import torch
from attribution_references import images, losses, statistics_after
from penalty_references import NETWORKS, assert_same_gradients, cnn, gradients, mlp
from torch import Tensor, nn

import rds_fast
from rds_fast import AdversarialLoss, LossTerms


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("network", NETWORKS)
def test_against_eager(network: str, label_smoothing: float) -> None:
    """In train mode, too, where the attack normalises by the statistics of its own points."""
    model, (x, y) = NETWORKS[network](), images()
    twin = copy.deepcopy(model)

    def smoothed(moved: Tensor) -> Tensor:
        return nn.functional.cross_entropy(twin(moved), y, label_smoothing=label_smoothing, reduction="none")

    moved = references.worst(smoothed, x, 0.1, steps=7, seed=3)
    terms = AdversarialLoss(0.1, generator=seeded(), label_smoothing=label_smoothing)(model, x, y)
    truth = smoothed(moved).mean()
    assert isinstance(terms, LossTerms)
    torch.testing.assert_close(terms.total, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.logits, twin(moved))
    assert terms.cross_entropy is terms.total
    assert terms.penalty == 0
    assert_same_gradients(gradients(terms.total, model), gradients(truth, twin))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_inner_maximum_is_pgds(norm: str) -> None:
    model, (x, y) = mlp(), images()
    loss = AdversarialLoss(0.3, norm=norm, steps=4, step_size=0.1, random_start=False)
    moved = rds_fast.evaluation.pgd(model, x, y, 0.3, norm=norm, steps=4, step_size=0.1, random_start=False)
    torch.testing.assert_close(loss(model, x, y).logits, model(moved), rtol=1e-12, atol=0)
    assert loss(model, x, y).total > 1.01 * losses(model, x, y).mean()


def test_epsilon_zero_is_plain_training() -> None:
    model, (x, y) = cnn(training=True), images()
    truth = losses(copy.deepcopy(model), x, y).mean()
    torch.testing.assert_close(AdversarialLoss(0.0)(model, x, y).total, truth, rtol=1e-13, atol=0)


def test_ignored_labels_and_probabilities() -> None:
    model, (x, y) = mlp(), images()
    loss = AdversarialLoss(0.1, steps=2, random_start=False)
    kept = [0, 1, 3, 5]
    truth = loss(model, x[kept], y[kept]).total
    y[[2, 4]] = -100
    torch.testing.assert_close(loss(model, x, y).total, truth, rtol=1e-13, atol=0)
    one_hot = nn.functional.one_hot(y[kept], 5).double()
    torch.testing.assert_close(loss(model, x[kept], one_hot).total, truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_left_alone(training: bool, norm: str) -> None:
    """One forward updates the statistics, that at x'; the attack leaves no gradient anywhere."""
    model, (x, y) = cnn(torch.float32, training=training), images(dtype=torch.float32)
    x.requires_grad_()
    model[0].bias.requires_grad_(False)
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    loss = AdversarialLoss(8 / 255, norm=norm, steps=3, generator=seeded())
    before = copy.deepcopy(model)
    terms = loss(model, x, y)
    handle.remove()
    assert len(seen) == 4
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(part.training is training for part in model.modules())
    buffers = statistics_after(before, seen[-1])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    terms.total.backward()
    assert x.grad is None
    assert model[0].bias.grad is None
    difference = seen[-1].double() - x.detach().double()
    radius = difference.abs().amax() if norm == "linf" else difference.flatten(1).norm(dim=1).amax()
    assert 0 < radius <= 8 / 255
    assert all(point.min() >= 0 and point.max() <= 1 for point in seen)


def test_the_generator_decides_the_start() -> None:
    """A given one, or PyTorch's own: training that is resumed with its state goes on with the same starts."""
    model, (x, y) = mlp(), images()
    state = torch.get_rng_state()
    first, again, other = (AdversarialLoss(0.1, generator=seeded(s))(model, x, y).total for s in (3, 3, 4))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    own = AdversarialLoss(0.1)
    first = own(model, x, y).total
    torch.set_rng_state(state)
    assert own(model, x, y).total == first != own(model, x, y).total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model, (x, y) = cnn(torch.float32, training=True), images(16, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        terms = AdversarialLoss(0.1, generator=seeded())(model, x, y)
    assert terms.logits.dtype == dtype
    assert terms.total.dtype == torch.float32
    truth = AdversarialLoss(0.1, generator=seeded())(cnn(torch.float32, training=True), x, y).total
    torch.testing.assert_close(terms.total, truth, rtol=0.02, atol=0)
    assert all(g.isfinite().all() for g in gradients(terms.total, model))


def test_it_trains_a_robust_model() -> None:
    """On two classes that a small robust and a large fragile feature tell apart: the fragile one is given up."""
    torch.manual_seed(0)
    y = torch.arange(64) % 2
    x = torch.rand(64, 2) * 0.2 + 0.4
    x[:, 0] += (y - 0.5) * 0.6  # robust: 0.3 either way
    x[:, 1] = 0.5 + (y - 0.5) * 0.04  # fragile: 0.02 either way, without noise
    accuracies = []
    for epsilon in (0.0, 0.1):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 2))
        with torch.no_grad():
            model[0].weight[:] = torch.tensor([[0.0, -40.0], [0.0, 40.0]])
            model[0].bias[:] = torch.tensor([20.0, -20.0])
        optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
        for _ in range(60):
            optimizer.zero_grad()
            AdversarialLoss(epsilon, steps=3)(model, x, y).total.backward()
            optimizer.step()
        moved = rds_fast.evaluation.pgd(model, x, y, 0.1, steps=5)
        accuracies.append((model(moved).argmax(1) == y).float().mean().item())
    assert accuracies[0] < 0.1
    assert accuracies[1] > 0.9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epsilon": -0.1}, ValueError, "epsilon is -0.1; it must be a finite radius, 0 or more"),
        ({"epsilon": "large"}, TypeError, "epsilon is 'large'"),
        ({"norm": "L2"}, ValueError, "norm is 'L2'; it must be 'linf' or 'l2'"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"step_size": 0}, ValueError, "step_size is 0; it must be positive"),
        ({"bounds": (1, 0)}, ValueError, "bounds are"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing is 1\.5; it must be in \[0, 1\]"),
    ],
)
def test_wrong_settings(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdversarialLoss(**{"epsilon": 0.1, **change})


def test_wrong_arguments() -> None:
    model, (x, y), loss = mlp(), images(), AdversarialLoss(0.1)
    with pytest.raises(ValueError, match=r"x leaves the bounds \(0\.0, 1\.0\)"):
        loss(model, x - 1.0, y)
    AdversarialLoss(0.1, bounds=(-math.inf, math.inf))(model, x - 1.0, y)
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        loss(model, x.long(), y)
    with pytest.raises(ValueError, match=r"y has shape \(5,\)"):
        loss(model, x, y[:5])
    with pytest.raises(IndexError, match="class indices must be in"):
        loss(model, x, y + 5)
    with pytest.raises(RuntimeError, match="does not depend differentiably"):
        loss(lambda x: model(x.detach()).detach(), x, y)
