"""The fields of the settings, and what the command line says of each."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterable
from typing import Annotated, Any


def setting(
    default: Any,
    group: str,
    help: str,
    *,
    names: tuple[str, ...] = (),
    only: tuple[str, *tuple[str, ...]] | None = None,
    place: bool = False,
    path: bool = False,
) -> Any:
    """A field.

    Args:
        default: its value where none is given.
        group: the heading under which the command line lists it.
        help: what it is, in a sentence.
        names: what it may be.
        only: another setting, and the values of it with which this one has an effect.
        place: it belongs to the place where a run is computed and watched, not to the experiment: another machine, or
            another day, may have another value, and the numbers are the same.
        path: it is a file or a folder, which belongs to the place too.
    """
    metadata = {"group": group, "help": help, "names": names, "only": only, "place": place or path, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


def absolute(path: str) -> str:
    """A path as what it means here and now, wherever it is read later. Links stay links, which may move."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # kept by a run in another locale, whose file system has the same bytes
        path = os.fsdecode(path.encode("utf-8", "surrogateescape"))
    return os.path.abspath(os.path.expanduser(path))


def option(
    field: dataclasses.Field[Any], kind: Any, flags: Iterable[str] = (), *, names: Iterable[str] = (), remark: str = ""
) -> inspect.Parameter:
    """A field as an option of a command; its default None says that it was not given.

    Args:
        field: made by ``setting``, or of the same metadata.
        kind: what the option takes.
        flags: how it is spelt; default: as its name.
        names: what it may be, where that is not the field's.
        remark: stands after the field's help.
    """
    import typer  # the library does without

    flag, default = "--" + field.name.replace("_", "-"), field.default
    flags = flags or [f"{flag}/--no-{flag[2:]}" if kind is bool else flag]
    explained = [field.metadata["help"], remark, " | ".join(names or field.metadata["names"])]
    if default not in (None, ()):  # here, since the option's own default is None
        explained.append(f"(default: {','.join(map(str, default)) if isinstance(default, tuple) else default})")
    info = typer.Option(*flags, help=" ".join(filter(None, explained)), rich_help_panel=field.metadata["group"])
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def put_options(function: Any, placeholder: str, options: Iterable[inspect.Parameter]) -> None:
    """Give a command an option for each setting, in the place of its ``**placeholder``."""
    signature = inspect.signature(function, eval_str=True)
    fixed = [parameter for name, parameter in signature.parameters.items() if name != placeholder]
    function.__signature__ = signature.replace(parameters=[*fixed, *options])
