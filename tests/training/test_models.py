"""The classifiers: shapes, double backward, and torchvision where its own operations are missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

import rds_fast
from rds_fast.training import models, wide_resnet


def skip_without_torchvision() -> None:
    """Not by importing it: the first import of torchvision must be that of the code under test."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")


TORCHVISION = ("resnet18", "resnet34", "resnet50", "vgg11", "vgg11_bn")


def build(name: str, shape: tuple[int, int, int], classes: int = 10) -> torch.nn.Module:
    if name in TORCHVISION:
        skip_without_torchvision()
    torch.manual_seed(0)
    return models.build(name, shape, classes)


# BlockMNIST, MNIST (too small for VGG's fifth pooling), CIFAR, Tiny ImageNet, photographs: one channel and three.
@pytest.mark.parametrize("shape", [(1, 56, 28), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 128, 128)])
@pytest.mark.parametrize("name", models.NAMES)
def test_logits_have_one_row_a_sample(name: str, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):  # shapes alone: ResNet-50 needs seconds otherwise
        assert build(name, shape, classes=7)(torch.empty(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", ["mlp", "cnn", "rar-cnn", "resnet18", "vgg11", "vgg11_bn"])
def test_input_gradients_reach_the_parameters(name: str) -> None:
    model = build(name, (1, 28, 28))
    x = torch.rand(2, 1, 28, 28, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x, create_graph=True)
    assert gradient.norm() > 0
    gradient.square().sum().backward()
    first = next(model.parameters()).grad
    assert first is not None
    assert first.isfinite().all()
    assert first.norm() > 0


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_stem_keeps_small_images_large(name: str) -> None:
    model = build(name, (3, 32, 32))
    stem = model.conv1
    assert (stem.in_channels, stem.kernel_size, stem.stride) == (3, (3, 3), (1, 1))
    assert model.maxpool(model.relu(model.bn1(stem(torch.rand(2, 3, 32, 32))))).shape == (2, 64, 32, 32)


@pytest.mark.parametrize("channels", [1, 3])
def test_large_images_get_the_usual_stem(channels: int) -> None:
    model = build("resnet18", (channels, 64, 64))
    stem = model.conv1
    assert (stem.in_channels, stem.kernel_size, stem.stride) == (channels, (7, 7), (2, 2))
    assert model.maxpool(model.relu(model.bn1(stem(torch.rand(2, channels, 64, 64))))).shape == (2, 64, 16, 16)
    assert build("resnet18", (channels, 64, 63)).conv1.kernel_size == (3, 3)


def test_mlp_is_the_one_of_the_demo() -> None:
    shapes = [tuple(parameter.shape) for parameter in build("mlp", (1, 56, 28)).parameters()]
    assert shapes == [(256, 1568), (256,), (256, 256), (256,), (10, 256), (10,)]


def test_the_network_of_the_rar_paper() -> None:
    """conv 5×5-32, pool, conv 5×5-64, pool, 1024, 10: the sum of its weights, written out."""
    model = build("rar-cnn", (1, 28, 28))
    convolutions = (25 * 1 + 1) * 32 + (25 * 32 + 1) * 64
    assert parameters(model) == convolutions + (7 * 7 * 64 + 1) * 1024 + (1024 + 1) * 10 == 3_274_634
    x = torch.rand(2, 1, 28, 28)
    assert [tuple(model[:end](x).shape[1:]) for end in (1, 3, 6, 7)] == [
        *((32, 28, 28), (32, 14, 14), (64, 7, 7), (3136,)),
    ]


def test_wide_resnet_28_10_is_the_papers() -> None:
    """36.5 million parameters, as the paper says, and 28 convolutions: the first, 24 in blocks, 3 in shortcuts."""
    with torch.device("meta"):
        model = build("wide-resnet-28-10", (3, 32, 32))
    assert parameters(model) == 36_479_194
    convolutions = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 28
    assert len([name for name in convolutions if "shortcut" in name]) == 3


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("channels", "stride"), [(6, 1), (4, 1), (4, 2)])
def test_a_wide_block_is_its_formula(channels: int, stride: int) -> None:
    torch.manual_seed(0)
    block = wide_resnet.Block(channels, 6, stride).double()
    x = torch.randn(3, channels, 8, 8, dtype=torch.float64)
    f = torch.nn.functional

    def normalised(values: torch.Tensor) -> torch.Tensor:
        mean, variance = values.mean((0, 2, 3), keepdim=True), values.var((0, 2, 3), correction=0, keepdim=True)
        return ((values - mean) / (variance + 1e-5).sqrt()).relu()

    residual = f.conv2d(
        normalised(f.conv2d(normalised(x), block.conv1.weight, stride=stride, padding=1)), block.conv2.weight, padding=1
    )
    kept = x if channels == 6 else f.conv2d(normalised(x), block.shortcut.weight, stride=stride)
    assert (block.shortcut is None) == (channels == 6)
    torch.testing.assert_close(block(x), residual + kept)


def test_every_batch_norm_of_a_wide_resnet_is_fused() -> None:
    torch.manual_seed(0)
    model = wide_resnet.wide_resnet(3, 5, depth=10, widening=2)
    fused = rds_fast.nn.fuse(model)
    assert len(rds_fast.nn.fusion_report(fused).fused) == 7
    assert not rds_fast.nn.fusion_report(fused).left
    x = torch.rand(4, 3, 12, 12)
    penalties = [rds_fast.density_penalty(each, x.clone().requires_grad_()) for each in (model, fused)]
    torch.testing.assert_close(*penalties)


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
def test_vgg11_has_eight_convolutions(name: str) -> None:
    model = build(name, (3, 32, 32))
    kinds = [type(module).__name__ for module in model]
    assert kinds.count("Conv2d") == 8
    assert kinds.count("BatchNorm2d") == (8 if name.endswith("_bn") else 0)
    assert kinds.count("MaxPool2d") == 5


def test_weights_follow_the_seed() -> None:
    for a, b in zip(build("cnn", (1, 28, 28)).parameters(), build("cnn", (1, 28, 28)).parameters(), strict=True):
        assert torch.equal(a, b)


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="model is 'resnet-18'; did you mean 'resnet18'"):
        models.build("resnet-18", (1, 28, 28), 10)


def test_missing_torchvision_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"torchvision is not installed.*pip install 'rds_fast\[train\]'"):
        models.build("resnet18", (1, 28, 28), 10)


def test_torchvision_is_imported_with_its_operations_or_without() -> None:
    """In a process of its own, since an import happens once: the schemas are declared only where they are missing."""
    skip_without_torchvision()
    script = """
from rds_fast.training import extras, models
models.build("resnet18", (1, 28, 28), 10)
import sys, torch
native = bool(sys.modules["torchvision"].extension._has_ops())
assert native == (extras._torchvision_schemas is None), native
assert hasattr(torch.ops.torchvision, "nms")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
