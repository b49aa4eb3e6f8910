"""Tensors that are computed again, by an element-wise pass, rather than kept for the backward passes.

Batch norm's output and its input's gradient are such tensors: what they are computed from is kept anyway, for batch
norm's own derivatives, while the convolution on either side would keep them once more. So batch norm attaches a recipe
to them, and a convolution that would keep one keeps the ingredients.

A recipe is worth nothing once its tensor was changed in place (the version tells) or took another way through
autograd (a sum, a cast: a new tensor without a recipe); the tensor itself is then kept, as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

_ATTRIBUTE = "_rds_fast_recipe"


class Recipe(NamedTuple):
    """``rebuild(*ingredients)`` is the tensor again, part of the graph where gradients are enabled.

    like: the position of an ingredient with the tensor's shape, dtype and strides. version: the tensor's own, when the
    recipe held.
    """

    rebuild: Callable[..., Tensor]
    ingredients: tuple[Tensor | None, ...]
    like: int
    version: int


def attach(tensor: Tensor, rebuild: Callable[..., Tensor], *ingredients: Tensor | None, like: int) -> None:
    """Say how ``tensor`` can be computed again."""
    setattr(tensor, _ATTRIBUTE, Recipe(rebuild, ingredients, like, tensor._version))


def _recipe(tensor: Tensor | None) -> Recipe | None:
    recipe = getattr(tensor, _ATTRIBUTE, None)
    return None if recipe is None or recipe.version != tensor._version else recipe  # type: ignore[union-attr]


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``, with the ingredients of a tensor that has a recipe in its place."""
    flat: list[Tensor | None] = []
    ctx.recipes = []
    for tensor in tensors:
        recipe = _recipe(tensor)
        kept = (tensor,) if recipe is None else recipe.ingredients
        ctx.recipes.append((len(flat), len(kept), None if recipe is None else (recipe.rebuild, recipe.like)))
        flat.extend(kept)
    ctx.save_for_backward(*flat)


class Saved:
    """What ``save`` kept, by the tensors' numbers."""

    def __init__(self, ctx: Any) -> None:
        self._flat = ctx.saved_tensors
        self._recipes = ctx.recipes

    def __getitem__(self, number: int) -> Any:
        """The tensor, computed again if need be."""
        start, count, recipe = self._recipes[number]
        if recipe is None:
            return self._flat[start]
        return recipe[0](*self._flat[start : start + count])

    def like(self, number: int) -> Tensor:
        """A tensor with the shape, dtype and strides of the one asked for, outside the graph, and any values."""
        start, _, recipe = self._recipes[number]
        return self._flat[start if recipe is None else start + recipe[1]].detach()
