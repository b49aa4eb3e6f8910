"""The figures of several models of one kind, as means and standard errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Scalars = Mapping[str, float | None]


class Figure(NamedTuple):
    """The mean of a figure over n models, and its standard error s / √n, s² = Σ (value − mean)² / (n − 1).

    Attributes:
        mean: None where a model has no such figure.
        error: None where there is one model, or no mean.
    """

    mean: float | None
    error: float | None = None


def summarise(models: Sequence[Scalars]) -> dict[str, Figure]:
    """Every figure that one of the models has, over all of them."""
    names = dict.fromkeys(name for scalars in models for name in scalars)
    return {name: _over_models([scalars.get(name) for scalars in models]) for name in names}


def _over_models(values: Sequence[float | None]) -> Figure:
    present = [value for value in values if value is not None]
    if len(present) < len(values) or not present:  # a mean over some of the models would be of another kind
        return Figure(None)
    if len(present) == 1:
        return Figure(present[0])
    return Figure(statistics.fmean(present), statistics.stdev(present) / math.sqrt(len(present)))
