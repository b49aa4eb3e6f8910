"""Gradients with respect to what flows between the layers of a fused model, however it is captured.

And that nothing is lost where nobody captures: the engine's additions are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rds_fast import backends, fast_double_backward
from rds_fast.nn import fuse
from rds_fast.nn.modules import FusedBatchNorm2d, FusedForward
from rds_fast.training.models import _torchvision_models as torchvision_models

pytestmark = pytest.mark.skipif(
    backends.failure("native", "cpu") is not None, reason=f"native: {backends.failure('native', 'cpu')}"
)

X = torch.rand(3, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {"plain": nullcontext, "fast": fast_double_backward}


def block(inputs: int, outputs: int) -> nn.Module:
    downsample = None
    if inputs != outputs:
        downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
    stride = 1 if inputs == outputs else 2
    made: nn.Module = torchvision_models().resnet.BasicBlock(inputs, outputs, stride, downsample)
    return made


class Small(nn.Module):
    """A ResNet of few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(block(4, 4), block(4, 4))
        self.layer2 = nn.Sequential(block(4, 6), block(6, 6))
        self.layer3 = nn.Sequential(block(6, 6))
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.avgpool(x).flatten(1)


@pytest.fixture
def plain(random_model) -> nn.Module:
    torch.manual_seed(0)
    return random_model(Small())


Captured = tuple[Tensor, list[Tensor]]
Capture = Callable[[nn.Module, Tensor], Captured]


def by_hook(path: str, what: str) -> Capture:
    """A hook on the module at ``path``, which keeps the module's "input" or its "output"."""

    def capture(model: nn.Module, x: Tensor) -> Captured:
        kept: list[Tensor] = []
        module = model.get_submodule(path)
        if what == "pre":
            handle = module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        else:
            handle = module.register_forward_hook(
                lambda _, inputs, output: kept.append(inputs[0] if what == "input" else output)
            )
        output = model(x)
        handle.remove()
        return output, kept

    return capture


def by_global_hook(register: Callable[..., Any]) -> Capture:
    def capture(model: nn.Module, x: Tensor) -> Captured:
        kept: list[Tensor] = []
        # The last value is a module's output, or, before its call, its inputs. What is changed in place comes twice.
        handle = register(lambda module, *values: kept.append(values[-1][0] if len(values) == 1 else values[-1]))
        output = model(x)
        handle.remove()
        return output, list(dict.fromkeys(kept))

    return capture


def by_function_mode(model: nn.Module, x: Tensor) -> Captured:
    kept = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.conv2d:
                kept.append(args[0])
            return func(*args, **(kwargs or {}))

    with Watching():
        return model(x), kept[1:]  # the first is x


def by_forward_on_the_instance(path: str) -> Capture:
    def capture(model: nn.Module, x: Tensor) -> Captured:
        kept: list[Tensor] = []
        module = model.get_submodule(path)
        original = module.forward

        def forward(x: Tensor) -> Tensor:
            kept.extend([x, original(x)])
            return kept[-1]

        module.forward = forward  # type: ignore[method-assign]
        output = model(x)
        del module.forward
        return output, kept

    return capture


class Keeping(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [x, self.module(x)]
        return self.kept[1]


def by_a_module_in_the_place(path: str) -> Capture:
    """The module at ``path`` is replaced by one that keeps its argument and result, and put back."""

    def capture(model: nn.Module, x: Tensor) -> Captured:
        parent, _, name = path.rpartition(".")
        modules = model.get_submodule(parent)._modules
        module = modules[name]
        modules[name] = keeping = Keeping(module)
        output = model(x)
        modules[name] = module
        return output, keeping.kept

    return capture


def by_code_on_the_instance(path: str) -> Capture:
    """As libraries do that change a convolution's padding."""

    def capture(model: nn.Module, x: Tensor) -> Captured:
        kept: list[Tensor] = []
        module: Any = model.get_submodule(path)
        original = module._conv_forward

        def forward(x: Tensor, *parameters: Any) -> Any:
            kept.append(x)
            return original(x, *parameters)

        module._conv_forward = forward
        output = model(x)
        del module._conv_forward
        return output, kept

    return capture


def by_code_of_the_class(model: nn.Module, x: Tensor) -> Captured:
    kept: list[Tensor] = []
    original = nn.Conv2d.forward

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        kept.append(x)
        return original(self, x)

    with mock.patch.object(nn.Conv2d, "forward", forward):
        return model(x), kept[1:]  # the first is x


class KeepingReLU(nn.ReLU):
    """Gives back what it got, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, input: Tensor) -> Tensor:
        self.kept.append(input)
        return input


def by_strangers_in_the_place(model: nn.Module, x: Tensor) -> Captured:
    """In a block the ReLU is replaced, and the batch norm before it by a fused module that ends in a ReLU itself."""
    modules = model.get_submodule("layer1.1")._modules
    before = dict(modules)
    relu = KeepingReLU()
    norm = nn.Sequential(nn.Sequential(modules["bn1"], nn.ReLU()))
    modules |= {"relu": relu, "bn1": fuse(norm, inplace=True) if isinstance(modules["bn1"], FusedBatchNorm2d) else norm}
    output = model(x)
    modules |= before
    return output, relu.kept


def by_layer_getter(model: nn.Module, x: Tensor) -> Captured:
    torchvision_models()
    from torchvision.models._utils import IntermediateLayerGetter

    names = ("layer1", "layer2", "avgpool")
    *kept, output = IntermediateLayerGetter(model, {name: name for name in names})(x).values()
    return output.flatten(1), kept


def by_feature_extractor(model: nn.Module, x: Tensor) -> Captured:
    torchvision_models()
    from torchvision.models.feature_extraction import create_feature_extractor

    leaves = [FusedBatchNorm2d, torchvision_models().resnet.BasicBlock]
    leaves += [type(module) for module in model.modules() if isinstance(module, FusedForward) and module is not model]
    # FusedSequential and the model itself are traced through: their children's results are asked for.
    names = ["layer1.0", "layer1", "layer2.0", "flatten"]
    *kept, output = create_feature_extractor(
        model, names, tracer_kwargs={"leaf_modules": [leaf for leaf in leaves if leaf.__name__ != "FusedSequential"]}
    )(x).values()
    return output, kept


def by_hand(model: nn.Module, x: Tensor) -> Captured:
    kept = [model.relu(model.bn1(model.conv1(x)))]
    for child in (*model.layer1, *model.layer2, model.layer3):
        kept.append(child(kept[-1]))
    return model.avgpool(kept[-1]).flatten(1), kept


WAYS: dict[str, Capture] = {
    "output of a block": by_hook("layer1.0", "output"),
    "output of a layer's last block": by_hook("layer1.1", "output"),
    "output of a Sequential": by_hook("layer1", "output"),
    "input of a block": by_hook("layer1.1", "input"),
    "input of a block, before": by_hook("layer1.1", "pre"),
    "input of a Sequential, before": by_hook("layer2", "pre"),
    "input of a convolution": by_hook("layer1.1.conv1", "input"),
    "input of a convolution, before": by_hook("layer2.0.conv1", "pre"),
    "input of a projection": by_hook("layer2.0.downsample", "input"),
    "input of a projection's convolution": by_hook("layer2.0.downsample.0", "pre"),
    "output of a batch norm": by_hook("layer1.1.bn2", "output"),
    "outputs of a ReLU": by_hook("layer1.0.relu", "output"),
    "outputs of all": by_global_hook(nn.modules.module.register_module_forward_hook),
    "inputs of all": by_global_hook(nn.modules.module.register_module_forward_pre_hook),
    "a function mode": by_function_mode,
    "a block's forward set": by_forward_on_the_instance("layer1.1"),
    "a batch norm's forward set": by_forward_on_the_instance("layer1.1.bn2"),
    "a ReLU's forward set": by_forward_on_the_instance("layer1.1.relu"),
    "a block replaced": by_a_module_in_the_place("layer1.1"),
    "a first block replaced": by_a_module_in_the_place("layer2.0"),
    "a Sequential replaced": by_a_module_in_the_place("layer2"),
    "a convolution replaced": by_a_module_in_the_place("layer1.1.conv1"),
    "a projection's convolution replaced": by_a_module_in_the_place("layer2.0.downsample.0"),
    "a convolution's code set": by_code_on_the_instance("layer1.1.conv1"),
    "the code of all convolutions": by_code_of_the_class,
    "IntermediateLayerGetter": by_layer_getter,
    "create_feature_extractor": by_feature_extractor,
    "children called one by one": by_hand,
}


def derivatives(captured: Captured, model: nn.Module) -> list[Tensor]:
    """The gradients with respect to what was captured, and the parameters' derivatives of their squares."""
    output, kept = captured
    assert kept
    gradients = torch.autograd.grad(output.logsumexp(1).sum(), kept, create_graph=True, allow_unused=True)
    present = [gradient for gradient in gradients if gradient is not None]
    squares = sum(gradient.square().sum() for gradient in present)
    again = torch.autograd.grad(squares, list(model.parameters()), allow_unused=True)
    missing = torch.zeros(())
    return [missing if gradient is None else gradient for gradient in (*kept, *gradients, *again)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_captured_values(way: str, training: bool, mode: str, plain: nn.Module) -> None:
    fused = fuse(plain.train(training))
    results = []
    for model in (plain, fused):
        with MODES[mode]():
            captured = WAYS[way](model, X.clone().requires_grad_())
        results.append(derivatives(captured, model))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * float(expected.detach().abs().max()) + 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["layer1.0", "layer1", "layer2.0"])
def test_retained_gradients_tensor_hooks_and_backward_hooks(path: str, mode: str, plain: nn.Module) -> None:
    seen: list[list[Tensor]] = []
    for model in (plain, fuse(plain)):
        kept: list[Tensor] = []
        gradients: list[Tensor] = []
        module = model.get_submodule(path)

        def watch(_: Any, inputs: Any, output: Tensor, kept: Any = kept, gradients: Any = gradients) -> None:
            output.retain_grad()
            output.register_hook(gradients.append)
            kept.append(output)

        handles = [
            module.register_forward_hook(watch),
            module.register_full_backward_hook(lambda _, gx, gy, gradients=gradients: gradients.extend(gx + gy)),
        ]
        with MODES[mode]():
            output = model(X.clone().requires_grad_())
        output.logsumexp(1).sum().backward()
        seen.append([kept[0].grad, *gradients])
        for handle in handles:
            handle.remove()
    assert len(seen[0]) == 4
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-12)


INSIDE: dict[str, Capture] = {
    "input of a convolution": by_hook("layer1.1.conv2", "input"),
    "input of a convolution, before": by_hook("layer1.1.conv2", "pre"),
    "outputs of a ReLU": by_hook("layer1.1.relu", "output"),
    "a convolution's forward set": by_forward_on_the_instance("layer1.1.conv2"),
    "a convolution's code set": by_code_on_the_instance("layer1.1.conv2"),
    "a batch norm and a ReLU replaced": by_strangers_in_the_place,
    "a convolution replaced": by_a_module_in_the_place("layer1.1.conv2"),
    "a ReLU replaced": by_a_module_in_the_place("layer1.1.relu"),
    "a batch norm replaced": by_a_module_in_the_place("layer1.1.bn1"),
    "a Sequential replaced, after the first ReLU": by_a_module_in_the_place("layer1"),
    "input of a Sequential, after the first ReLU": by_hook("layer1", "pre"),
}


@pytest.mark.parametrize("way", {**WAYS, **INSIDE})
def test_what_is_captured_may_be_written_to_unseen(way: str, plain: nn.Module) -> None:
    """PyTorch's convolutions keep their arguments, and so see what is written through ``.data`` before the backward."""
    results = []
    for model in (plain, fuse(plain)):
        with fast_double_backward():
            x = X.clone().requires_grad_()
            output, kept = {**WAYS, **INSIDE}[way](model, x)
        for captured in kept:
            captured.data.mul_(1.5)
        (gradient,) = torch.autograd.grad(output.logsumexp(1).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum() + output.sum(), list(model.parameters())))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * float(expected.abs().max()) + 1e-12)


@pytest.mark.parametrize("pool", [nn.functional.max_pool2d, nn.functional.avg_pool2d])
def test_a_pool_of_what_was_transposed_in_place(pool: Callable[..., Tensor]) -> None:
    """It keeps nothing in its argument's stead that is of another shape."""

    class Net(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, (3, 1)), nn.BatchNorm2d(4)
            self.in_place = in_place

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.norm(self.conv(x)))
            return pool(y.transpose_(2, 3) if self.in_place else y.transpose(2, 3), (2, 3))

    results = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = fuse(Net(in_place).double())
        x = X.clone().requires_grad_()
        with fast_double_backward():
            output = model(x)
        results += torch.autograd.grad(output.flatten(1).logsumexp(1).sum(), x)
    torch.testing.assert_close(*results)


def test_hooks_for_saved_tensors_get_no_more_than_without_recipes() -> None:
    """They would copy every ingredient, and a tensor's place at its full size."""
    torch.manual_seed(0)
    plain = resnet18()
    packed = []
    for model in (plain, fuse(plain)):
        sizes: list[int] = []
        x = torch.rand(2, 3, 64, 64, requires_grad=True)

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with fast_double_backward():
                output = model(x)
            torch.autograd.grad(output.logsumexp(1).sum(), x, create_graph=True)
        packed.append(sum(sizes))
    assert packed[1] <= packed[0]


class Inferences(TorchDispatchMode):
    """Counts how often a batch norm's result is computed from given statistics."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.rds_fast.batch_norm_inference.default
        return func(*args, **(kwargs or {}))


def computed_again(model: nn.Module) -> int:
    """The results that the backward of a penalty computes again."""
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    with fast_double_backward():
        output = model(x)
    with Inferences() as inferences:
        (gradient,) = torch.autograd.grad(output.logsumexp(1).sum(), x, create_graph=True)
        assert inferences.count == 0
        torch.autograd.grad(gradient.square().sum(), list(model.parameters()))
    return inferences.count


def test_which_results_are_computed_again() -> None:
    """In ResNet-18 those between the convolutions of a block. A pool, after the first layer, wants no values."""
    assert computed_again(resnet18()) == 0
    fused = fuse(resnet18())
    assert computed_again(fused) == 8
    handle = fused.layer2[0].conv2.register_forward_pre_hook(lambda *_: None)
    assert computed_again(fused) == 7
    handle.remove()
    vgg = fuse(torchvision_models().vgg11_bn(num_classes=5).eval())
    assert computed_again(vgg) == 3  # five of the eight are followed by a pool


def test_a_weight_gradient_of_a_result_that_is_computed_again(plain: nn.Module) -> None:
    """With its own graph: the convolution's input is then in its place in the graph."""
    results = []
    for model in (plain, fuse(plain)):
        with fast_double_backward():
            output = model(X.clone())
        parameters = list(model.parameters())
        first = torch.autograd.grad(output.logsumexp(1).sum(), parameters, create_graph=True)
        results.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), parameters))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * float(expected.abs().max()) + 1e-12)


def basic_forward(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = torchvision_models().resnet.BasicBlock.forward(module, x)
    return y


def shows_its_result(self: Any, x: Tensor) -> Tensor:
    y = basic_forward(self, x)
    self.monitor(y)
    return y


def shows_its_argument(self: Any, x: Tensor) -> Tensor:
    self.monitor(x)
    return basic_forward(self, x)


def returns_its_argument_too(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return basic_forward(self, x), x


def retains_a_gradient(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x.retain_grad()
    return basic_forward(self, x), x.view_as(x)


@pytest.mark.parametrize(
    "forward", [shows_its_result, shows_its_argument, returns_its_argument_too, retains_a_gradient]
)
def test_a_block_that_does_more_with_what_it_gives_or_gets(forward: Callable[..., Any]) -> None:
    kind = type("Block", (torchvision_models().resnet.BasicBlock,), {"forward": forward})
    torch.manual_seed(0)
    plain = nn.Sequential(block(4, 4), kind(4, 4))
    plain[1].monitor = Keeping(nn.Identity())
    if forward in (shows_its_result, shows_its_argument):
        plain.append(block(4, 4))
    plain.double()
    results = []
    for model in (plain, fuse(plain)):
        with fast_double_backward():
            output = model(X[:, :1].expand(-1, 4, -1, -1))
        if isinstance(output, tuple):
            output, kept = output
            kept = kept._base if kept._is_view() else kept
        else:
            kept = model[1].monitor.kept[0]
        results.append(derivatives((output.flatten(1), [kept]), model))
    assert isinstance(model[1], FusedForward)
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


class Plain(nn.Sequential):
    """Ends in a fused operation without a residual, whose result may be computed again."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


@pytest.mark.parametrize("written", [False, True], ids=["kept", "written to"])
@pytest.mark.parametrize("part", [block, Plain])
def test_a_call_that_was_not_traced(part: Callable[[int, int], nn.Module], written: bool) -> None:
    """With an argument that it can do without, the giver's forward takes another way."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = part(4, 4), part(4, 4)

        def forward(self, x: Tensor, keeper: Any = None) -> Tensor:
            y: Tensor = self.second(self.first(x))
            if keeper is not None:
                keeper.kept = y
            return y

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.block = Pair(), part(4, 4)

        def forward(self, x: Tensor, keeper: Tensor) -> Tensor:
            y: Tensor = self.block(self.pair(x, keeper=keeper))
            return y

    torch.manual_seed(0)
    plain = Caller().double()
    results = []
    for model in (plain, fuse(plain)):
        keeper = torch.zeros(())
        with fast_double_backward():
            output = model(X[:, :1].expand(-1, 4, -1, -1), keeper)
        if written:
            keeper.kept.data.mul_(1.5)  # type: ignore[attr-defined]
        results.append(derivatives((output.flatten(1), [keeper.kept]), model))  # type: ignore[attr-defined]
    assert all(isinstance(module, FusedForward) for module in (model, model.pair, model.block))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


class Additions(TorchDispatchMode):
    """Counts the additions of two tensors of four dimensions."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.count += isinstance(args[1], Tensor) and args[0].dim() == 4
        return func(*args, **(kwargs or {}))


def additions(model: nn.Module, mode: str) -> tuple[int, int]:
    """In the first backward, and in the backward of the squared gradient, both by the engine."""
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    with MODES[mode]():
        output = model(x)
    with Additions() as first:
        (gradient,) = torch.autograd.grad(output.logsumexp(1).sum(), x, create_graph=True)
    with Additions() as second:
        torch.autograd.grad(gradient.square().sum(), list(model.parameters()))
    return first.count, second.count


def resnet18() -> nn.Module:
    model: nn.Module = torchvision_models().resnet18(num_classes=5)
    return model


def test_the_additions_that_the_engine_is_spared() -> None:
    """ResNet-18 has 8 residual blocks.

    Only the cotangents of the first one's input are added by the engine, since a pool made it; without the mode, also
    those where a projection, a convolution too, takes the other way. In the second backward 20 weights, which occur in
    forward and backward, are added up as well.
    """
    fused = fuse(resnet18())
    assert additions(resnet18(), "plain")[0] == 8
    assert additions(fused, "plain")[0] == 4
    assert additions(resnet18(), "fast")[0] == 8
    assert additions(fused, "fast") == (1, 21)


# Hooks on modules that see a block's result, and those that do not.
SEEN = ["layer1.0", "layer1.1", "layer2.0.conv1", "layer2.0.downsample", "layer2.0.downsample.0", "layer3", "layer4.1"]
NOT_SEEN = ["", "conv1", "layer1.0.conv1", "layer2.1.conv2", "layer3.0.downsample.1", "fc"]


@pytest.mark.parametrize(("path", "more"), [*((path, True) for path in SEEN), *((path, False) for path in NOT_SEEN)])
def test_a_hook_costs_its_own_additions_as_long_as_it_is_there(path: str, more: bool) -> None:
    fused = fuse(resnet18())
    handle = fused.get_submodule(path).register_forward_hook(lambda *_: None)
    first, _ = additions(fused, "fast")
    assert (first > 1) == more
    handle.remove()
    assert additions(fused, "fast")[0] == 1


def test_hooks_of_the_time_when_the_model_was_fused_may_go(plain: nn.Module) -> None:
    handle = plain.layer1[0].register_forward_hook(lambda *_: None)
    fused = fuse(plain.float())
    with_hook = additions(fused, "fast")[0]
    handle_of_the_copy = next(iter(fused.layer1[0]._forward_hooks))
    del fused.layer1[0]._forward_hooks[handle_of_the_copy]
    handle.remove()
    assert additions(fused, "fast")[0] == with_hook - 1


def test_a_sequential_hands_over_in_the_order_that_it_has_now(plain: nn.Module) -> None:
    stage = fuse(nn.Sequential(block(4, 4), block(4, 4)).double())
    assert isinstance(stage, FusedForward)
    x = X[:, :1].expand(-1, 4, -1, -1)
    torch.testing.assert_close(stage.eval()[::-1](x), stage[0](stage[1](x)))
