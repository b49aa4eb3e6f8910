"""Gradients with respect to what flows between the layers of a fused model, however it is captured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from rds_fast import backends, fast_double_backward
from rds_fast.nn import fuse
from rds_fast.nn.modules import FusedForward
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
    kept: dict[nn.Module, Tensor] = {}
    original = nn.Conv2d.forward

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        kept[self] = x
        return original(self, x)

    with mock.patch.object(nn.Conv2d, "forward", forward):
        output = model(x)
    # A projection may be called before the branch beside it. The first input is x.
    return output, [kept[module] for module in model.modules() if module in kept][1:]


def by_layer_getter(model: nn.Module, x: Tensor) -> Captured:
    torchvision_models()
    from torchvision.models._utils import IntermediateLayerGetter

    names = ("layer1", "layer2", "avgpool")
    *kept, output = IntermediateLayerGetter(model, {name: name for name in names})(x).values()
    return output.flatten(1), kept


def by_feature_extractor(model: nn.Module, x: Tensor) -> Captured:
    torchvision_models()
    from torchvision.models.feature_extraction import create_feature_extractor

    leaves = [torchvision_models().resnet.BasicBlock]
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
    "input of a convolution inside a chain": by_hook("layer1.1.conv2", "input"),
    "input of a convolution inside a chain, before": by_hook("layer1.1.conv2", "pre"),
    "outputs of a ReLU used twice": by_hook("layer1.1.relu", "output"),
    "the forward of a convolution inside a chain set": by_forward_on_the_instance("layer1.1.conv2"),
    "the code of a convolution inside a chain set": by_code_on_the_instance("layer1.1.conv2"),
    "a convolution inside a chain replaced": by_a_module_in_the_place("layer1.1.conv2"),
    "a ReLU replaced": by_a_module_in_the_place("layer1.1.relu"),
    "a batch norm replaced": by_a_module_in_the_place("layer1.1.bn1"),
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
