"""``rds-fast doctor``: what is built, what will run here, and why not the rest."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from importlib import metadata
from typing import Any

import torch

from . import backends
from .coverage import layer_coverage
from .nn import fusion_report
from .training.models import image_size, torchvision_classifier

# And the devices for which each has native kernels.
OPERATIONS = {
    **dict.fromkeys(("logsumexp", "cross_entropy_with_logsumexp", "gradient_norm"), ("cpu", "cuda")),
    **dict.fromkeys(("batch_norm", "group_norm", "activation"), backends.LAYERS_NATIVE_ON),
}
_OPTIONAL = ("triton", "torchvision", "mlxtend", "matplotlib", "typer", "rich", "safetensors")


def version_of(distribution: str) -> str:
    """The installed version of a distribution, or ``not installed``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def build_information() -> dict[str, Any] | None:
    """What the native build recorded of itself; None where it was not built."""
    if importlib.util.find_spec("rds_fast._build_info") is None:
        return None
    return dict(importlib.import_module("rds_fast._build_info").build_info())


def report() -> list[tuple[str, list[tuple[str, str]]]]:
    """The findings as sections of (name, value)."""
    versions = [
        ("rds_fast", version_of("rds_fast")),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        *((name, version_of(name)) for name in _OPTIONAL),
    ]
    built = build_information()
    native = (
        [(name, ", ".join(value) if isinstance(value, list) else str(value)) for name, value in built.items()]
        if built is not None
        else [("native kernels", "not built (see 'Building' in README.md)")]
    )
    sections = [("versions", versions), ("native build", native)]
    for device_type in ("cpu", "cuda"):
        present = device_type == "cpu" or torch.cuda.is_available()
        device = [
            (
                operation,
                backends.automatic(device_type, native_on) if present else "cannot run: no CUDA device is present",
            )
            for operation, native_on in OPERATIONS.items()
        ]
        for backend in backends.BACKENDS:
            reason = backends.failure(backend, device_type)
            if reason is not None:
                device.append((f"not {backend}", reason))
        sections.append((f"on {device_type}", device))
    if torch.cuda.is_available():
        gpus = [
            (
                f"cuda:{index}",
                f"{torch.cuda.get_device_name(index)}, sm_{''.join(map(str, torch.cuda.get_device_capability(index)))}",
            )
            for index in range(torch.cuda.device_count())
        ]
        sections.append(("devices", gpus))
    return sections


def model_report(name: str) -> list[str]:
    """What can be made faster in a torchvision model, layer by layer, as lines of text."""
    with torch.device("meta"):
        model = torchvision_classifier(name)
    fused = str(fusion_report(model)).splitlines()
    covered = [str(layer) for layer in layer_coverage(model, (2, 3, *[image_size(name)] * 2))]
    return ["fast_double_backward, layer by layer", *covered, "", "nn.fuse, batch norm by batch norm", *fused]


def doctor(model: str | None = None) -> None:
    """Print versions, what is built, which backend each operation will use on this machine, and why not the others.

    With --model and the name of a torchvision model: print instead which of its layers fast_double_backward covers,
    and what nn.fuse would do to them.
    """
    if model is not None:
        print("\n".join(model_report(model)))
        return
    for title, entries in report():
        print(title)
        width = max(len(name) for name, _ in entries)
        for name, value in entries:
            print(f"  {name:{width}}  {value}")
        print()
