"""What ``fast_double_backward`` means beside other modes, threads, exceptions, and what models do in their forwards."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from forwards import MODELS, Block, X, small_network
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack, handle_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rds_fast
from rds_fast import fast_double_backward, use_backend
from rds_fast.training.models import _torchvision_models as torchvision_models

pytestmark = pytest.mark.skipif(
    rds_fast.backends.failure("native", "cpu") is not None,
    reason=f"native: {rds_fast.backends.failure('native', 'cpu')}",
)


def is_fast(output: Tensor) -> bool:
    """Whether one of our Functions is in the graph of an output."""
    seen, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__module__.startswith("rds_fast") or "rds_fast" in str(getattr(type(node), "_forward_cls", "")):
            return True
        nodes += [after for after, _ in node.next_functions]
    return False


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    output = model(x)
    (gradient,) = torch.autograd.grad(output.logsumexp(1).sum(), x, create_graph=True)
    return gradient.square().sum() + output.sin().sum()


def derivatives(model: nn.Module, *, fast: bool) -> list[Tensor]:
    """The loss, its gradients with respect to x and all parameters, and the buffers afterwards; of a copy."""
    model = copy.deepcopy(model)
    x = X.clone().requires_grad_()
    with fast_double_backward() if fast else nullcontext():
        loss = loss_of(model, x)
    if fast:
        assert is_fast(loss)
    inputs = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients, *model.buffers()]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """To 1e-10 of the largest: the gradient of a bias before a batch norm is rounding errors."""
    floor = 1e-10 * max(float(tensor.detach().abs().max()) for tensor in theirs)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=floor)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model = MODELS[name]()
    assert_same(derivatives(model, fast=True), derivatives(model, fast=False))


def test_reentrant_checkpointing_raises_pytorchs_error() -> None:
    block = Block()
    x = X.clone().requires_grad_()
    with fast_double_backward():
        output = checkpoint(block.features, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        torch.autograd.grad(output.sum(), x)


def test_nested_modes_and_backends() -> None:
    model, x = small_network(), X.clone().requires_grad_()
    depth = _len_torch_function_stack()
    with fast_double_backward() as outer:
        with fast_double_backward():
            assert _len_torch_function_stack() == depth + 2
            assert is_fast(model(x))
        assert is_fast(model(x))
        with outer:
            assert is_fast(model(x))
        with use_backend("reference"):
            assert not is_fast(model(x))
        plain = rds_fast.density_penalty(model, X, fast=False)
        assert not is_fast(plain)
        assert is_fast(rds_fast.density_penalty(model, X))
        torch.testing.assert_close(rds_fast.density_penalty(model, X), plain)
        assert is_fast(model(x))
    assert _len_torch_function_stack() == depth
    assert not is_fast(model(x))


class Stop(Exception):
    pass


def test_an_exception_leaves_the_mode() -> None:
    model, x = small_network(), X.clone().requires_grad_()

    def interrupted(x: Tensor) -> Tensor:
        model[:4](x)
        raise Stop

    depth = _len_torch_function_stack()
    with pytest.raises(Stop), fast_double_backward():
        interrupted(x)
    with pytest.raises(Stop):
        rds_fast.density_penalty(interrupted, X)
    with pytest.raises(Stop):
        rds_fast.PenalizedLoss(rds_fast.DensityPenalty())(interrupted, X, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="channels"), fast_double_backward():  # inside one of our operations
        model(torch.zeros(1, 2, 7, 7, dtype=torch.float64, requires_grad=True))
    # inside a function of PyTorch's that the mode goes on into
    with pytest.raises(RuntimeError), fast_double_backward():
        F.max_pool1d(torch.zeros(1, 2, 7, requires_grad=True), 9, return_indices=True)
    assert _len_torch_function_stack() == depth
    assert not is_fast(model(x))


def test_a_mode_holds_for_its_thread_alone() -> None:
    model, x = small_network(), X.clone().requires_grad_()
    found: dict[str, object] = {}

    def elsewhere() -> None:
        found["outside"] = is_fast(model(x))
        with fast_double_backward():
            found["inside"] = is_fast(model(x))

    def run() -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    with fast_double_backward():
        run()
    assert found == {"outside": False, "inside": True}
    inside, done = threading.Event(), threading.Event()

    def holding() -> None:
        with fast_double_backward():
            inside.set()
            done.wait()

    thread = threading.Thread(target=holding)
    thread.start()
    inside.wait()
    try:
        assert not is_fast(model(x))
    finally:  # else the thread would wait for ever
        done.set()
        thread.join()


def test_a_subclass_of_tensor_keeps_its_own_ways() -> None:
    seen = []

    class Loud(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    x = torch.randn(2, 3, 5, 5)
    with fast_double_backward():
        output = F.conv2d(x.as_subclass(Loud), weight)
    assert type(output) is Loud
    assert F.conv2d in seen
    torch.testing.assert_close(output.as_subclass(Tensor), F.conv2d(x, weight))


def test_out_arguments() -> None:
    x, out = torch.randn(5), torch.empty(5)
    with fast_double_backward():
        assert torch.sigmoid(x, out=out) is out
    torch.testing.assert_close(out, torch.sigmoid(x))


def test_numpys_names_of_an_input() -> None:
    """PyTorch takes them for those builtins that it parses itself."""
    x = torch.randn(2, 3, 4, 4)
    with fast_double_backward():
        assert torch.equal(torch.relu(a=x), x.relu())
        assert torch.equal(torch.max_pool2d(x=x, kernel_size=2), F.max_pool2d(x, 2))


def test_one_graph_used_twice() -> None:
    results = []
    for fast in (True, False):
        model, x = small_network(), X.clone().requires_grad_()
        with fast_double_backward() if fast else nullcontext():
            loss = loss_of(model, x)
        loss.backward(retain_graph=True)
        once = [parameter.grad.clone() for parameter in model.parameters()]
        loss.backward()
        for first, parameter in zip(once, model.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, 2 * first)
        results.append([x.grad, *once])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    assert_same(*results)


def test_accumulation_over_two_batches() -> None:
    model, other = small_network(), small_network()
    loss, y = rds_fast.PenalizedLoss(rds_fast.DensityPenalty()), torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        loss(model, X, y).total.backward()
    (loss(other, X, y).total * 2).backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])


class ConvolutionBackwards(TorchDispatchMode):
    """The output masks (of the input, the weight, the bias) of all convolutions' backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("training", "fast"), [(True, False), (True, True), (False, True)])
def test_a_forward_in_train_mode_between_another_and_its_backward(training: bool, fast: bool) -> None:
    """A discriminator sees generated images, then real ones in the mode, and both have one backward."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    generated, real = torch.randn(2, 6, 4, dtype=torch.float64)

    def losses(discriminator: nn.Module, fast: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        with fast_double_backward() if fast[0] else nullcontext():
            first = discriminator.train(training)(generated).sin().sum()
        with fast_double_backward() if fast[1] else nullcontext():
            second = loss_of(discriminator.train(), real.clone().requires_grad_())
        assert is_fast(second) == fast[1]
        return first, second

    # Each alone: in eval mode PyTorch's own first backward would read the statistics as the second forward left them.
    alone = copy.deepcopy(model)
    losses(alone, (False, False))[1].backward()
    first = copy.deepcopy(model).train(training)
    first(generated).sin().sum().backward()
    expected = [p.grad + q.grad for p, q in zip(alone.parameters(), first.parameters(), strict=True)]
    tested = copy.deepcopy(model)
    sum(losses(tested, (fast, True))).backward()
    torch.testing.assert_close([p.grad for p in tested.parameters()], expected)
    torch.testing.assert_close(list(tested.buffers()), list(alone.buffers()))


def test_no_weight_gradient_in_the_inner_pass_of_a_resnet() -> None:
    torch.manual_seed(0)
    model = torchvision_models().resnet18(num_classes=5)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    parameters = list(model.parameters())
    with fast_double_backward():
        output = model(x).logsumexp(1).sum()
    with ConvolutionBackwards() as inner:
        (gradient,) = torch.autograd.grad(output, x, create_graph=True)
    assert inner.masks == []  # transposed convolutions
    with ConvolutionBackwards() as outer:
        gradient.square().sum().backward(retain_graph=True)
    assert sum(mask[1] for mask in outer.masks) == 2 * convolutions
    with ConvolutionBackwards() as both:
        gradients = torch.autograd.grad(output, [x, *parameters], create_graph=True)
    assert both.masks == [[True, True, False]] * convolutions
    torch.testing.assert_close(gradients[0], gradient)
    assert all(g.requires_grad and g.any() for g in gradients[1:-2])


def test_the_gradient_of_all_gradients() -> None:
    results = []
    for fast in (True, False):
        model, x = small_network(), X.clone().requires_grad_()
        inputs = [x, *model.parameters()]
        with fast_double_backward() if fast else nullcontext():
            output = model(x)
        gradients = torch.autograd.grad(output.logsumexp(1).sum() + output.sin().sum(), inputs, create_graph=True)
        loss = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        results.append([*gradients, *torch.autograd.grad(loss, inputs)])
    assert_same(*results)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batched_cotangents(training: bool) -> None:
    """Right at first order; at second order, where PyTorch's vmap drops the graph of custom functions, an error."""
    model, x = small_network().train(training), X.clone().requires_grad_()
    cotangents = torch.randn(2, 4, 3, dtype=torch.float64)
    with fast_double_backward():
        output = model(x)
    (batched,) = torch.autograd.grad(output, x, cotangents, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(output, x, one, retain_graph=True)[0] for one in cotangents]
    torch.testing.assert_close(batched, torch.stack(single))
    with pytest.raises(RuntimeError, match=r"is_grads_batched=True and create_graph=True.*once a cotangent"):
        torch.autograd.grad(output, x, cotangents, is_grads_batched=True, create_graph=True)


class WithoutHash:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_callable_without_a_hash() -> None:
    with fast_double_backward():
        assert handle_torch_function(WithoutHash(), (X,), torch.ones(())) == 2
