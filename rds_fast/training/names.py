"""Choices by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def check_name(setting: str, name: object, names: Iterable[str]) -> None:
    """Raises ValueError, with the nearest valid name, unless ``name`` is one of ``names``."""
    names = tuple(names)
    if name not in names:
        holding = [valid for valid in names if name and str(name) in valid]  # "logit" is rather "target_logit"
        near = (holding or difflib.get_close_matches(str(name), names, n=1, cutoff=0.0))[0]
        raise ValueError(f"{setting} is {name!r}; did you mean {near!r}? It must be one of {', '.join(names)}")
