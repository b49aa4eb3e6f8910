"""torchvision's networks, fused, equal themselves at every order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rds_fast.nn import fuse, fusion_report
from rds_fast.training.models import _torchvision_models as torchvision_models

# What a batch norm is fused with: as the report says it, but for a convolution before it.
NONE, RELU, ADD, ADD_RELU = "batch norm", "batch norm → ReLU", "batch norm → add", "batch norm → add → ReLU"


def _resnet(block: str, layers: list[int]) -> nn.Module:
    resnet = torchvision_models().resnet
    return resnet.ResNet(getattr(resnet, block), layers, num_classes=5)


def _vgg11_bn() -> nn.Module:
    vgg = torchvision_models().vgg
    features = vgg.make_layers(vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features[:15], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(1024, 5))


def _small_densenet() -> nn.Module:
    densenet = torchvision_models().DenseNet
    return densenet(growth_rate=8, block_config=(2, 3), num_init_features=16, drop_rate=0.2, num_classes=5)


# Each size is the least at which the deepest layers still see several values a channel: with two, batch norm in train
# mode is a step function, and its second derivative is rounding errors.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int], int]] = {
    "resnet18": (lambda: torchvision_models().resnet18(num_classes=5), 64, {RELU: 9, ADD_RELU: 8, NONE: 3}, 0),
    "bottlenecks": (lambda: _resnet("Bottleneck", [1, 2, 1, 1]), 64, {RELU: 11, ADD_RELU: 5, NONE: 4}, 0),
    "vgg11_bn": (_vgg11_bn, 16, {RELU: 4}, 0),
    "densenet": (_small_densenet, 32, {RELU: 12}, 1),
    "mobilenet_v2": (
        lambda: torchvision_models().mobilenet_v2(num_classes=5, width_mult=0.35),
        64,
        {ADD: 10, NONE: 42},
        0,
    ),
    "googlenet": (
        lambda: torchvision_models().googlenet(aux_logits=False, init_weights=False, num_classes=5),
        64,
        {RELU: 57},
        0,
    ),
    "regnet_y_400mf": (
        lambda: torchvision_models().regnet_y_400mf(num_classes=5),
        64,
        {RELU: 33, ADD_RELU: 16, NONE: 4},
        0,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_equals_itself_at_every_order(name, assert_equal, random_model, calls) -> None:
    build, size, fusions, left = NETWORKS[name]
    torch.manual_seed(0)
    plain = random_model(build())
    fused = fuse(plain)
    report = fusion_report(fused)
    found = [fusion.removeprefix("convolution → ") for layer in report.layers for fusion in layer.fusions]
    assert Counter(found) == fusions
    assert len(report.left) == left
    assert all(layer.done for layer in report.fused)
    x = torch.rand(4, 3, size, size, dtype=torch.float64)
    for training in (True, False):
        calls.clear()
        assert_equal(plain.train(training), fused.train(training), x)
        assert Counter(calls) == {
            kind.removeprefix("batch norm").replace(" → ", " ").strip().lower(): count
            for kind, count in fusions.items()
        }


def test_densenet121_is_fused_but_for_its_last_norm_and_computes_the_same(calls) -> None:
    plain = torchvision_models().densenet121(num_classes=5).eval()
    fused = fuse(plain)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))
    assert calls == ["relu"] * 120  # a ReLU outside of the features follows the last


def test_a_layer_of_densenet_takes_a_tensor_or_a_list() -> None:
    layer = _small_densenet().features.denseblock1.denselayer1.eval()
    fused = fuse(layer)
    x = torch.rand(2, 16, 8, 8)
    for given in (x, [x], [x[:, :10], x[:, 10:]]):
        torch.testing.assert_close(fused(given), layer(given))


def test_relu6_is_not_relu() -> None:
    report = fusion_report(torchvision_models().mobilenet_v2())
    assert report.layers[0].fusions == ("convolution → batch norm",)


def test_of_two_added_batch_norms_the_main_branch_takes_the_addition() -> None:
    layers = fusion_report(_resnet("BasicBlock", [1, 1, 1, 1])).layers
    fusions = {layer.name: layer.fusions for layer in layers}
    assert fusions["layer2.0.downsample.1"] == ("convolution → batch norm",)
    report = fusion_report(torchvision_models().regnet_y_400mf())
    alone = [layer.name for layer in report.layers if layer.fusions == ("convolution → batch norm",)]
    assert {name.split(".")[-2] for name in alone} == {"proj"}


def test_a_network_can_be_compiled_after_it_is_fused() -> None:
    plain = _resnet("BasicBlock", [1, 1, 1, 1]).eval()
    compiled = torch.compile(fuse(plain), backend="eager", fullgraph=True)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x))
