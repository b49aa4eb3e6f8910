"""The modules of a fused model whose forward calls chains.

A fused model has the same module objects at the same paths as the plain one, and every layer is what it was. What
changes is the ``forward`` of the modules that call layers, which is generated from a trace of the original. Wherever a
module sees that a condition under which it was traced does not hold, the original ``forward`` runs: it is still there,
and it is always right.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .layers import is_watched


def _refuse_scripting(module: nn.Module) -> nn.Module:
    """What ``torch.jit.script`` calls first of each module, to be given what it should compile."""
    raise RuntimeError(
        f"the model holds a fused {original_class(module).__name__} (rds_fast.nn.fuse), whose forward torch.jit.script "
        "cannot compile; script the model that was not fused, which has the same state dict (fuse leaves it as it is "
        "unless inplace=True), or use torch.jit.trace or torch.export, which take the fused one"
    )


class Variant(NamedTuple):
    """The generated forward for one training flag and one type of arguments, as source and the globals it names."""

    training: bool
    arguments: type
    source: str
    globals: tuple[tuple[str, Any], ...]


class Seen(NamedTuple):
    """A module that a trace looked into: its path (empty for the traced module itself), class and submodules."""

    path: str
    kind: type[nn.Module]
    children: tuple[str, ...]


class Blueprint(NamedTuple):
    """All that a generated forward is made of: its number of arguments, and what it was traced with."""

    variants: tuple[Variant, ...]
    arity: int
    seen: tuple[Seen, ...]


class _Import(NamedTuple):
    """A Python module by its name: modules themselves can be neither pickled nor copied."""

    name: str


def global_by_name(value: Any) -> Any:
    """A global of generated code in the form in which a Blueprint keeps it."""
    return _Import(value.__name__) if isinstance(value, ModuleType) else value


class FusedForward(nn.Module):
    """A module whose forward was generated. ``fused_class`` makes its subclasses, each of a module's own class too."""

    original: ClassVar[type[nn.Module]]
    blueprint: ClassVar[Blueprint]
    functions: ClassVar[dict[tuple[bool, type], Callable[..., Any]]]

    __prepare_scriptable__ = _refuse_scripting

    def _generated(self, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The forward that was traced under what holds now; None where there is none."""
        if len(args) != self.blueprint.arity or _has_any_global_hook() or self.is_outdated():
            return None
        kinds = {Tensor if isinstance(argument, Tensor) else type(argument) for argument in args}
        return self.functions.get((self.training, kinds.pop())) if len(kinds) == 1 else None

    def is_outdated(self) -> bool:
        """Whether submodules were added, removed or moved since the trace, or what it looked into is watched now.

        Replaced layers are looked up by name.
        """
        for path, kind, children in self.blueprint.seen:
            module: Any = self
            for name in path.split(".") if path else ():
                module = module._modules.get(name)
                if module is None:
                    return True
            if tuple(module._modules) != children:
                return True
            if path and (original_class(module) is not kind or is_watched(module)):
                return True
        return False

    def __setattr__(self, name: str, value: Any) -> None:
        outdated = _may_steer(self, name)
        super().__setattr__(name, value)
        if outdated:
            self.__class__ = self.original  # type: ignore[assignment]

    def __delattr__(self, name: str) -> None:
        outdated = _may_steer(self, name)
        super().__delattr__(name)
        if outdated:
            self.__class__ = self.original  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        construct, (_, *arguments), *state = reduced
        return _reconstruct, (construct, self.original, self.blueprint, *arguments), *state


_INTERNAL = frozenset(vars(nn.Module()))


def _may_steer(module: FusedForward, name: str) -> bool:
    """Whether the original forward may take another branch, or call another module, once an attribute is changed.

    A new attribute is not one that it reads: compilers and wrappers leave their marks on the modules that they meet.
    """
    return name not in _INTERNAL and not hasattr(nn.Module, name) and hasattr(module, name)


def _reconstruct(construct: Callable[..., Any], original: type, blueprint: Blueprint, *arguments: Any) -> Any:
    """Inverse of ``FusedForward.__reduce_ex__``, for copies and pickles."""
    return construct(fused_class(original, blueprint), *arguments)


@functools.cache
def _function(source: str, named: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    namespace: dict[str, Any] = {
        name: importlib.import_module(value.name) if isinstance(value, _Import) else value for name, value in named
    }
    exec(compile(source, "<rds_fast.nn.fuse>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function


def _dispatching(original: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a fused class. It shows the original's signature, which tracers and wrappers read."""

    @functools.wraps(original.forward)
    def forward(self: FusedForward, *args: Any, **kwargs: Any) -> Any:
        function = None if kwargs else self._generated(args)
        return original.forward(self, *args, **kwargs) if function is None else function(self, *args)

    return forward


@functools.cache
def fused_class(original: Any, blueprint: Blueprint) -> type[FusedForward]:
    """``original`` with the forward of ``blueprint``."""
    functions = {(v.training, v.arguments): _function(v.source, v.globals) for v in blueprint.variants}
    attributes = {
        "original": original,
        "blueprint": blueprint,
        "functions": functions,
        "forward": _dispatching(original),
        "__module__": __name__,
        "__doc__": original.__doc__,
    }
    return type(f"Fused{original.__name__}", (FusedForward, original), attributes)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was fused."""
    return module.original if isinstance(module, FusedForward) else type(module)
