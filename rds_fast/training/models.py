"""Classifiers for small images. Each maps (N, channels, height, width) in [0, 1] to logits (N, classes)."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import nn

from .extras import missing, require
from .names import check_name

Shape = tuple[int, int, int]


def mlp(image_shape: Shape, classes: int) -> nn.Module:
    """Two hidden layers of 256 rectified units."""
    channels, height, width = image_shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def cnn(image_shape: Shape, classes: int) -> nn.Module:
    """Three 3×3 convolutions, each halving the image, and two linear layers; no normalisation."""
    channels, height, width = image_shape
    widths = (channels, 16, 32, 64)
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.ReLU()]
        height, width = (height + 1) // 2, (width + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * height * width, 128), nn.ReLU(), nn.Linear(128, classes))


# Kept for the life of the process: torch withdraws a library's schemas when the object goes.
_torchvision_schemas: torch.library.Library | None = None


def _torchvision_models() -> ModuleType:
    """torchvision.models, also where torchvision was built for another variant of torch.

    Importing torchvision attaches shape rules to its operations nms and qnms. Where its C++ library cannot be loaded,
    as on a CPU torch beside a CUDA torchvision, these do not exist and the import fails, though no classifier uses
    them. So their schemas, without an implementation, are declared first.
    """
    global _torchvision_schemas
    if "torchvision" not in sys.modules:
        spec = importlib.util.find_spec("torchvision")
        if spec is None or not spec.submodule_search_locations:
            raise missing("torchvision", "a ResNet or VGG")
        if not _operations_load(Path(spec.submodule_search_locations[0])) and _torchvision_schemas is None:
            _torchvision_schemas = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                _torchvision_schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return require("torchvision.models", "a ResNet or VGG")


def _operations_load(package: Path) -> bool:
    """Whether torchvision's own operations exist once its C++ library, if it has one, is loaded."""
    for library in [*package.glob("_C*.so"), *package.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
    return hasattr(torch.ops.torchvision, "nms")


def _resnet(name: str) -> Callable[[Shape, int], nn.Module]:
    def build(image_shape: Shape, classes: int) -> nn.Module:
        model = getattr(_torchvision_models(), name)(num_classes=classes)
        # The stem for large images shrinks them fourfold, which leaves nothing of 28 pixels.
        model.conv1 = nn.Conv2d(image_shape[0], 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model

    return build


def vgg11(image_shape: Shape, classes: int) -> nn.Module:
    """VGG-11's convolutions without normalisation, and one linear layer on their average, as is usual at this size."""
    channels, height, width = image_shape
    vgg = _torchvision_models().vgg
    features = list(vgg.make_layers(vgg.cfgs["A"], batch_norm=False))
    features[0] = nn.Conv2d(channels, 64, 3, padding=1)
    if min(height, width) < 32:  # the fifth pooling would leave nothing
        features.pop()
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None  # torchvision's VGG has biases
            nn.init.zeros_(module.bias)
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


_BUILDERS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet18": _resnet("resnet18"),
    "resnet34": _resnet("resnet34"),
    "resnet50": _resnet("resnet50"),
    "vgg11": vgg11,
}
NAMES = tuple(_BUILDERS)


def build(name: str, image_shape: Shape, classes: int) -> nn.Module:
    """A freshly initialised classifier; torch's global random generator decides its weights.

    Args:
        name: one of ``NAMES``. The ResNets and VGG are torchvision's with a 3×3 stem of stride 1 and no max pooling
            after it.
        image_shape: (channels, height, width).
        classes: the number of logits.

    Raises:
        ValueError: the name is unknown.
        ImportError: the model needs torchvision, and it is not installed.
    """
    check_name("model", name, NAMES)
    return _BUILDERS[name](image_shape, classes)


def torchvision_classifier(name: str) -> nn.Module:
    """A classifier by its name in torchvision, as it is there, without pretrained weights; or one of ``NAMES``.

    Those of ``NAMES`` that torchvision does not have are for 32×32 images of 3 channels, with 10 classes.

    Raises:
        ValueError: the name is unknown.
        ImportError: torchvision is not installed.
    """
    torchvision = _torchvision_models()
    names = torchvision.list_models(module=torchvision)
    check_name("model", name, [*names, *(own for own in NAMES if own not in names)])
    if name not in names:
        return build(name, (3, 32, 32), 10)
    # These two draw their weights from a truncated normal distribution, which takes a minute, and warn of it.
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return cast(nn.Module, torchvision.get_model(name, weights=None, **slow))
