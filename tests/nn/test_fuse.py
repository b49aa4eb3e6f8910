"""What ``fuse`` may and may not touch, and that a fused model stays a model like any other."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rds_fast.nn import fuse, fusion_report


def fusions(model: nn.Module) -> dict[str, str]:
    """By batch norm: what it is fused with, or the reason why not."""
    return {layer.name: ", ".join(layer.fusions) or layer.reason for layer in fusion_report(model).layers}


class Block(nn.Module):
    """A residual block. ``add`` and ``relu`` say how it writes the two."""

    def __init__(self, add=torch.add, relu=None, channels=4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.add = add
        self.relu = relu or nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.add(self.bn(self.conv(x)), x))


def in_place(a, b):
    a += b
    return a


def into_the_other(a, b):
    b += a
    return b


ADDITIONS = {
    "torch.add": torch.add,
    "+": lambda a, b: a + b,
    "+ reversed": lambda a, b: b + a,
    "+=": in_place,
    ".add": lambda a, b: a.add(b),
    ".add_": lambda a, b: a.add_(b),
}
RELUS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "function": F.relu,
    "function in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
}
X = torch.rand(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("add", "relu"), [(add, RELUS["module"]) for add in ADDITIONS.values()] + [(torch.add, r) for r in RELUS.values()]
)
def test_every_way_to_write_the_addition_and_the_relu(add, relu, assert_equal, random_model, calls) -> None:
    plain = random_model(Block(add, relu))
    fused = fuse(plain)
    assert fusions(fused) == {"bn": "convolution → batch norm → add → ReLU"}
    assert_equal(plain, fused, X)
    assert calls == ["add relu"]


def test_changes_in_place_reach_the_other_names_of_a_value(assert_equal, random_model) -> None:
    class Aliasing(Block):
        def forward(self, x):
            out = same = self.relu(self.bn(self.conv(x))) + 1
            out *= 2
            out += x
            return out * same

    plain = random_model(Aliasing())
    fused = fuse(plain)
    assert fusions(fused) == {"bn": "convolution → batch norm → ReLU"}
    assert_equal(plain, fused, X)


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (lambda a, b: torch.add(a, b, alpha=2), "the addition is called with keywords or alpha"),
        (lambda a, b: a + 1.0, "a constant is added to it"),
        (lambda a, b: a + a, "it is added to itself"),
        (lambda a, b: a * b, "followed by mul"),
        (lambda a, b: a + b * a.mean(), "its output is used 2 times"),
    ],
)
def test_what_is_not_the_pattern_is_left(add, reason, assert_equal, random_model) -> None:
    model = Block(add)
    model.conv = nn.Identity()  # before which a batch norm alone gains nothing
    plain = random_model(model)
    fused = fuse(plain)
    assert fusions(fused) == {"bn": reason}
    assert type(fused.bn) is nn.BatchNorm2d
    assert type(fused) is Block
    assert_equal(plain, fused, X)


def test_an_addition_into_the_other_value_still_changes_that() -> None:
    model = Block(into_the_other)
    assert fusions(model) == {"bn": "convolution → batch norm"}
    model.conv = nn.Identity()
    assert fusions(model) == {"bn": "it is added in place to another value"}
    x = X.float()
    with torch.no_grad():
        assert fuse(model)(x) is x


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}, {"track_running_stats": False}],
    ids=str,
)
def test_the_options_of_batch_norm(kind, options, assert_equal, random_model, calls) -> None:
    dims = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[kind]
    plain = random_model(nn.Sequential(kind(4, **options), nn.ReLU(), kind(4, **options)))
    fused = fuse(plain)
    x = torch.rand(5, 4, *(3,) * dims, dtype=torch.float64)
    for training in (True, True, False):
        assert_equal(plain.train(training), fused.train(training), x)
    assert calls == ["relu"] * 3
    with pytest.raises(ValueError, match="expected"):
        fused(x[..., None, None, None])


def test_a_frozen_batch_norm_stays_frozen(assert_equal, random_model) -> None:
    plain = random_model(nn.Sequential(Block(), Block()))
    plain[0].bn.eval().requires_grad_(False)
    fused = fuse(plain)
    assert [module.training for module in fused.modules()] == [module.training for module in plain.modules()]
    assert not fused[0].bn.weight.requires_grad
    assert_equal(plain, fused, X)


def test_the_end_of_a_module_is_fused_with_what_its_caller_does(assert_equal, random_model, calls) -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))

        def forward(self, x):
            return F.relu(x + self.branch(x))

    plain = random_model(Caller())
    fused = fuse(plain)
    assert fusions(fused) == {"branch.1.1": "convolution → batch norm → add → ReLU"}
    assert_equal(plain, fused, X)
    assert calls == ["add relu"]
    torch.testing.assert_close(fused.eval().branch(X), plain.eval().branch(X), rtol=1e-9, atol=1e-9)


def test_two_addends_whose_order_matters_to_the_running_statistics(assert_equal, random_model) -> None:
    class Twice(nn.Module):
        """The batch norm's second call must see the first one's statistics."""

        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            first = self.bn(2 * x)
            return torch.relu(first + self.bn(x).sin())

    plain = random_model(Twice())
    fused = fuse(plain)
    assert fusions(fused) == {"bn": "followed by add; followed by sin"}
    assert_equal(plain, fused, X)


def test_the_random_numbers_of_two_branches_are_drawn_in_their_order(assert_equal, random_model) -> None:
    """Also where a model was in eval mode when it was traced, and its dropouts alone are not."""

    class Dropped(Block):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.BatchNorm2d(4)
            self.first, self.second = nn.Dropout(), nn.Dropout()

        def forward(self, x):
            first = self.first(self.bn(self.conv(x)))
            return self.relu(first + self.second(self.other(x)))

    plain = random_model(Dropped())
    fused = fuse(plain)
    for model in (plain, fused):
        model.eval()
        model.first.train(), model.second.train()
    assert_equal(plain, fused, X)


def test_shared_modules(assert_equal, random_model, calls) -> None:
    block = Block()
    plain = random_model(nn.Sequential(block, block, nn.Conv2d(4, 4, 1), block.bn, block.relu, block.bn))
    fused = fuse(plain)
    (layer,) = fusion_report(fused).layers
    assert layer.fusions == ("convolution → batch norm → ReLU", "convolution → batch norm → add → ReLU")
    assert layer.reason == "the model returns its output"
    assert fused[0] is fused[1]
    assert fused[0].bn is fused[3] is fused[5]
    assert_equal(plain, fused, X)
    assert calls == ["add relu", "add relu", "relu"]


class Shortcut(Block):
    """The residual is known before the block's own branch is computed."""

    def __init__(self, shortcut, add=torch.add) -> None:
        super().__init__(add)
        self.shortcut = shortcut

    def forward(self, x):
        residual = self.shortcut(x)
        return self.relu(self.add(self.bn(self.conv(x)), residual))


def test_a_residual_that_broadcasts_or_is_of_another_dtype_runs_plainly(random_model, calls) -> None:
    plain = random_model(Shortcut(lambda x: x.mean((2, 3), keepdim=True)))
    fused = fuse(plain)
    assert fusions(fused) == {"bn": "convolution → batch norm → add → ReLU"}
    torch.testing.assert_close(fused(X), plain(X), rtol=0, atol=0)
    half = fuse(Shortcut(lambda x: x.double()))
    assert half(X.float()).dtype == torch.float64
    grown = Shortcut(lambda x: torch.stack([x, x]), in_place)
    for model in (grown, fuse(grown)):
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            model(X.float())
    assert calls == []


class Branching(nn.Module):
    """Its branch depends on data; the blocks below it can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.block(x)
        return torch.relu(self.bn(x)) if x.mean() > 0 else x


def test_data_dependent_control_flow_is_left_and_what_is_below_is_fused(assert_equal, random_model, calls) -> None:
    plain = random_model(nn.Sequential(Branching()))
    fused = fuse(plain)
    found = fusions(fused)
    assert found["0.block.bn"] == "convolution → batch norm → add → ReLU"
    assert found["0.bn"].startswith("the forward of Branching 0 cannot be traced: TraceError: symbolically traced")
    assert_equal(plain, fused, X)
    assert calls == ["add relu"]


def _random_depth(self, x):
    return self.relu(self.bn(x)) if random.random() < 0.5 else x


def _remembers(self, x):
    self.seen = x
    return self.relu(self.bn(x))


def _remembers_in_a_list(self, x):
    self.list.append(x)
    return self.relu(self.bn(x))


def _remembers_in_a_child(self, x):
    self.relu.seen = x
    return self.relu(self.bn(x))


KEPT = {}


def _remembers_elsewhere(self, x):
    KEPT["x"] = self.conv(x)
    return self.relu(self.bn(x))


def _without_gradient(self, x):
    with torch.no_grad():
        x = self.relu(self.bn(x))
    return x


def _in_single_precision(self, x):
    with torch.autocast("cpu", enabled=True):
        return self.relu(self.bn(x))


def _asks_for_a_type(self, x):
    return self.relu(self.bn(x)) if isinstance(self.conv(x), torch.Tensor) else x


def _checkpoints(self, x):
    return torch.utils.checkpoint.checkpoint(lambda x: self.relu(self.bn(x)), x, use_reentrant=False)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (_random_depth, "draws random numbers"),
        (_remembers, "sets the attribute seen"),
        (_remembers_in_a_list, "sets what is in a list"),
        (_remembers_in_a_child, "sets the attribute seen"),
        (_remembers_elsewhere, "keeps a value that it computes outside of its modules"),
        (_without_gradient, "switches gradients, autocast or saved-tensor hooks"),
        (_in_single_precision, "switches gradients, autocast or saved-tensor hooks"),
        (_asks_for_a_type, "asks for the type of a value that it computes"),
        (_checkpoints, "switches gradients, autocast or saved-tensor hooks"),
        (lambda self, *x: self.relu(self.bn(*x)), "takes *x"),
    ],
)
def test_a_forward_that_a_graph_cannot_say_is_left(forward, reason) -> None:
    model = type("Odd", (Block,), {"forward": forward})()
    model.list = []
    before, state = dict(vars(model)), random.getstate()
    (left,) = fusion_report(model).left
    assert left.reason.startswith("the forward of Odd cannot be traced")
    assert reason in left.reason
    assert dict(vars(model)) == before
    assert not model.list
    assert not hasattr(model.relu, "seen")
    assert random.getstate() == state
    assert type(fuse(model)).__name__ == "Odd"


def test_a_forward_that_depends_on_the_training_flag_or_on_options(assert_equal, random_model) -> None:
    class Optional(Block):
        def forward(self, x, scale=None):
            x = F.dropout(self.relu(self.bn(self.conv(x))), 0.5, self.training)
            if self.training:
                x = x + 1
            return x if scale is None else scale * x

    plain = random_model(Optional())
    fused = fuse(plain)
    assert fusions(fused) == {"bn": "convolution → batch norm → ReLU"}
    for training in (True, False):
        assert_equal(plain.train(training), fused.train(training), X)
    torch.testing.assert_close(fused(X, scale=3.0), plain(X, 3.0), rtol=1e-9, atol=1e-9)


def test_hooks_see_what_they_saw(calls) -> None:
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), Block(), Block()).double()
    plain[1].register_forward_hook(lambda *_: None)
    plain[3].relu.register_full_backward_hook(lambda *_: None)
    assert fusions(fuse(plain)) == {
        "1": "it has hooks",
        "3.bn": "convolution → batch norm → add",
        "4.bn": "convolution → batch norm → add → ReLU",
    }
    seen = []
    fused = fuse(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).double())
    fused[0].register_forward_hook(lambda module, inputs, output: seen.append(output.min()))  # after it was fused
    fused[1].register_forward_hook(lambda module, inputs, output: seen.append(output.min()))
    fused(X)
    assert seen[0] < 0 <= seen[1]
    assert calls == []


def test_subclasses_and_synchronised_batch_norm_are_left() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Own(4), nn.ReLU(), nn.SyncBatchNorm(4), nn.ReLU(), nn.LazyBatchNorm2d(), nn.ReLU())
    assert fusions(fuse(model, inplace=True)) == {
        "0": "Own has a forward of its own",
        "2": "SyncBatchNorm has a forward of its own",
        "4": "LazyBatchNorm2d has a forward of its own",
    }


class Chosen(nn.Module):
    """Does nothing, or something: what it or its class holds decides."""

    scale = None

    def __init__(self, **attributes) -> None:
        super().__init__()
        vars(self).update(attributes)

    def forward(self, x):
        for function in vars(self).get("functions", ()):
            x = function(x)
        x = x if self.scale is None else self.scale * x
        return 2 * x if vars(self).get("doubles") else x


class Watching(nn.Module):
    """Does nothing to what it sees, but keeps it in a list of its own or, without one, elsewhere."""

    def __init__(self, **attributes) -> None:
        super().__init__()
        vars(self).update(attributes)

    def forward(self, x):
        vars(self).get("seen", WATCHED).append(x)
        return x


WATCHED = []


class Uncounted(nn.BatchNorm2d):
    """Does not count its batches."""

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)


def between(layer: nn.Module, norm=nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3), norm(4), layer, nn.ReLU())


def test_what_does_nothing_in_one_module_may_do_something_in_another(assert_equal, random_model, monkeypatch) -> None:
    plain = random_model(between(Chosen()))
    fused = fuse(plain)
    assert fusions(fused) == {"1": "convolution → batch norm → ReLU"}
    monkeypatch.setattr(Chosen, "scale", 3.0)
    assert_equal(plain, fused, X)
    monkeypatch.undo()
    for attributes in ({"functions": []}, {"functions": [torch.sigmoid]}, {"halves": True}, {"doubles": True}):
        plain = random_model(between(Chosen(**attributes)))
        assert_equal(plain, fuse(plain), X)


@pytest.mark.parametrize("attributes", [{"seen": []}, {}])
def test_a_module_that_keeps_what_it_sees_is_called(attributes, random_model) -> None:
    fused = fuse(random_model(between(Watching(**attributes))))
    assert fusions(fused) == {"1": "convolution → batch norm"}
    seen = vars(fused[2]).get("seen", WATCHED)
    WATCHED.clear()
    fused(X)
    (value,) = seen
    assert value.shape == (3, 4, 3, 3)


def test_a_batch_norm_that_does_not_count_its_batches_is_left(assert_equal, random_model) -> None:
    plain = random_model(between(nn.Identity(), Uncounted))
    fused = fuse(plain)
    assert fusions(fused) == {"1": "Uncounted has a forward of its own"}
    assert_equal(plain, fused, X)


@pytest.mark.parametrize(("layer", "name"), [(0, "weight"), (1, "bias"), (1, "running_mean")])
def test_a_tensor_put_in_the_place_of_a_parameter_or_buffer(layer, name, assert_equal, random_model) -> None:
    plain = random_model(between(nn.Identity()))
    fused = fuse(plain)
    for model in (plain, fused):
        tensor = getattr(model[layer], name).detach().clone()
        delattr(model[layer], name)
        setattr(model[layer], name, tensor)
    assert_equal(plain, fused, X)


class DropPath(nn.Module):
    """As libraries write it, behind a function."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.rate)


class NormAct(nn.BatchNorm2d):
    """A batch norm that calls an activation, as libraries write it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        tracked = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        x = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(self.drop(x))


class Scaled(NormAct):
    """Does more."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_what_other_libraries_put_into_a_block(assert_equal, random_model, calls) -> None:
    def block(norm, rate: float) -> nn.Module:
        model = Block()
        model.bn = nn.Sequential(norm, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), DropPath(rate))
        return model

    model = nn.Sequential(
        block(NormAct(4, nn.ReLU()), 0.0), block(NormAct(4, nn.Identity()), 0.0), block(Scaled(4, nn.ReLU()), 0.0)
    )
    plain = random_model(model)
    fused = fuse(plain)
    assert fusions(fused) == {
        "0.bn.0": "convolution → batch norm → ReLU",
        "0.bn.2": "convolution → batch norm → add → ReLU",
        "1.bn.0": "convolution → batch norm",
        "1.bn.2": "convolution → batch norm → add → ReLU",
        "2.bn.0": "Scaled has a forward of its own",
        "2.bn.2": "convolution → batch norm → add → ReLU",
    }
    for training in (True, False):
        assert_equal(plain.train(training), fused.train(training), X)
    assert calls == ["relu", "add relu", "", "add relu", "add relu"] * 2
    calls.clear()
    torch.manual_seed(0)
    fused[0].bn[3].rate = 0.5  # it drops now, so the block's layers are called one by one
    fused.train()(X)
    assert calls == ["", "add relu", "add relu"]
