"""Weight gradients left to the batch norm behind a convolution: right anywhere, and left only where they can be."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rds_fast import backends, fast_double_backward, use_backend
from rds_fast.ops import batch_norm


@pytest.fixture
def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5), nn.Softplus()),
        nn.Conv2d(5, 2, 2),
    ).double()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often batch norm's gradient was computed again by itself, and by the double backward."""
    counts: Counter[str] = Counter()
    again, beside = batch_norm._input_gradient, batch_norm._double_backward

    def counted_again(*arguments: Any) -> Any:
        counts["by itself"] += 1
        return again(*arguments)

    def counted_beside(*arguments: Any) -> Any:
        counts["beside" if arguments[-2] else "not"] += 1
        return beside(*arguments)

    monkeypatch.setattr(batch_norm, "_input_gradient", counted_again)
    monkeypatch.setattr(batch_norm, "_double_backward", counted_beside)
    return counts


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 9, 9, generator=generator, dtype=torch.float64, requires_grad=True)


def squared_gradient(y: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    return gradient.square().sum()


def compare(function: Callable[[], list[Tensor]]) -> None:
    """``function`` with our operations, and with PyTorch's."""
    with fast_double_backward():
        ours = function()
    with use_backend("reference"):
        theirs = function()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_whole_step(layers: nn.Sequential, ran: Counter[str], training: bool) -> None:
    layers.train(training)

    def step() -> list[Tensor]:
        x = images()
        y = layers(x)
        loss = y.square().sum() + squared_gradient(y, x)
        return list(torch.autograd.grad(loss, [x, *layers.parameters()]))

    compare(step)
    assert ran == {"beside": 2}


def test_the_penalty_alone_and_by_backward(layers: nn.Sequential, ran: Counter[str]) -> None:
    def step() -> list[Tensor]:
        layers.zero_grad()
        x = images()
        squared_gradient(layers(x), x).backward()
        return [parameter.grad for parameter in layers.parameters() if parameter.grad is not None]

    compare(step)
    assert ran == {"beside": 2}


def test_where_some_gradients_are_asked_for(layers: nn.Sequential, ran: Counter[str]) -> None:
    """A run that wants no weight's leaves none, and one of a single weight leaves that one."""
    hidden: list[Tensor] = []
    layers[0].register_forward_hook(lambda *arguments: hidden.append(arguments[2]))
    expected = [
        (lambda x: [x], {"not": 2}),
        (lambda x: [layers[1].weight], {"not": 2}),
        (lambda x: [layers[0].weight], {"beside": 1, "not": 1}),
        (lambda x: [layers[3].weight], {"beside": 1, "not": 1}),
        (lambda x: [hidden[-1]], {"not": 2}),
        (lambda x: [hidden[-1], layers[0].weight], {"beside": 1, "not": 1}),
        (lambda x: [hidden[-1], layers[3].weight], {"beside": 1, "not": 1}),
    ]
    for inputs, counts in expected:

        def step(inputs: Callable[[Tensor], list[Tensor]] = inputs) -> list[Tensor]:
            x = images()
            return list(torch.autograd.grad(squared_gradient(layers(x), x), inputs(x)))

        ran.clear()
        compare(step)
        assert ran == counts


def test_a_graph_of_the_weight_gradient(layers: nn.Sequential, ran: Counter[str]) -> None:
    """It leads through the gradient that the convolution was given, so nothing is left to anybody."""

    def step() -> list[Tensor]:
        x = images()
        penalty = squared_gradient(layers(x), x)
        gradients = torch.autograd.grad(penalty, [layers[0].weight, layers[3].weight], create_graph=True)
        return [gradient.detach() for gradient in gradients]

    compare(step)
    assert ran == {"by itself": 2, "not": 2}


def test_two_penalties_of_one_forward(layers: nn.Sequential, ran: Counter[str]) -> None:
    """Two gradients reach one weight, from two batch norms' backwards."""

    def step() -> list[Tensor]:
        x = images()
        y = layers(x)
        penalties = squared_gradient(y[:, 0], x) + squared_gradient(y[:, 1].exp(), x)
        return list(torch.autograd.grad(penalties + y.sum(), [x, *layers.parameters()]))

    compare(step)
    assert ran == {"beside": 4}


def test_a_module_called_twice(layers: nn.Sequential) -> None:
    torch.manual_seed(2)
    shared = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh()).double()

    def step() -> list[Tensor]:
        x = images()
        y = shared(shared(x))
        return list(torch.autograd.grad(y.square().sum() + squared_gradient(y, x), [x, *shared.parameters()]))

    compare(step)


def test_a_sum_of_convolutions(ran: Counter[str]) -> None:
    """The batch norm's gradient goes to both, and to neither directly."""
    torch.manual_seed(2)
    first, norm = nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double()

    def step() -> list[Tensor]:
        x = images()
        y = norm(first(x) + first(x.flip(3)))
        return list(torch.autograd.grad(squared_gradient(y, x), [x, *first.parameters(), norm.weight]))

    compare(step)
    assert ran == {"by itself": 2, "not": 1}


def test_a_result_with_another_use(layers: nn.Sequential) -> None:
    """The gradient of the convolution's result is a sum, of which the batch norm knows a part."""

    def step() -> list[Tensor]:
        x = images()
        hidden = layers[0](x)
        y = layers[1](hidden) + hidden.tanh()
        return list(torch.autograd.grad(squared_gradient(y, x), [x, layers[0].weight, layers[1].weight]))

    compare(step)


def test_a_gradient_handed_on_by_hand(layers: nn.Sequential, ran: Counter[str]) -> None:
    """To the convolution's backward, without an edge from the batch norm's back to it; and to that of another one."""
    other = nn.Conv2d(3, 4, 3).double()

    def step() -> list[Tensor]:
        x = images()
        cut = layers[0](x).detach().requires_grad_()
        (of_cut,) = torch.autograd.grad(layers[1](cut).sin().sum(), cut, create_graph=True)
        (first,) = torch.autograd.grad(layers[0](x), x, of_cut, create_graph=True)
        hidden = layers[0](x)
        (of_hidden,) = torch.autograd.grad(layers[1](hidden).sin().sum(), hidden, create_graph=True)
        (second,) = torch.autograd.grad(other(x), x, of_hidden, create_graph=True)
        penalty = first.square().sum() + second.square().sum()
        return list(torch.autograd.grad(penalty, [x, cut, layers[0].weight, layers[1].weight, other.weight]))

    compare(step)
    assert ran == {"by itself": 2, "not": 2}


def test_a_graph_used_twice(layers: nn.Sequential, ran: Counter[str]) -> None:
    """Each run of the engine has its own, also after one that broke off in between."""
    interruptions = [True]

    def interrupt(gradient: Tensor) -> None:
        if interruptions and not gradient.requires_grad:
            interruptions.clear()
            raise KeyboardInterrupt

    def step(interrupted: bool = False) -> list[Tensor]:
        x = images()
        hidden = layers[0](x)
        if interrupted:
            hidden.register_hook(interrupt)  # between what is left and what takes it in
        penalty = squared_gradient(layers[1:](hidden), x)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                torch.autograd.grad(penalty, list(layers.parameters()), retain_graph=True, allow_unused=True)
        once = torch.autograd.grad(penalty, list(layers.parameters()), retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(penalty, list(layers.parameters()), allow_unused=True)
        return [gradient for gradient in (*once, *again) if gradient is not None]

    compare(step)
    with fast_double_backward():
        torch.testing.assert_close(step(interrupted=True), step(), rtol=0, atol=0)
    assert not interruptions


def test_a_run_within_a_run(layers: nn.Sequential) -> None:
    """Of the same graph, from a hook that runs between what is left and what takes it in."""

    def step() -> list[Tensor]:
        x = images()
        hidden = layers[0](x)
        penalties: list[Tensor] = []

        def differentiate_within(gradient: Tensor) -> None:
            if penalties:
                torch.autograd.grad(penalties.pop(), list(layers.parameters()), retain_graph=True, allow_unused=True)

        hidden.register_hook(differentiate_within)
        penalty = squared_gradient(layers[1:](hidden), x)
        penalties.append(penalty)
        wanted = [parameter for parameter in layers.parameters() if parameter.dim() == 4]
        return list(torch.autograd.grad(penalty, wanted, retain_graph=True))

    compare(step)


def test_threads_on_one_graph(layers: nn.Sequential) -> None:
    x = images()
    with fast_double_backward():
        penalty = squared_gradient(layers(x), x)
    weights = [layers[0].weight, layers[3].weight]
    expected = torch.autograd.grad(penalty, weights, retain_graph=True)

    def differentiate(_: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(penalty, weights, retain_graph=True)

    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(differentiate, range(60)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_run_that_breaks_off_keeps_nothing_alive(layers: nn.Sequential) -> None:
    """Between what is left and what takes it in: at the gradient of the first convolution's result."""
    broke_off = []

    def fail(gradient: Tensor) -> None:
        broke_off.append(True)
        raise KeyboardInterrupt

    def broken_step() -> weakref.ref[Tensor]:
        x = images()
        hidden = layers[0](x)
        with fast_double_backward():
            y = layers[1:](hidden := layers[0](x))
        (of_hidden,) = torch.autograd.grad(y.sin().sum(), hidden, create_graph=True)
        of_hidden.register_hook(fail)
        (gradient,) = torch.autograd.grad(hidden, x, of_hidden, create_graph=True)
        with pytest.raises(KeyboardInterrupt):
            gradient.square().sum().backward()
        return weakref.ref(x)

    left = broken_step()
    gc.collect()
    assert broke_off == [True]
    assert left() is None


def test_a_cotangent_changed_in_place_raises(layers: nn.Sequential) -> None:
    """PyTorch has computed the weight's gradient from it by then; here it would be of other values."""
    x = images()
    with fast_double_backward():
        hidden = layers[0](x)
        y = layers[1:](hidden)
    (of_hidden,) = torch.autograd.grad(y.sin().sum(), hidden, create_graph=True)
    (gradient,) = torch.autograd.grad(hidden, x, of_hidden, create_graph=True)
    cotangent = torch.ones_like(gradient)

    def overwrite(_: Tensor) -> None:
        cotangent.zero_()

    of_hidden.register_hook(overwrite)
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(gradient, layers[0].weight, cotangent)


def test_a_cotangent_that_a_hook_takes_away(layers: nn.Sequential) -> None:
    """The batch norm's node gets nothing, and yet somebody waits for what it writes."""

    def step() -> list[Tensor]:
        x = images()
        hidden = layers[0](x)
        (of_hidden,) = torch.autograd.grad(layers[1](hidden).sin().sum(), hidden, create_graph=True)
        assert of_hidden.grad_fn is not None
        of_hidden.grad_fn.register_prehook(lambda cotangents: (None,) * len(cotangents))
        (gradient,) = torch.autograd.grad(hidden, x, of_hidden, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), layers[0].weight))

    compare(step)


def test_checkpoints(layers: nn.Sequential, ran: Counter[str]) -> None:
    """The whole penalty is recomputed inside the backward, by an engine's run within another."""

    def step() -> list[Tensor]:
        layers.zero_grad()
        x = images()
        mode = backends._requested.get()

        def penalty(x: Tensor) -> Tensor:
            with torch.enable_grad(), use_backend(mode), fast_double_backward():
                inner = x if x.requires_grad else x.detach().requires_grad_()
                return squared_gradient(layers(inner), inner)

        loss = checkpoint(penalty, x, use_reentrant=True)
        assert isinstance(loss, Tensor)
        loss.backward()
        return [parameter.grad for parameter in layers.parameters() if parameter.grad is not None]

    compare(step)
    assert ran == {"beside": 2}


def test_a_hook_of_the_weight_sees_the_whole_gradient(layers: nn.Sequential) -> None:
    seen: list[Tensor] = []
    handle = layers[0].weight.register_hook(lambda gradient: seen.append(gradient.clone()))

    def step() -> list[Tensor]:
        x = images()
        y = layers(x)
        layers.zero_grad()
        (squared_gradient(y, x) + y.sum()).backward()
        assert layers[0].weight.grad is not None
        return [layers[0].weight.grad]

    with fast_double_backward():
        whole = step()
    handle.remove()
    torch.testing.assert_close(seen, whole, rtol=0, atol=0)


def test_frozen_parameters(layers: nn.Sequential, ran: Counter[str]) -> None:
    layers[0].weight.requires_grad_(False)
    layers[4].weight.requires_grad_(False)

    def step() -> list[Tensor]:
        x = images()
        wanted = [parameter for parameter in layers.parameters() if parameter.requires_grad]
        return list(torch.autograd.grad(squared_gradient(layers(x), x), wanted, materialize_grads=True))

    compare(step)
    assert ran == {"beside": 1, "not": 1}


def test_the_weight_gradient_through_the_weight_gradient(layers: nn.Sequential) -> None:
    """A penalty of ∂loss/∂W besides ∂loss/∂x: the convolution needs its gradient at once, and for both."""

    def step() -> list[Tensor]:
        x = images()
        first = layers[0].weight
        gradients = torch.autograd.grad(layers(x).sin().sum(), [x, first], create_graph=True)
        penalty = sum((gradient.square().sum() for gradient in gradients), x.new_zeros(()))
        return list(torch.autograd.grad(penalty, [x, *layers.parameters()]))

    compare(step)


def test_nothing_is_kept_after_a_step(layers: nn.Sequential) -> None:
    """Neither a convolution's node nor a batch norm's holds on to what passed through it."""
    nodes: list[Any] = []
    x = images()
    with fast_double_backward():
        y = layers(x)
        penalty = squared_gradient(y, x)

    def visit(node: Any) -> None:
        if node is not None and node not in nodes:
            nodes.append(node)
            for following, _ in node.next_functions:
                visit(following)

    visit(penalty.grad_fn)
    penalty.backward(retain_graph=True)
    left = [getattr(node, name) for node in nodes for name in ("waiting", "arrived") if hasattr(node, name)]
    assert len(left) >= 4
    assert not any(left)
