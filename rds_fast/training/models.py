"""Classifiers. Each maps (N, channels, height, width) in [0, 1] to logits (N, classes)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import cast

from torch import Tensor, nn

from .extras import require_torchvision
from .names import check_name
from .normalization import NormalizedModel
from .wide_resnet import wide_resnet

Shape = tuple[int, int, int]

# From this height and width on a ResNet has torchvision's own stem, 7×7 with stride 2 and max pooling. It shrinks
# images fourfold, which leaves nothing of 28 or 32 pixels: those get a 3×3 stem with stride 1 and no pooling.
LARGE = 64


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


def rar_cnn(image_shape: Shape, classes: int) -> nn.Module:
    """The network of robust attribution regularisation on MNIST and Fashion-MNIST (Chen et al. 2019).

    Two 5×5 convolutions of 32 and 64 channels, each with a ReLU and a 2×2 max pooling after it, and a layer of 1,024
    rectified units; PyTorch's initial weights.
    """
    channels, height, width = image_shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 1024),
        nn.ReLU(),
        nn.Linear(1024, classes),
    )


def wide_resnet_28_10(image_shape: Shape, classes: int) -> nn.Module:
    """WRN-28-10 without dropout."""
    return wide_resnet(image_shape[0], classes, depth=28, widening=10)


def _torchvision_models() -> ModuleType:
    return require_torchvision("torchvision.models", "a ResNet or VGG")


def _resnet(name: str) -> Callable[[Shape, int], nn.Module]:
    def build(image_shape: Shape, classes: int) -> nn.Module:
        model = getattr(_torchvision_models(), name)(num_classes=classes)
        channels, height, width = image_shape
        large = min(height, width) >= LARGE
        if large and channels == 3:
            return cast(nn.Module, model)
        kernel, stride = (7, 2) if large else (3, 1)
        model.conv1 = nn.Conv2d(channels, 64, kernel, stride=stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        if not large:
            model.maxpool = nn.Identity()
        return model

    return build


def vgg11(image_shape: Shape, classes: int, batch_norm: bool = False) -> nn.Module:
    """VGG-11's convolutions, with or without batch norm, and a linear layer on their average, as is usual at 32×32."""
    channels, height, width = image_shape
    vgg = _torchvision_models().vgg
    features = list(vgg.make_layers(vgg.cfgs["A"], batch_norm=batch_norm))
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
    "rar-cnn": rar_cnn,
    "resnet18": _resnet("resnet18"),
    "resnet34": _resnet("resnet34"),
    "resnet50": _resnet("resnet50"),
    "wide-resnet-28-10": wide_resnet_28_10,
    "vgg11": vgg11,
    "vgg11_bn": functools.partial(vgg11, batch_norm=True),
}
NAMES = tuple(_BUILDERS)


def build(name: str, image_shape: Shape, classes: int, *, normalize: tuple[Tensor, Tensor] | None = None) -> nn.Module:
    """A freshly initialised classifier; torch's global random generator decides its weights.

    Args:
        name: one of ``NAMES``. The ResNets are torchvision's; where the height or width is below 64 they have a 3×3
            stem of stride 1 and no max pooling after it.
        image_shape: (channels, height, width).
        classes: the number of logits.
        normalize: mean and standard deviation (channels,) of the images, which the model then subtracts and divides
            by first (see ``NormalizedModel``); None: it takes the pixels as they are.

    Raises:
        ValueError: the name is unknown.
        ImportError: the model needs torchvision, and it is not installed.
    """
    check_name("model", name, NAMES)
    model = _BUILDERS[name](image_shape, classes)
    return model if normalize is None else NormalizedModel(model, *normalize)


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


def image_size(name: str) -> int:
    """Height and width of the images that a model of ``torchvision_classifier`` is for."""
    torchvision = _torchvision_models()
    if name not in torchvision.list_models(module=torchvision):
        return 32
    return 299 if name == "inception_v3" else 224
