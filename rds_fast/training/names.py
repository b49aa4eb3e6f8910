"""Names: choices among them, and how those of files are written."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_LISTED = 30  # more names than these would bury the one that is meant


def check_name(setting: str, name: object, names: Iterable[str]) -> None:
    """Raises ValueError, with the nearest valid name, unless ``name`` is one of ``names``."""
    names = tuple(names)
    if name not in names:
        holding = [valid for valid in names if name and str(name) in valid]  # "logit" is rather "target_logit"
        (near,) = difflib.get_close_matches(str(name), holding or names, n=1, cutoff=0.0)
        listed = f" It must be one of {', '.join(names)}" if len(names) <= _MOST_LISTED else ""
        raise ValueError(f"{setting} is {name!r}; did you mean {near!r}?{listed}")


def readable(text: str) -> str:
    """Names of files, in a text, as UTF-8 has them.

    Where the locale cannot decode a name, as in a C locale, Python keeps each byte as a lone surrogate. What is UTF-8
    after all becomes the letters that it is; other bytes stay as they are.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
