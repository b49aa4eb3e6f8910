"""Robust attribution regularisation: both losses and gradients against eager PyTorch, and the degenerate cases."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import attribution_references as references
import pytest
import torch
from attribution_references import images, losses, size_along, statistics_after
from penalty_references import NETWORKS, assert_same_gradients, cnn, gradients, mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import rds_fast
from rds_fast import AdversarialLoss, AttributionPenalty, PenalizedLoss, RobustAttributionLoss, schedules
from rds_fast.penalties import attribution

EPSILON = 0.1
COARSE: dict[str, Any] = {"path_steps": 5, "attack_path_steps": 2, "attack_steps": 3}


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CASES = [
    *itertools.product(NETWORKS, ["l1", "l2", "sum"], [None]),
    *itertools.product(NETWORKS, ["l1", "l2"], [2]),
]


@pytest.mark.parametrize(("network", "size", "layer"), CASES)
@pytest.mark.parametrize("fast", [True, False])
def test_ig_norm_against_eager(network: str, size: str, layer: int | None, fast: bool) -> None:
    """The maximum over x' of the coarse path's size, then the penalty at that x' and its gradients."""
    model, (x, y) = NETWORKS[network](), images()
    twin = copy.deepcopy(model)
    moved = references.worst(lambda z: size_along(twin, x, z, y, 2, size, layer), x, EPSILON, steps=3, seed=3)
    name = None if layer is None else str(layer)
    penalty = AttributionPenalty(EPSILON, **COARSE, size=size, layer=name, generator=seeded(), fast=fast)
    ours, truth = penalty(model, x, y), size_along(twin, x, moved, y, 5, size, layer).mean()
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=0)
    assert_same_gradients(gradients(ours, model), gradients(truth, twin))


@pytest.mark.parametrize(("network", "size", "layer"), CASES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_ig_sum_norm_against_eager(network: str, size: str, layer: int | None, label_smoothing: float) -> None:
    """In eval mode x' shares the path's forward, and in train mode it is normalised alone: one truth for both."""
    model, (x, y) = NETWORKS[network](), images()
    twin = copy.deepcopy(model)

    def total(moved: Tensor, steps: int) -> Tensor:
        smoothed = nn.functional.cross_entropy(twin(moved), y, label_smoothing=label_smoothing, reduction="none")
        return smoothed + 0.7 * size_along(twin, x, moved, y, steps, size, layer)

    moved = references.worst(lambda z: total(z, 2), x, EPSILON, steps=3, seed=3)
    name = None if layer is None else str(layer)
    settings = {**COARSE, "size": size, "layer": name, "generator": seeded(), "label_smoothing": label_smoothing}
    terms = RobustAttributionLoss(0.7, EPSILON, **settings)(model, x, y)
    truth = total(moved, 5).mean()
    torch.testing.assert_close(terms.total, truth, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms.total, terms.cross_entropy + 0.7 * terms.penalty, rtol=1e-14, atol=0)
    torch.testing.assert_close(terms.penalty, size_along(twin, x, moved, y, 5, size, layer).mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(terms.logits, twin(moved), rtol=1e-10, atol=1e-13)
    assert_same_gradients(gradients(terms.total, model), gradients(truth, twin))


def watched(loss: Callable[..., Any], model: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, list[Tensor]]:
    """The loss, and what the model's forwards were given."""
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    result = loss(model, x, y)
    handle.remove()
    return result, seen


def total_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.total


@pytest.mark.parametrize("network", NETWORKS)
def test_ig_norm_with_the_sum_at_weight_one_is_adversarial_training(network: str) -> None:
    """CE(x) + [ℓ(x') − ℓ(x)] = CE(x'): the same x' to the bit, and the loss and gradients to rounding."""
    x, y = images()
    models = [NETWORKS[network]() for _ in range(2)]
    penalized = PenalizedLoss(AttributionPenalty(EPSILON, size="sum", generator=seeded()), 1.0)
    madry = AdversarialLoss(EPSILON, generator=seeded())
    (ours, penalized_inputs), (theirs, inputs) = (
        watched(loss, model, x, y) for loss, model in zip((penalized, madry), models, strict=True)
    )
    assert torch.equal(penalized_inputs[-3], inputs[-1])  # of IG-NORM's, x' and x and the loss's own x come last
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(ours.total, models[0]), gradients(theirs.total, models[1]))


@pytest.mark.parametrize("network", NETWORKS)
def test_ig_sum_without_the_norm_is_adversarial_training(network: str) -> None:
    x, y = images()
    models = [NETWORKS[network]() for _ in range(2)]
    ours, seen = watched(RobustAttributionLoss(0.0, EPSILON, generator=seeded()), models[0], x, y)
    theirs, inputs = watched(AdversarialLoss(EPSILON, generator=seeded()), models[1], x, y)
    assert all(
        torch.equal(one, other) for one, other in zip(seen[:7], inputs[:7], strict=True)
    )  # no path in the attack
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(ours.total, models[0]), gradients(theirs.total, models[1]))
    for one, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("network", NETWORKS)
def test_ig_sum_norm_with_the_sum_has_madrys_maximum(network: str) -> None:
    """(1 + β) ℓ(x') − β ℓ(x) grows with ℓ(x'): the x' of adversarial training, whose loss it weighs otherwise."""
    x, y = images()
    models = [NETWORKS[network]() for _ in range(2)]
    ours = RobustAttributionLoss(1.0, EPSILON, size="sum", generator=seeded())(models[0], x, y)
    theirs = AdversarialLoss(EPSILON, generator=seeded())(models[1], x, y)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-12, atol=1e-14)
    truth = 2.0 * theirs.total - losses(models[1], x, y).mean()
    assert_same_gradients(gradients(ours.total, models[0]), gradients(truth, models[1]))


def test_the_sum_is_the_riemann_sums_limit() -> None:
    """CE(x) + Σ IG over m points: its gradients approach adversarial training's, twice as near for twice m."""
    model, (x, y) = mlp(), images()
    moved = watched(AdversarialLoss(EPSILON, generator=seeded()), model, x, y)[1][-1]
    truth = torch.cat([g.flatten() for g in gradients(losses(model, moved, y).mean(), model)])
    errors = []
    for steps in (20, 40, 80):
        path = rds_fast.integrated_gradients(model, moved, y, x, steps=steps, create_graph=True)
        total = losses(model, x, y).mean() + path.flatten(1).sum(1).mean()
        errors.append((torch.cat([g.flatten() for g in gradients(total, model)]) - truth).norm() / truth.norm())
    assert errors[-1] < 0.01
    assert all(abs(coarse / fine - 2.0) < 0.1 for coarse, fine in itertools.pairwise(errors))


def test_the_size_bounds_the_loss_difference() -> None:
    """|Σ IG| ≤ ‖IG‖₁, up to the Riemann error, and ‖IG‖₂ ≤ ‖IG‖₁; the attack raises its own size above Madry's."""
    model, (x, y) = mlp(), images()
    sizes = {
        kind: AttributionPenalty(EPSILON, path_steps=200, attack_steps=20, size=kind, generator=seeded())(model, x, y)
        for kind in ("l1", "l2", "sum")
    }
    assert sizes["sum"] < sizes["l1"]
    assert sizes["l2"] < sizes["l1"]
    moved = rds_fast.evaluation.pgd(model, x, y, EPSILON, steps=20, generator=seeded())
    madry = rds_fast.integrated_gradients(model, moved, y, x, steps=200).flatten(1).abs().sum(1).mean()
    assert sizes["l1"] > madry


@pytest.mark.parametrize("layer", [None, "2"])
@pytest.mark.parametrize("size", ["l1", "sum"])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_left_alone(training: bool, size: str, layer: str | None) -> None:
    """Running statistics move once, by the forward whose cross-entropy is trained; nothing else moves."""
    settings = {**COARSE, "size": size, "layer": layer, "generator": seeded()}
    penalty = AttributionPenalty(8 / 255, **settings)
    for loss in (penalty, PenalizedLoss(penalty, 0.5), RobustAttributionLoss(0.5, 8 / 255, **settings)):
        model, (x, y) = cnn(torch.float32, training=training), images(dtype=torch.float32)
        before = copy.deepcopy(model)
        x.requires_grad_(loss is penalty)
        result, seen = watched(loss, model, x, y)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert x.grad is None
        assert all(part.training is training and not part._forward_hooks for part in model.modules())
        assert all(point.min() >= 0 and point.max() <= 1 for point in seen)
        expected = dict(before.named_buffers())
        if isinstance(loss, PenalizedLoss):
            expected = statistics_after(before, x)
        elif loss is not penalty and training:
            alone = [point for point in seen if len(point) == len(x)]
            expected = statistics_after(before, alone[-2 if size == "sum" else -1])
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, expected[name]), name
        total_of(result).backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("size", ["l1", "l2"])
def test_the_attack_stays_in_its_ball_and_range(size: str) -> None:
    """To the last bit, in float32: x' is the end of the last path."""
    model, (x, y) = mlp(torch.float32), images(dtype=torch.float32)
    for epsilon in (8 / 255, 0.3):
        loss = RobustAttributionLoss(0.5, epsilon, **COARSE, size=size, generator=seeded())
        moved = watched(loss, model, x, y)[1][-1][-len(x) :]
        difference = moved - x
        assert 0.5 * epsilon < difference.abs().max() <= epsilon
        assert difference.double().abs().max().item() <= epsilon
        assert moved.min() >= 0
        assert moved.max() <= 1


def test_the_generator_decides_the_start() -> None:
    model, (x, y) = mlp(), images()
    state = torch.get_rng_state()
    for make in (AttributionPenalty, lambda *a, **k: lambda *b: RobustAttributionLoss(0.5, *a, **k)(*b).total):
        first, again, other = (make(EPSILON, **COARSE, generator=seeded(s))(model, x, y) for s in (3, 3, 4))
        assert first == again != other
        assert torch.equal(torch.get_rng_state(), state)
        own = make(EPSILON, **COARSE)
        first = own(model, x, y)
        torch.set_rng_state(state)
        assert own(model, x, y) == first
        torch.set_rng_state(state)


def test_frozen_models() -> None:
    """The others get the gradient that they would have had; with all frozen, x still gets the penalty's."""
    model, (x, y) = NETWORKS["cnn-eval"](), images()
    every = gradients(AttributionPenalty(EPSILON, **COARSE, generator=seeded())(model, x, y), model)
    model[0].requires_grad_(False)
    for loss in (AttributionPenalty, lambda *a, **k: lambda *b: RobustAttributionLoss(0.5, *a, **k)(*b).total):
        value = loss(EPSILON, **COARSE, generator=seeded())(model, x, y)
        ours = gradients(value, model)
        assert len(ours) == len(every) - 2
        if loss is AttributionPenalty:
            assert_same_gradients(ours, every[2:], 1e-12)
    model.requires_grad_(False)
    value = AttributionPenalty(EPSILON, **COARSE, generator=seeded())(model, x, y)
    assert value > 0
    assert RobustAttributionLoss(0.5, EPSILON, **COARSE)(model, x, y).total > 0
    x.requires_grad_()
    moved = references.worst(
        lambda z: size_along(model, x.detach(), z, y, 2, "l1", None), x.detach(), EPSILON, steps=3, seed=3
    )
    truth = size_along(model, x, moved, y, 5, "l1", None).mean()
    ours = AttributionPenalty(EPSILON, **COARSE, generator=seeded())(model, x, y)
    assert_same_gradients(gradients(ours, model, x), gradients(truth, model, x))


def test_an_attribution_of_zero() -> None:
    """ε = 0, or an ignored row: size 0 and no NaN in any gradient, where the square root has none."""
    model, (x, y) = mlp(), images()
    for size in ("l1", "l2", "sum"):
        nothing = AttributionPenalty(0.0, **COARSE, size=size)(model, x, y)
        assert nothing == 0
        assert all((g == 0).all() for g in gradients(nothing, model))
        labels = y.clone()
        labels[2] = -100
        for loss in (AttributionPenalty(EPSILON, **COARSE, size=size), RobustAttributionLoss(0.5, EPSILON, **COARSE)):
            result = loss(model, x, labels)
            value = result if isinstance(result, Tensor) else result.total
            assert all(g.isfinite().all() for g in gradients(value, model))


def test_fused_models_and_channels_last() -> None:
    """nn.fuse changes no result; nor does the memory format."""
    model, (x, y) = cnn(training=True, activation=nn.ReLU), images()
    fused = rds_fast.nn.fuse(model)
    x_last = x.contiguous(memory_format=torch.channels_last)
    results = []
    for network, inputs in ((model, x), (fused, x_last)):
        terms = RobustAttributionLoss(0.5, EPSILON, **COARSE, generator=seeded())(network, inputs, y)
        results.append(gradients(terms.total, network))
    assert_same_gradients(results[1], results[0])


def relative_error(ours: list[Tensor], truth: list[Tensor]) -> float:
    vector, expected = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (ours, truth))
    return ((vector - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(monkeypatch: pytest.MonkeyPatch, training: bool, dtype: torch.dtype) -> None:
    """At one x' the gradients are float64's up to 16-bit layers; the attack's own x' is in the ball and climbs."""
    model, (x, y) = cnn(torch.float32, training=training), images(16, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        loss = RobustAttributionLoss(0.7, EPSILON, **COARSE, generator=seeded())
        attacked, seen = watched(loss, model, x, y)
    assert seen[-1].dtype == torch.float32
    assert all(g.isfinite().all() for g in gradients(attacked.total, model))
    moved = (x + EPSILON * (2 * torch.rand(x.shape, generator=seeded()) - 1)).clamp(0, 1)
    monkeypatch.setattr(attribution, "ascend", lambda *_, **__: moved)
    twin = copy.deepcopy(model).double()
    truth = (
        losses(twin, moved.double(), y) + 0.7 * size_along(twin, x.double(), moved.double(), y, 5, "l1", None)
    ).mean()
    with torch.autocast("cpu", dtype=dtype):
        terms = RobustAttributionLoss(0.7, EPSILON, **COARSE)(model, x, y)
    assert terms.logits.dtype == dtype
    assert terms.total.dtype == terms.penalty.dtype == torch.float32
    assert attacked.total > terms.total
    error = relative_error(gradients(terms.total, model), gradients(truth, twin))
    assert error < {torch.bfloat16: 0.03, torch.float16: 0.006}[dtype]


@pytest.mark.parametrize("size", ["l1", "sum"])
def test_parameters_are_constants_in_the_attack(size: str) -> None:
    """So nothing is kept for gradients of theirs; in the forwards that are trained they are the model's own."""
    model, (x, y) = mlp(), images()
    settings = {**COARSE, "size": size}
    for loss, trained in (
        (AttributionPenalty(EPSILON, **settings), 2 if size == "sum" else 1),
        (RobustAttributionLoss(0.5, EPSILON, **settings), 2 if size == "sum" else 1),
        (AdversarialLoss(EPSILON, steps=3), 1),
    ):
        live: list[bool] = []
        handle = model[1].register_forward_hook(lambda layer, *_, live=live: live.append(layer.weight.requires_grad))
        loss(model, x, y)
        handle.remove()
        assert live[-trained:] == [True] * trained
        assert len(live) > trained
        assert not any(live[:-trained])


class CountFlops(TorchDispatchMode):
    """Of the products of matrices and the convolutions."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.skipif(
    rds_fast.backends.failure("native", "cpu") is not None,
    reason=f"native: {rds_fast.backends.failure('native', 'cpu')}",
)
@pytest.mark.parametrize("training", [True, False])
def test_the_cost_is_the_one_stated(training: bool) -> None:
    """In forwards of the batch: no gradient of a parameter is computed in an attack."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(8) for layer in (nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), *hidden, *head).train(training)
    x, y = images(4, torch.float32)

    def flops(call: Callable[[], object]) -> int:
        with CountFlops() as counted:
            call()
        return counted.total

    forward = flops(lambda: model(x))
    settings: dict[str, Any] = {"path_steps": 6, "attack_path_steps": 2, "attack_steps": 3}
    expected = {
        AttributionPenalty(EPSILON, **settings): 6 * 6 + 4 * 3 * 2,
        AttributionPenalty(EPSILON, **settings, size="sum"): 6 + 2 * 3,
        RobustAttributionLoss(0.5, EPSILON, **settings): 6 * 6 + 4 * 3 * 2 + (3 + 2 * 3 if training else 0),
        RobustAttributionLoss(0.5, EPSILON, **settings, size="sum"): 6 + 3 * 3,
        AdversarialLoss(EPSILON, steps=3): 3 + 2 * 3,
    }
    for loss, cost in expected.items():
        measured = flops(lambda loss=loss: total_of(loss(model, x, y)).backward()) / forward
        assert abs(measured / cost - 1) < 0.02, (loss, measured, cost)


def test_a_schedule_of_the_weight() -> None:
    model, (x, y) = mlp(), images()
    loss = RobustAttributionLoss(schedules.LinearWarmup(1.0, 10), EPSILON, **COARSE, generator=seeded())
    with pytest.raises(ValueError, match=r"weight is a schedule .* and step was not given"):
        loss(model, x, y)
    for step in (0, 5):
        loss.generator.manual_seed(3)
        constant = RobustAttributionLoss(step / 10, EPSILON, **COARSE, generator=seeded())(model, x, y)
        assert torch.equal(loss(model, x, y, step).total, constant.total)


def test_training_makes_attributions_robust() -> None:
    """A few steps lower the penalty that plain training raises."""
    x, y = images(32, torch.float32)
    ends = []
    for weight in (0.0, 1.0):
        model = mlp(torch.float32)
        loss = PenalizedLoss(AttributionPenalty(EPSILON, **COARSE, generator=seeded()), weight)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            loss(model, x, y).total.backward()
            optimizer.step()
        ends.append(loss(model, x, y).penalty.item())
    assert ends[1] < 0.5 * ends[0]


def test_the_default_path_of_the_attack() -> None:
    """A fifth of the loss's points, and one at least."""
    model, (x, y) = mlp(), images()
    for path_steps, expected in ((50, 10), (9, 1), (3, 1)):
        penalty = AttributionPenalty(EPSILON, path_steps=path_steps, attack_steps=1)
        lengths = [len(points) / len(x) for points in watched(penalty, model, x, y)[1]]
        assert lengths == [expected, path_steps]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epsilon": -1}, ValueError, "epsilon is -1; it must be a finite radius"),
        ({"path_steps": 0}, ValueError, "path_steps is 0; it must be at least 1"),
        ({"path_steps": 5.0}, TypeError, r"path_steps is 5\.0, a float; it must be an int"),
        ({"attack_steps": -3}, ValueError, "attack_steps is -3"),
        ({"attack_step_size": 0.0}, ValueError, r"attack_step_size is 0\.0; it must be positive"),
        ({"attack_path_steps": 0}, ValueError, "attack_path_steps is 0"),
        ({"size": "L1"}, ValueError, "size is 'L1'; it must be one of 'l1', 'l2', 'sum'. Did you mean 'l1'"),
        ({"layer": nn.ReLU()}, TypeError, "layer is a ReLU; it must be a module's name"),
        ({"bounds": (0.0, 0.0)}, ValueError, "bounds are"),
    ],
)
def test_wrong_settings(change: dict[str, Any], error: type[Exception], message: str) -> None:
    for make in (AttributionPenalty, lambda **settings: RobustAttributionLoss(0.5, **settings)):
        with pytest.raises(error, match=message):
            make(**{"epsilon": 0.1, **change})


def test_wrong_settings_of_the_loss() -> None:
    with pytest.raises(ValueError, match=r"weight is -1\.0; it must be finite and not negative"):
        RobustAttributionLoss(-1, 0.1)
    with pytest.raises(ValueError, match="label_smoothing is 2"):
        RobustAttributionLoss(0.5, 0.1, label_smoothing=2)


def test_wrong_arguments() -> None:
    model, (x, y) = mlp(), images()
    for make in (AttributionPenalty, lambda *a, **k: RobustAttributionLoss(0.5, *a, **k)):
        with pytest.raises(ValueError, match=r"layer is 'convolution'; the model has no such module\. Did you mean"):
            make(0.1, layer="convolution")(model, x, y)
        with pytest.raises(ValueError, match="x leaves the bounds"):
            make(0.1)(model, 2 * x, y)
        with pytest.raises(ValueError, match=r"y has shape \(5,\)"):
            make(0.1)(model, x, y[:5])
        with pytest.raises(IndexError, match="class indices must be in"):
            make(0.1)(model, x, y + 5)
