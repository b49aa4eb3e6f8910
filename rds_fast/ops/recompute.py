"""Tensors that are computed again, by an element-wise pass, rather than kept for the backward passes.

The result of batch norm and the gradient of its input are such tensors: what they are computed from is kept anyway, for
batch norm's own derivatives, while the convolution on either side would keep them as well, for the gradient of its
weight. So batch norm leaves recipes for them, and the convolution keeps the ingredients.

A recipe is worth nothing once its tensor was changed in place (the version tells), was given other memory, or took
another way through autograd (a sum, a cast: a new tensor without a recipe); the tensor itself is then kept, as ever.
What autograd cannot see (a write through ``.data`` in a hook) is not seen here either. Models write so into what flows
between their layers, unlike into gradients; so the recipe of a result holds only by permission, which is to be given
where nobody can hold the tensor but the layers that it goes to: ``rds_fast.nn`` knows such places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .function import Function
from .marks import Marks

# To permit one is to say that nobody will write into the tensor where autograd cannot see it.
recipes = Marks()


class Recipe(NamedTuple):
    """``rebuild(*ingredients)``, run without gradients, is the tensor again.

    like: the position of an ingredient with the tensor's shape, dtype and strides. version, address: the tensor's own,
    when the recipe held. permitted: whether it may be used.
    """

    rebuild: Callable[..., Tensor]
    ingredients: tuple[Tensor | None, ...]
    like: int
    version: int
    address: int
    permitted: bool


def attach(
    tensor: Tensor, rebuild: Callable[..., Tensor], *ingredients: Tensor | None, like: int, permitted: bool = True
) -> None:
    """Say how ``tensor`` can be computed again.

    Nothing is said where it has no memory of its own to be saved, or where a tracer of PyTorch follows tensors by name.
    """
    if type(tensor) is not Tensor or torch._C._get_tracing_state() is not None:
        return
    recipes[tensor] = Recipe(rebuild, ingredients, like, tensor._version, tensor.data_ptr(), permitted)


def stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and strides that is kept anyway, if there is one, else the tensor itself.

    For an operation that wants no more of it than those. The values do not matter, so it needs no permission.
    """
    recipe: Recipe | None = recipes.get(tensor)
    ingredient = None if recipe is None else recipe.ingredients[recipe.like]
    if ingredient is None or _layout(ingredient) != _layout(tensor):  # changed in place since
        return tensor
    return ingredient.detach()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _recipe(tensor: Tensor | None) -> Recipe | None:
    recipe: Recipe | None = None if tensor is None else recipes.get(tensor)
    if recipe is None or tensor is None or not recipe.permitted:
        return None
    return recipe if (recipe.version, recipe.address) == (tensor._version, tensor.data_ptr()) else None


class Place(Function):
    """A tensor's place in the graph: of its shape and with its derivative, and without values or memory."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.new_empty(()).expand(tensor.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        return g


class PutInPlace(Function):
    """``values``, whose derivative is that of the place."""

    @staticmethod
    def forward(place: Tensor, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        return g, None


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``, with the ingredients of a tensor that has a recipe in its place.

    The tensor's place in the graph is kept beside them. A graph of the ingredients' own would lead past the tensor, and
    its gradient, should anybody ask for it, would lack what comes from here.

    Under hooks for saved tensors, which copy what they are given, the tensors themselves are the least.
    """
    flat: list[Tensor | None] = []
    ctx.recipes = []
    are_copied = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    for tensor in tensors:
        recipe = None if are_copied else _recipe(tensor)
        if tensor is None or recipe is None:
            ctx.recipes.append((len(flat), 1, None))
            flat.append(tensor)
            continue
        ctx.recipes.append((len(flat), len(recipe.ingredients), (recipe.rebuild, recipe.like)))
        with torch.enable_grad():  # which a Function's own forward turns off
            flat += [*recipe.ingredients, Place.apply(tensor) if tensor.requires_grad else None]
    ctx.save_for_backward(*flat)


class Saved:
    """What ``save`` kept, by the tensors' numbers."""

    def __init__(self, ctx: Any) -> None:
        self._flat = ctx.saved_tensors
        self._recipes = ctx.recipes

    def __getitem__(self, number: int) -> Any:
        """The tensor, computed again if need be, in its place in the graph."""
        start, count, recipe = self._recipes[number]
        if recipe is None:
            return self._flat[start]
        with torch.no_grad():
            values = recipe[0](*self._flat[start : start + count])
        place = self._flat[start + count]
        return values if place is None or not torch.is_grad_enabled() else PutInPlace.apply(place, values)

    def is_rebuilt(self, number: int) -> bool:
        """Whether the tensor would be computed again."""
        return self._recipes[number][2] is not None

    def like(self, number: int) -> Tensor:
        """A tensor with the shape, dtype and strides of the one asked for, outside the graph, and any values."""
        start, _, recipe = self._recipes[number]
        return self._flat[start if recipe is None else start + recipe[1]].detach()
