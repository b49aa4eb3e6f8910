"""The words of a command line: a recipe's name, and settings as key=value."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..evaluation.settings import EvaluationSettings
from ..training.config import TrainingConfig
from ..training.names import check_name

EVALUATION = "evaluation."  # before the keys that are the evaluation's

_KINDS: dict[str, Any] = {
    **typing.get_type_hints(TrainingConfig),
    **{EVALUATION + name: kind for name, kind in typing.get_type_hints(EvaluationSettings).items()},
}
_TRUTHS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}


class Words(NamedTuple):
    """What the words say.

    Attributes:
        recipe: a name or a path; None if there is none.
        settings: key -> text, of all words of the form key=value.
    """

    recipe: str | None
    settings: dict[str, str]


def split(words: Iterable[str], keys: Iterable[str]) -> Words:
    """Tell the recipe from the settings.

    Args:
        words: of the command line, options aside.
        keys: what may stand before the sign.

    Raises:
        ValueError: there are two recipes, a key is given twice, or a key is unknown.
    """
    recipe: str | None = None
    settings: dict[str, str] = {}
    keys = tuple(keys)
    for word in words:
        key, sign, text = word.partition("=")
        if not sign:
            if recipe is not None:
                raise ValueError(f"two recipes are given, {recipe!r} and {word!r}; give one, and settings as key=value")
            recipe = word
            continue
        key = key.removeprefix("--").replace("-", "_")
        check_name("a key", key, keys)
        if key in settings:
            raise ValueError(f"{key} is given twice, as {settings[key]!r} and {text!r}; give it once")
        settings[key] = text
    return Words(recipe, settings)


def is_several(key: str) -> bool:
    """Whether one value of a setting is several words: its commas then divide that value, not candidates."""
    return typing.get_origin(_KINDS[key]) is tuple


def value(key: str, text: str) -> Any:
    """The value that a text gives a setting.

    Raises:
        ValueError: the setting takes no such value.
    """
    kind = _KINDS[key]
    if is_several(key):
        (each, *_) = typing.get_args(kind)
        return tuple(_one(key, part, (each,)) for part in text.split(",") if part)
    return _one(key, text, typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,))


def _one(key: str, text: str, kinds: tuple[Any, ...]) -> Any:
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds:
        if text.lower() in _TRUTHS:
            return _TRUTHS[text.lower()]
        raise ValueError(f"{key} is {text!r}; it must be true or false")
    for kind, wanted in ((int, "a whole number"), (float, "a number")):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                none = ", or none" if type(None) in kinds else ""
                raise ValueError(f"{key} is {text!r}; it must be {wanted}{none}") from None
    return text


def values(settings: Mapping[str, str]) -> dict[str, Any]:
    """The values of settings, by their keys."""
    return {key: value(key, text) for key, text in settings.items()}
