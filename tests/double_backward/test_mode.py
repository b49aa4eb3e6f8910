"""What ``fast_double_backward`` means beside other modes, threads, exceptions, and what models do in their forwards."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rds_fast
from rds_fast import fast_double_backward, use_backend
from rds_fast.nn import fuse
from rds_fast.training.models import _torchvision_models as torchvision_models

pytestmark = pytest.mark.skipif(
    rds_fast.backends.failure("native", "cpu") is not None,
    reason=f"native: {rds_fast.backends.failure('native', 'cpu')}",
)

X = torch.randn(4, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(5, 3),
    ).double()


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


class Block(nn.Module):
    """Layers that the forwards below use more than once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 3)
        self.double()

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x))


class Shared(Block):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.silu(self.features(x))
        return self.linear(x.mean((2, 3)))


class SharedInFused(Block):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(self.convolution, self.norm, nn.ReLU(), self.convolution, self.norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layers(self.layers(x)).mean((2, 3)))


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.features(x), inplace=True)
        second = self.features(first)
        second.add_(first)
        second = second.relu_() * 2
        second = self.convolution(second)
        second += first
        third = self.features(F.silu(second * 1.5, inplace=True)) * 1
        third[:, :1] = 0
        third[:, 1].tanh_()
        third = F.hardtanh_(third * 2, -0.7, 0.7)
        return self.linear(third.mean((2, 3)))


class NoGrad(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.features(x))
        with torch.no_grad():
            gate = torch.sigmoid(self.features(hidden))
        return self.linear((hidden * gate * torch.sigmoid(hidden.detach())).mean((2, 3)))


class Functional(Block):
    """torch.func inside the forward."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.features(x)
        slope = torch.func.vmap(torch.func.grad(lambda t: F.silu(t).square().sum()))(hidden)
        mapped = torch.func.vmap(lambda t: F.relu(self.convolution(t)))(hidden)
        return self.linear((slope + mapped).mean((2, 3)))


class Energy(Block):
    """torch.autograd.grad inside the forward."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.features(x)
        with torch.enable_grad():
            inner = hidden.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.convolution(inner).square().sum(), inner, create_graph=True)
        return self.linear((hidden + force).mean((2, 3)))


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda t: F.silu(self.features(t)), self.convolution(x), use_reentrant=False)
        return self.linear(self.convolution(hidden).mean((2, 3)))


class CheckpointedWithoutParameters(Block):
    """PyTorch's check of what is recomputed, by shapes, cannot tell our saved tensors from its own here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, affine=False, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(checkpoint(self.norm, self.convolution(x), use_reentrant=False).square().mean((2, 3)))


class SavedOnCpu(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return self.linear(F.silu(self.convolution(F.relu(self.features(x)))).mean((2, 3)))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 4, 3, dtype=torch.complex128)
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.sigmoid(self.convolution(torch.fft.fft2(x)) / 9).abs().mean((2, 3)))


def _with(layer: int, module: nn.Module) -> nn.Sequential:
    model = small_network()
    model[layer] = module.double()
    return model


def _parametrized() -> nn.Module:
    model = small_network()
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[3])
    parametrizations.orthogonal(model[8])
    return model


def _frozen(*layers: int) -> nn.Module:
    model = small_network()
    for layer in layers:
        model[layer].requires_grad_(False)
    return model


def _half_frozen() -> nn.Module:
    model = small_network()
    for parameter in (model[0].weight, model[1].bias, model[3].bias, model[4].weight):
        parameter.requires_grad_(False)
    return model


def _partly_in_eval_mode() -> nn.Module:
    model = small_network()
    model[1].eval()
    return model


def _scripted() -> nn.Module:
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double()
    return _with(2, torch.jit.script(inner))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": small_network,
    "shared layers": Shared,
    "shared layers, fused": lambda: fuse(SharedInFused()),
    "in place": InPlace,
    "no_grad and detach": NoGrad,
    "torch.func": Functional,
    "autograd.grad": Energy,
    "checkpointed": Checkpointed,
    "checkpointed, no parameters": CheckpointedWithoutParameters,
    "checkpointed, fused": lambda: fuse(Checkpointed()),
    "save_on_cpu": SavedOnCpu,
    "complex": Complex,
    "parametrized": _parametrized,
    "frozen convolution": lambda: _frozen(0),
    "frozen, but the head": lambda: _frozen(0, 1, 3, 4),
    "frozen throughout": lambda: _frozen(0, 1, 3, 4, 8),
    "frozen throughout, fused": lambda: fuse(_frozen(0, 1, 3, 4, 8)),
    "half of the parameters frozen": _half_frozen,
    "partly in eval mode": _partly_in_eval_mode,
    "cumulative statistics": lambda: _with(1, nn.BatchNorm2d(4, momentum=None)),
    "synchronised batch norm": lambda: _with(1, nn.SyncBatchNorm(4)),
    "scripted": _scripted,
    "recurrent": lambda: _with(7, nn.Sequential(nn.Flatten(2), nn.LSTM(1, 1), _First(), nn.Flatten())),
}


class _First(nn.Module):
    def forward(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]


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
            done.wait(60)

    thread = threading.Thread(target=holding)
    thread.start()
    assert inside.wait(60)
    assert not is_fast(model(x))
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
    assert inner.masks == [[True, False, False]] * convolutions
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
