"""Packages that training needs and the core does not."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: its name, dotted if need be.
        purpose: what it is needed for, for the message: "a progress bar", "checkpoints".

    Raises:
        ImportError: the module, or one that it needs, is not installed; the message holds the command that mends it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error.name or module, purpose) from error


_EXTRAS = {"pyautoattack": "attacks"}  # which extra brings a package, where it is not train


def missing(package: str, purpose: str) -> ImportError:
    """The error for a package that is not installed."""
    package = package.partition(".")[0]
    extra = _EXTRAS.get(package, "train")
    return ImportError(
        f"{package} is not installed and is needed for {purpose}; pip install 'rds_fast[{extra}]' brings it",
        name=package,
    )


# Kept for the life of the process: torch withdraws a library's schemas when the object goes.
_torchvision_schemas: torch.library.Library | None = None


def require_torchvision(module: str, purpose: str) -> ModuleType:
    """Import a part of torchvision, also where torchvision was built for another variant of torch.

    Importing torchvision attaches shape rules to its operations nms and qnms. Where its C++ library cannot be loaded,
    as on a CPU torch beside a CUDA torchvision, these do not exist and the import fails, though nothing here
    uses them. So their schemas, without an implementation, are declared first.
    """
    global _torchvision_schemas
    if "torchvision" not in sys.modules:
        spec = importlib.util.find_spec("torchvision")
        if spec is None or not spec.submodule_search_locations:
            raise missing("torchvision", purpose)
        if not _operations_load(Path(spec.submodule_search_locations[0])) and _torchvision_schemas is None:
            _torchvision_schemas = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                _torchvision_schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return require(module, purpose)


def _operations_load(package: Path) -> bool:
    """Whether torchvision's own operations exist once its C++ library, if it has one, is loaded."""
    for library in [*package.glob("_C*.so"), *package.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
    return hasattr(torch.ops.torchvision, "nms")
