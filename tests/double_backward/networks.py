"""Networks at random statistics, the penalised loss written out in eager PyTorch, and how two results are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import rds_fast
from rds_fast.training.models import _torchvision_models as torchvision_models

CLASSES = 5
WEIGHT = 0.5


def _named(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision_models(), name)(num_classes=CLASSES)


def _vgg(name: str) -> Callable[[], nn.Module]:
    """With a narrow head: the 4096 units of the original are 120 million parameters that test nothing more."""

    def build() -> nn.Module:
        vgg = torchvision_models().vgg
        model = vgg.VGG(vgg.make_layers(vgg.cfgs["A"], batch_norm=name.endswith("bn")), init_weights=False)
        # A gain of √2, as the original's initialisation has: without it the input gradient vanishes with the depth.
        for module in model.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        model.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, CLASSES)
        )
        return model

    return build


def _vision_transformer(attention_dropout: float = 0.0) -> nn.Module:
    return torchvision_models().VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=24,
        mlp_dim=48,
        dropout=0.1,
        attention_dropout=attention_dropout,
        num_classes=CLASSES,
    )


# The sizes are the least at which every batch norm sees at least 8 values a channel (3 samples of 2×2 in the last
# stage): with two, batch norm in train mode is a step function, and its second derivative is rounding errors.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (_named("resnet18"), 64),
    "resnet50": (_named("resnet50"), 64),
    "vgg11": (_vgg("vgg11"), 32),
    "vgg11_bn": (_vgg("vgg11_bn"), 32),
    "densenet121": (_named("densenet121"), 64),
    "mobilenet_v2": (_named("mobilenet_v2"), 64),
    "mobilenet_v3_small": (_named("mobilenet_v3_small"), 64),
    "mobilenet_v3_large": (_named("mobilenet_v3_large"), 64),
    "efficientnet_b0": (_named("efficientnet_b0"), 64),
    "convnext_tiny": (_named("convnext_tiny"), 32),
    "regnet_y_400mf": (_named("regnet_y_400mf"), 64),
    "googlenet": (
        lambda: torchvision_models().googlenet(num_classes=CLASSES, aux_logits=False, init_weights=False),
        64,
    ),
    "vision transformer": (_vision_transformer, 32),
}


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return 0.4 * (torch.rand(like.shape, generator=generator, dtype=like.dtype) - 0.3)


def randomise_parameters(model: nn.Module, generator: torch.Generator) -> None:
    """Norms that are not the identity, and no parameters that are zero."""
    for module in model.modules():
        if isinstance(module, _BatchNorm | nn.LayerNorm):
            module.weight.data += noise(module.weight, generator)
            module.bias.data += noise(module.bias, generator)
        if hasattr(module, "layer_scale"):  # ConvNeXt starts at 1e-6, which hides its blocks
            module.layer_scale.data += 0.5
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data += noise(parameter, generator)


def randomise_statistics(model: nn.Module, x: Tensor, generator: torch.Generator) -> None:
    """Running statistics about those of x: with others a deep network's gradient vanishes or explodes in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_mean += 0.5 * noise(norm.running_mean, generator) * norm.running_var.sqrt()
        norm.running_var *= 1 + 0.5 * noise(norm.running_var, generator)


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """The network in float64, x (3, 3, size, size) and the labels."""
    build, size = NETWORKS[name]
    torch.manual_seed(seed)
    model = build()
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 3, size, size, generator=generator)
    randomise_parameters(model, generator)
    randomise_statistics(model, x, generator)
    return model.double(), x.double(), torch.tensor([1, 4, 2])


class Step(NamedTuple):
    """What a training step leaves: values, the gradients of the penalty and of the whole loss with respect to x and to
    every parameter, and the buffers."""

    values: list[Tensor]
    of_penalty: list[Tensor]
    of_total: list[Tensor]
    buffers: dict[str, Tensor]


Terms = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def eager_terms(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Total, penalty and logits, without this library."""
    logits = model(x)
    with torch.autocast("cpu", enabled=False):
        log_density = torch.logsumexp(logits.to(x.dtype), 1)
        (gradient,) = torch.autograd.grad(log_density.sum(), x, create_graph=True)
        penalty = torch.linalg.vector_norm(gradient.flatten(1), dim=1).mean()
        return F.cross_entropy(logits.to(x.dtype), y) + WEIGHT * penalty, penalty, logits


def our_terms(model: nn.Module, x: Tensor, y: Tensor, *, fast: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    loss = rds_fast.PenalizedLoss(rds_fast.DensityPenalty(), weight=WEIGHT, fast=fast)
    terms = loss(model, x, y)
    return terms.total, terms.penalty, terms.logits


def step(terms: Terms, model: nn.Module, x: Tensor, y: Tensor, *, autocast: torch.dtype | None = None) -> Step:
    """One step of a copy of the model, always with the same random numbers."""
    model = copy.deepcopy(model)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    inputs = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    with torch.random.fork_rng(devices=()), torch.autocast("cpu", autocast, enabled=autocast is not None):
        torch.manual_seed(11)
        total, penalty, logits = terms(model, x, y)
    of_penalty = torch.autograd.grad(penalty, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    of_total = torch.autograd.grad(total, inputs)
    values = [value.detach() for value in (total, penalty, logits)]
    return Step(values, list(of_penalty), list(of_total), dict(model.named_buffers()))


def assert_same_step(ours: Step, truth: Step, tolerance: float = 1e-7) -> None:
    """Every tensor relative to its own largest value: what a batch norm behind it makes vanish is rounding errors, so
    at least to 1e-5 of the largest of all."""
    for kind in ("values", "of_penalty", "of_total"):
        expected = getattr(truth, kind)
        floor = 1e-5 * max(float(tensor.abs().max()) for tensor in expected)
        assert floor > 1e-11, f"{kind}: the truth vanishes, and the test with it"
        for number, (actual, other) in enumerate(zip(getattr(ours, kind), expected, strict=True)):
            scale = max(float(other.abs().max()), floor)
            assert actual.shape == other.shape
            error = float((actual - other).abs().max()) / scale
            assert error < tolerance, f"{kind}[{number}] {tuple(other.shape)}: {error:.2e}"
    assert list(ours.buffers) == list(truth.buffers)
    for name, buffer in truth.buffers.items():
        torch.testing.assert_close(ours.buffers[name], buffer, rtol=1e-10, atol=1e-12, msg=name)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input + 3) / 6


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    assert attn_mask is None
    assert not is_causal
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return F.dropout(weights, dropout_p) @ value


def eager_step(model: nn.Module, x: Tensor, y: Tensor, *, autocast: torch.dtype | None = None) -> Step:
    """The truth. What PyTorch cannot differentiate twice stands there as a composition of what it can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "hardsigmoid", hardsigmoid)
        patch.setattr(F, "scaled_dot_product_attention", attention)
        return step(eager_terms, model, x, y, autocast=autocast)
