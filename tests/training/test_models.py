"""The classifiers: shapes, double backward, and torchvision where its own operations are missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from rds_fast.training import models


def skip_without_torchvision() -> None:
    """Not by importing it: the first import of torchvision must be that of the code under test."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")


TORCHVISION = ("resnet18", "resnet34", "resnet50", "vgg11")


def build(name: str, shape: tuple[int, int, int], classes: int = 10) -> torch.nn.Module:
    if name in TORCHVISION:
        skip_without_torchvision()
    torch.manual_seed(0)
    return models.build(name, shape, classes)


# BlockMNIST, MNIST (too small for VGG's fifth pooling), CIFAR: odd and even sizes, one channel and three.
@pytest.mark.parametrize("shape", [(1, 56, 28), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", models.NAMES)
def test_logits_have_one_row_a_sample(name: str, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):  # shapes alone: ResNet-50 needs seconds otherwise
        assert build(name, shape, classes=7)(torch.empty(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18", "vgg11"])
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
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
