"""Integrated gradients: completeness, captum, layers, derivatives, what is left alone, and each error."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import attribution_references as references
import pytest
import torch
from attribution_references import images, losses
from penalty_references import CLASSES, NETWORKS, assert_same_gradients, cnn, gradients, mlp
from torch import Tensor, nn

from rds_fast import integrated_gradients
from rds_fast.penalties import integrated_gradients as module

# The number and name of a module inside each network, whose outputs are attributed to.
LAYERS = {"mlp": 2, "cnn-train": 2, "cnn-eval": 4}


def difference(model: nn.Module, x: Tensor, baseline: Tensor, y: Tensor) -> Tensor:
    return (losses(model, x, y) - losses(model, baseline, y)).detach()


@pytest.mark.parametrize("layer", [None, "2"])
def test_completeness_and_its_error(layer: str | None) -> None:
    """Σ IG = ℓ(x) − ℓ(x⁰) up to an error that halves as the number of points doubles."""
    model, (x, y) = mlp(), images()
    baseline = torch.rand_like(x)
    errors = []
    for steps in (25, 50, 100, 200):
        total = integrated_gradients(model, x, y, baseline, steps=steps, layer=layer).flatten(1).sum(1)
        errors.append((total - difference(model, x, baseline, y)).abs())
    assert (errors[-1] < 1e-2 * difference(model, x, baseline, y).abs()).all()
    for coarse, fine in itertools.pairwise(errors):
        torch.testing.assert_close(coarse / fine, torch.full_like(coarse, 2.0), rtol=0, atol=0.2)


def test_an_affine_loss_is_complete_with_one_point() -> None:
    """One class against a constant, far into saturation: ℓ = −f to rounding, whose gradient does not change."""

    class Saturated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack((x.flatten(1).sum(1) - 1000.0, x.new_zeros(len(x))), 1)

    x, _ = images()
    ours = integrated_gradients(Saturated(), x, torch.zeros(6, dtype=torch.long), 0.0, steps=1)
    torch.testing.assert_close(ours, -x, rtol=1e-14, atol=0)


@pytest.mark.parametrize("network", ["mlp", "cnn-eval"])
def test_captum_agrees(network: str) -> None:
    attr = pytest.importorskip("captum.attr")
    model, (x, y) = NETWORKS[network](), images()
    baseline = torch.rand_like(x)
    theirs = attr.IntegratedGradients(lambda x, y: losses(model, x, y)).attribute(
        x, baseline, additional_forward_args=(y,), n_steps=30, method="riemann_right"
    )
    ours = integrated_gradients(model, x, y, baseline, steps=30)
    # captum's shares of the path, k/m, are float32 numbers.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())


@pytest.mark.parametrize("through_a_layer", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_against_eager(network: str, create_graph: bool, through_a_layer: bool) -> None:
    """The values; and the gradients with respect to the parameters, to x and to the baseline."""
    model, (x, y) = NETWORKS[network](), images()
    layer = LAYERS[network] if through_a_layer else None
    baseline = torch.rand_like(x).requires_grad_()
    x.requires_grad_()
    truth = references.attribution(copy.deepcopy(model), baseline, x, y, 7, layer)
    name = None if layer is None else str(layer)
    ours = integrated_gradients(model, x, y, baseline, steps=7, create_graph=create_graph, layer=name)
    assert ours.shape == truth.shape
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-13)
    assert ours.requires_grad == create_graph
    if create_graph:
        twin = copy.deepcopy(model)
        truth = references.attribution(twin, baseline, x, y, 7, layer)
        weights = torch.linspace(-1, 2, truth.numel(), dtype=truth.dtype).view_as(truth)
        ours, truth = (weights * ours).sum(), (weights * truth).sum()
        assert_same_gradients(gradients(ours, model, x, baseline), gradients(truth, twin, x, baseline))


def test_baselines_that_expand() -> None:
    model, (x, y) = mlp(), images()
    full = integrated_gradients(model, x, y, torch.full_like(x, 0.25), steps=4)
    for baseline in (0.25, torch.tensor(0.25), torch.full((3, 1, 1), 0.25), torch.full((1, 3, 6, 6), 0.25)):
        torch.testing.assert_close(integrated_gradients(model, x, y, baseline, steps=4), full, rtol=1e-13, atol=1e-16)


def test_probabilities_and_ignored_labels() -> None:
    """ℓ of two mixed labels is the mixture of theirs; an ignored row has no loss and no attribution."""
    model, (x, y) = mlp(), images()
    other = y.roll(1)
    mixed = 0.7 * nn.functional.one_hot(y, CLASSES).double() + 0.3 * nn.functional.one_hot(other, CLASSES).double()
    one, two, both = (integrated_gradients(model, x, labels, 0.0, steps=5) for labels in (y, other, mixed))
    torch.testing.assert_close(both, 0.7 * one + 0.3 * two, rtol=1e-11, atol=1e-14)
    y[2] = -100
    ignoring = integrated_gradients(model, x, y, 0.0, steps=5)
    assert (ignoring[2] == 0).all()
    torch.testing.assert_close(ignoring[3:], one[3:])


@pytest.mark.parametrize("layer", [None, "2"])
@pytest.mark.parametrize("network", ["mlp", "cnn-eval"])
def test_a_large_path_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch, network: str, layer: str | None) -> None:
    model, (x, y) = NETWORKS[network](), images()
    whole = integrated_gradients(model, x, y, 0.0, steps=7, layer=layer)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 3 * x.numel())
    torch.testing.assert_close(
        integrated_gradients(model, x, y, 0.0, steps=7, layer=layer), whole, rtol=1e-12, atol=1e-15
    )
    assert sizes == ([18, 18, 6] if layer is None else [24, 24, 12])
    integrated_gradients(model, x, y, 0.0, steps=7, create_graph=True)
    assert sizes[3:] == [42]


def test_no_pieces_where_samples_interact(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = cnn(training=True), images()
    whole = integrated_gradients(model, x, y, 0.0, steps=7)
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 1)
    assert torch.equal(integrated_gradients(model, x, y, 0.0, steps=7), whole)


class Inplace(nn.Module):
    """A layer whose output is written to by what follows, and a ReLU that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(108, 16).double(), nn.Linear(16, CLASSES).double()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(2.0 * self.relu(self.first(x.flatten(1)))) / 2.0)


def test_a_layer_whose_output_is_overwritten() -> None:
    """The attribution is to the layer's own output: that of a plain ReLU's input."""
    model, (x, y) = Inplace(), images()
    plain = nn.Sequential(nn.Flatten(), model.first, nn.ReLU(), model.second)
    ours = integrated_gradients(model, x, y, 0.0, steps=9, layer="first", create_graph=True)
    truth = integrated_gradients(plain, x, y, 0.0, steps=9, layer="1")
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-15)
    assert (integrated_gradients(plain, x, y, 0.0, steps=9, layer="2") != truth).any()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_everything_is_left_alone(context: Any, training: bool) -> None:
    model, (x, y) = cnn(training=training), images()
    x.requires_grad_()
    before = copy.deepcopy(model.state_dict())
    with context():
        ours = integrated_gradients(model, x, y, 0.5, steps=3)
        inside = integrated_gradients(model, x * 1.0, y * 1, 0.5, steps=3)  # tensors made inside
    assert torch.equal(ours, inside)
    assert not ours.requires_grad
    integrated_gradients(model, x, y, 0.5, steps=3, create_graph=True, layer="2")
    assert x.grad is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(part.training is training for part in model.modules())
    assert not any(part._forward_hooks for part in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_memory_format_dtypes_and_empty_batches() -> None:
    model, (x, y) = cnn(torch.float32, training=False), images(dtype=torch.float32)
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda _, i: seen.append(i[0].is_contiguous(memory_format=torch.channels_last)))
    channels_last = x.contiguous(memory_format=torch.channels_last)
    ours = integrated_gradients(model, channels_last, y, 0.0, steps=5)
    assert seen == [True]
    torch.testing.assert_close(ours, integrated_gradients(model, x, y, 0.0, steps=5), rtol=1e-4, atol=1e-6)
    assert integrated_gradients(model, x[:0], y[:0], 0.0).shape == (0, 3, 6, 6)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = mlp(dtype)
        truth = integrated_gradients(copy.deepcopy(narrow).double(), x.to(dtype).double(), y, 0.0, steps=5)
        ours = integrated_gradients(narrow, x.to(dtype), y, 0.0, steps=5)
        assert ours.dtype == dtype
        assert ((ours.double() - truth).norm() / truth.norm()) < 0.02


def test_the_path_ends_at_x_to_the_last_bit() -> None:
    model, (x, y) = mlp(torch.float32), images(dtype=torch.float32)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    baseline = torch.rand_like(x)
    integrated_gradients(model, x, y, baseline, steps=7, layer="2")
    assert torch.equal(seen[0][-6:], x)
    assert torch.equal(seen[0][:6], baseline)


class Odd(nn.Module):
    """Layers that no attribution can be of."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.summed, self.cut, self.unused = (nn.Identity() for _ in range(4))
        self.pair.forward = lambda x: (x, x)
        self.network = mlp()

    def forward(self, x: Tensor) -> Tensor:
        self.pair(x)
        self.summed(x.sum(0))
        self.cut(x.detach())
        return self.network(x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is 0; it must be at least 1"),
        ({"steps": 2.0}, TypeError, r"steps is 2\.0, a float; it must be an int"),
        ({"y": torch.zeros(5, dtype=torch.long)}, ValueError, r"y has shape \(5,\); x of shape \(6, 3, 6, 6\) needs"),
        ({"y": [0] * 6}, TypeError, "y is a list"),
        ({"y": torch.full((6,), 9)}, IndexError, "9"),
        ({"x": torch.zeros(6, 3, 6, 6, dtype=torch.long)}, TypeError, "x is torch.int64"),
        ({"x": [0.0]}, TypeError, "x is a list"),
        ({"baseline": torch.zeros(2, 6)}, ValueError, r"baseline has shape \(2, 6\); it must be x's"),
        ({"baseline": torch.zeros(1, dtype=torch.long)}, TypeError, "baseline is torch.int64"),
        ({"baseline": None}, TypeError, "baseline is None"),
        ({"layer": "network.11"}, ValueError, r"no such module\. Did you mean 'network\.\d'"),
        ({"layer": 3}, ValueError, "layer is 3; the model has no such module"),
        ({"layer": "0", "model": lambda x: x}, TypeError, "a layer needs a torch.nn.Module"),
        ({"layer": "unused"}, RuntimeError, "the layer ran 0 times in one forward"),
        ({"layer": "relu", "model": Inplace()}, RuntimeError, "the layer ran 2 times in one forward"),
        ({"layer": "pair"}, TypeError, "the layer returned a tuple"),
        ({"layer": "summed"}, ValueError, r"the layer returned the shape \(3, 6, 6\) for 306 inputs"),
        ({"layer": "cut"}, RuntimeError, "does not depend differentiably on x"),
        ({"model": lambda x: x.detach().flatten(1)}, RuntimeError, "no gradient path from x to the logits"),
    ],
)
@pytest.mark.parametrize("create_graph", [True, False])
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str, create_graph: bool) -> None:
    x, y = images()
    arguments = {"model": Odd(), "x": x, "y": y, "baseline": 0.0, "create_graph": create_graph, **change}
    with pytest.raises(error, match=message):
        integrated_gradients(**arguments)


def test_a_model_whose_gradient_is_zero_is_no_error() -> None:
    x, y = images()
    model = nn.Sequential(nn.Flatten(), nn.Threshold(math.inf, 0.0))
    assert (integrated_gradients(model, x, y, 0.0) == 0).all()


def test_gradients_disabled() -> None:
    model, (x, y) = mlp(), images()
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients disabled"):
        integrated_gradients(model, x, y, 0.0, create_graph=True)
