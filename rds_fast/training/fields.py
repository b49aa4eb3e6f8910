"""The fields of the settings, and what the command line says of each."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any


def setting(
    default: Any,
    group: str,
    help: str,
    *,
    names: tuple[str, ...] = (),
    only: tuple[str, *tuple[str, ...]] | None = None,
) -> Any:
    """A field.

    Args:
        default: its value where none is given.
        group: the heading under which the command line lists it.
        help: what it is, in a sentence.
        names: what it may be.
        only: another setting, and the values of it with which this one has an effect.
    """
    return dataclasses.field(default=default, metadata={"group": group, "help": help, "names": names, "only": only})


def put_options(function: Any, placeholder: str, options: Iterable[inspect.Parameter]) -> None:
    """Give a command an option for each setting, in the place of its ``**placeholder``."""
    signature = inspect.signature(function, eval_str=True)
    fixed = [parameter for name, parameter in signature.parameters.items() if name != placeholder]
    function.__signature__ = signature.replace(parameters=[*fixed, *options])
