"""What a metric gives: numbers, curves and tables, and remarks on them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Curve:
    """A figure as a function of another, point by point.

    Attributes:
        x_label, y_label: what is along the axes, with the unit where there is one.
        x, y: of equal length. NaN where a point has no value.

    Raises:
        ValueError: x and y differ in length.
    """

    x_label: str
    y_label: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("x", "y"):  # a list, as JSON has it, is welcome
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.x) != len(self.y):
            raise ValueError(
                f"the curve has {len(self.x)} values of x and {len(self.y)} of y; it needs one y for each x"
            )


@dataclasses.dataclass(frozen=True)
class Results:
    """What was found of one model on one split.

    Attributes:
        scalars: name -> a figure; None where it was looked for and does not exist. Accuracies and shares are in [0, 1].
        curves: name -> curve.
        tables: name -> rows, each of the same columns: words, numbers or None.
        notes: sentences that a reader of the figures should know.
    """

    scalars: dict[str, float | None] = dataclasses.field(default_factory=dict)
    curves: dict[str, Curve] = dataclasses.field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it. A number that is not finite becomes null."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Results:
        """What ``to_json`` wrote; a point of a curve that was not finite is NaN.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is something else.
        """
        curves = {
            name: Curve(curve["x_label"], curve["y_label"], _numbers(curve["x"]), _numbers(curve["y"]))
            for name, curve in content["curves"].items()
        }
        return cls(dict(content["scalars"]), curves, dict(content["tables"]), tuple(content["notes"]))


@dataclasses.dataclass(frozen=True)
class Evaluation(Results):
    """The results of all metrics that were measured.

    Attributes:
        samples: how many were measured; a metric that looks at fewer says so in its notes.
        seconds: metric -> the time it took.
    """

    samples: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Evaluation:
        """What ``to_json`` wrote; raises as that of ``Results`` does."""
        results = Results.from_json(content)
        return cls(**vars(results), samples=int(content["samples"]), seconds=dict(content["seconds"]))


def merged(parts: list[Results]) -> Results:
    """The results of several metrics as one, in their order.

    Raises:
        ValueError: two of them give a figure, curve or table of one name.
    """
    whole = Results(notes=tuple(note for part in parts for note in part.notes))
    for kind in ("scalars", "curves", "tables"):
        for part in parts:
            for name, value in getattr(part, kind).items():
                if name in getattr(whole, kind):
                    raise ValueError(f"two metrics give {name!r} among their {kind}; each name belongs to one metric")
                getattr(whole, kind)[name] = value
    return whole


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: list[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)
