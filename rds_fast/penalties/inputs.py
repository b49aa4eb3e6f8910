"""The inputs of a model: x, or several of them, a tuple for ``model(*x)`` or a dict for ``model(**x)``.

A penalty differentiates with respect to some of them, those at its *keys*: names in a dict, positions in a tuple. The
others, such as indices of tokens, masks and flags, are handed on as they are. x alone has the key None.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from .checks import check_input

Key = str | int | None


class Inputs(NamedTuple):
    """What a model is given, with respect to which of it a penalty differentiates, and the masks of those gradients."""

    x: Any
    keys: tuple[Key, ...] = (None,)
    masks: tuple[Tensor | None, ...] | None = None

    @staticmethod
    def checked(x: Any, with_respect_to: str | int | Sequence[str | int] | None = None, mask: Any = None) -> Inputs:
        """Those that ``rds_fast.PenalizedLoss`` was given."""
        inputs = Inputs(x, _keys_of(x, with_respect_to))
        return inputs if mask is None else inputs._replace(masks=_masks_of(mask, inputs))

    @property
    def differentiated(self) -> tuple[Tensor, ...]:
        """The tensors at the keys."""
        return (self.x,) if self.keys == (None,) else tuple(self.x[key] for key in self.keys)

    @property
    def names(self) -> tuple[str, ...]:
        """What messages call them."""
        return tuple(map(_name, self.keys))

    @property
    def samples(self) -> int:
        """N."""
        return self.differentiated[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.differentiated[0].device

    def with_differentiated(self, values: Sequence[Tensor]) -> Any:
        """x with these in their place, as a model takes it."""
        if self.keys == (None,):
            return values[0]
        new: dict[Any, Any] = dict(zip(self.keys, values, strict=True))
        if isinstance(self.x, dict):
            return {**self.x, **new}
        return tuple(new.get(index, value) for index, value in enumerate(self.x))

    def rows(self, order: Tensor) -> Inputs:
        """The samples at ``order``; a mask that is the same for all of them stays as it is."""
        masks = self.masks and tuple(
            one[order] if one is not None and one.dim() == value.dim() and one.shape[0] == self.samples else one
            for one, value in zip(self.masks, self.differentiated, strict=True)
        )
        return Inputs(rows_of(self.x, order, self.samples), self.keys, masks)

    def masked(self, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients with respect to what is differentiated, 0 where a mask leaves them out, or times its factors."""
        if self.masks is None:
            return tuple(gradients)
        return tuple(
            g if mask is None else torch.where(mask, g, 0.0) if mask.dtype == torch.bool else g * mask.to(g.dtype)
            for g, mask in zip(gradients, self.masks, strict=True)
        )


def _name(key: Key) -> str:
    return "x" if key is None else f"x[{key!r}]"


def rows_of(x: Any, order: Tensor, samples: int) -> Any:
    """The samples at ``order``. Every tensor with a row for each sample is taken to hold one of it."""
    if isinstance(x, dict):
        return {key: rows_of(value, order, samples) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        values = [rows_of(value, order, samples) for value in x]
        return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)  # the first: a NamedTuple
    return x[order] if isinstance(x, Tensor) and x.shape[:1] == (samples,) else x


def _keys_of(x: Any, with_respect_to: str | int | Sequence[str | int] | None) -> tuple[Key, ...]:
    """The inputs to differentiate with respect to: those that are named, or all floating-point tensors; checked."""
    if not isinstance(x, (tuple, dict)):
        if with_respect_to is not None:
            raise ValueError(
                f"with_respect_to is {with_respect_to!r} and x is a {type(x).__name__}; it names some of several "
                "inputs, given as a tuple or a dict"
            )
        several = "tuple(x), for model(*x)" if isinstance(x, list) else "dict(x), for model(**x)"
        check_input(x, hint=f", or several in {several}" if isinstance(x, (list, Mapping)) else "")
        return (None,)
    items: dict[Any, Any] = dict(x) if isinstance(x, dict) else dict(enumerate(x))
    keys: tuple[Any, ...]
    if with_respect_to is None:
        keys = tuple(key for key, value in items.items() if _may_be_differentiated(value))
        if not keys:
            raise TypeError(
                f"x is a {type(x).__name__} without a floating-point tensor, and a penalty needs one to differentiate "
                "with respect to: pass embeddings in the place of indices, for example"
            )
    else:
        if isinstance(with_respect_to, Iterable) and not isinstance(with_respect_to, str):
            keys = tuple(with_respect_to)
        else:
            keys = (with_respect_to,)
        _check_keys(keys, items)
    choose = "" if with_respect_to is not None else ". If it is no input of samples, name those in with_respect_to"
    for key in keys:
        check_input(items[key], _name(key), choose)
    rows = {_name(key): items[key].shape[0] for key in keys}
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"the inputs have different numbers of samples, {rows}; their first dimension must be N{choose}"
        )
    if len({items[key].device for key in keys}) > 1:
        raise ValueError(f"the inputs {', '.join(rows)} are on several devices; move them to one")
    return keys


def _may_be_differentiated(value: Any) -> TypeGuard[Tensor]:
    """Complex inputs are among them, to be refused rather than passed over."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _check_keys(keys: tuple[Any, ...], items: Mapping[Any, Any]) -> None:
    if not all(isinstance(key, (str, int)) for key in keys):
        raise TypeError(f"with_respect_to is {keys}; it must be names of inputs in a dict, or positions in a tuple")
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"with_respect_to is {keys}; it must name one input at least, and each once")
    for key in keys:
        if isinstance(key, bool) or key not in items:
            near = difflib.get_close_matches(str(key), map(str, items), n=1, cutoff=0.0)
            hint = f". Did you mean {near[0]!r}?" if isinstance(key, str) and near else ""
            raise ValueError(f"with_respect_to names {key!r}; the inputs are {', '.join(map(repr, items))}{hint}")


def check_rows(y: Any, samples: int) -> None:
    """Raise unless the labels can be cut by samples: a tensor with a row for each, or several in a tuple or a dict."""
    if isinstance(y, (tuple, dict)) or (isinstance(y, Tensor) and y.shape[:1] == (samples,)):
        return
    given = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"type {type(y).__name__}"
    raise ValueError(f"y has {given}; it must have a row for each of the {samples} samples of x, to be cut for a share")


def _masks_of(mask: Any, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The mask of each input at the keys, checked: bool, or floating-point factors, and expands to the input's shape.

    A tensor is the mask of the only input. For several it is a tuple or a dict like x; an input without one, or with
    None, is not masked.
    """
    x, keys, _ = inputs
    if keys == (None,) or (isinstance(mask, Tensor) and len(keys) == 1):
        masks: tuple[Any, ...] = (mask,)
    elif type(mask) is not type(x):
        raise TypeError(
            f"the mask is a {type(mask).__name__} and x a {type(x).__name__}, {len(keys)} of whose inputs are "
            f"differentiated; give a {type(x).__name__} of masks, with None for an input that has none"
        )
    else:
        given = mask if isinstance(mask, dict) else dict(enumerate(mask))
        for key, value in given.items():
            if value is not None and key not in keys:
                raise ValueError(
                    f"the mask has an entry {key!r}, and the penalty differentiates with respect to "
                    f"{', '.join(map(repr, keys))} alone"
                )
        masks = tuple(given.get(key) for key in keys)
    for one, value, name in zip(masks, inputs.differentiated, inputs.names, strict=True):
        if one is not None:
            _check_mask(one, value, name)
    return masks


def _check_mask(mask: Any, x: Tensor, name: str) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"the mask of {name} is a {type(mask).__name__}; it must be a torch.Tensor")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"the mask of {name} is {mask.dtype}; it must be bool, True where the gradient is penalised, or "
            "floating-point factors: mask != 0, for example"
        )
    try:
        fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}; it must expand to {name}'s, {tuple(x.shape)}, for example with a "
            "dimension of size 1 for the channels"
        )
    if mask.device != x.device:
        raise ValueError(f"the mask is on {mask.device} and {name} on {x.device}; move one to the other's device")
