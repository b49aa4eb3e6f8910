"""Packages that training needs and the core does not."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: its name, dotted if need be.
        purpose: what needs it, for the message: "a progress bar", "checkpoints".

    Raises:
        ImportError: the module, or one that it needs, is not installed; the message holds the command that mends it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error.name or module, purpose) from error


def missing(package: str, purpose: str) -> ImportError:
    """The error for a package that is not installed."""
    package = package.partition(".")[0]
    return ImportError(
        f"{package} is not installed, and {purpose} needs it; pip install 'rds_fast[train]' brings it", name=package
    )
