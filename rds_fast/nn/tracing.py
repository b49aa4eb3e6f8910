"""The forward of one module as a graph, in which every module that it calls is one node.

Only what the forward itself does is recorded, so that the modules that it calls keep their own say: their training
flags, their branches on data, their hooks. A trace is taken for a fixed training flag and a fixed type of arguments.
What would make it wrong at once makes it fail instead; what may make it wrong later, ``modules`` and ``fuse`` tell:

- the type of an intermediate value is asked for, an attribute is set, a random number is drawn;
- gradients, autocast or saved-tensor hooks (checkpointing) are switched inside the forward, which a graph cannot say.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx, nn

from .layers import is_norm, is_product, is_watched
from .meaning import Tracer
from .modules import Seen, original_class


class Untraceable(Exception):
    """Why a forward cannot be represented by a graph."""


_COPYING = ("__deepcopy__", "__reduce__", "__reduce_ex__")


class _Proxy(fx.Proxy):
    """A symbol whose ``+=`` is recorded as such. torch.fx records an addition, which loses what it does to aliases."""


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
):
    setattr(_Proxy, f"__i{_name}__", _recorded(getattr(operator, f"i{_name}")))


class _Tracer(Tracer):
    kind = _Proxy
    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, names: list[str], arguments: type) -> None:
        super().__init__()
        self.module = module
        self.names = names
        self.arguments = arguments
        self.asked_for_types = False
        self.modes = _modes()
        self.placeholders: set[int] = set()
        self.seen = {"": Seen("", original_class(module), tuple(module._modules))}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not _is_part(m):
            return True
        self.seen[module_qualified_name] = Seen(module_qualified_name, original_class(m), tuple(m._modules))
        return False

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.names]
        self.placeholders = {id(proxy) for proxy in proxies}
        # Parameters that have defaults get these: a call that gives them is not one that the graph serves.
        return original_class(self.module).forward, [self.module, *proxies]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise Untraceable("it switches gradients, autocast or saved-tensor hooks")
        return super().create_node(*args, **kwargs)

    def isinstance(self, value: Any, types: Any) -> bool:
        """The answer that the forward gets: placeholders are of the type that the graph is traced for."""
        if not builtins.isinstance(value, fx.Proxy):
            return builtins.isinstance(value, types)
        if id(value) not in self.placeholders:
            raise Untraceable("it asks for the type of a value that it computes")
        self.asked_for_types = True
        return issubclass(self.arguments, types)


def _modes() -> tuple[Any, ...]:
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, hooks


def argument_names(module: nn.Module) -> list[str]:
    """The arguments that a module's forward cannot do without."""
    kinds = inspect.Parameter
    names = []
    for parameter in list(inspect.signature(original_class(module).forward).parameters.values())[1:]:
        if parameter.kind == kinds.VAR_POSITIONAL:
            raise Untraceable(f"it takes *{parameter.name}")
        if parameter.default is kinds.empty and parameter.kind == kinds.KEYWORD_ONLY:
            raise Untraceable(f"it needs the keyword {parameter.name}")
        if parameter.default is kinds.empty and parameter.kind != kinds.VAR_KEYWORD:
            names.append(parameter.name)
    return names


class Trace(NamedTuple):
    """The graphs of a module's forward, by training flag and type of the arguments (all Tensors or all lists).

    seen: the module and those that the trace looked into.
    """

    graphs: dict[tuple[bool, type], fx.Graph]
    seen: tuple[Seen, ...]


def trace(module: nn.Module) -> Trace:
    """What the forward of a module does.

    Raises:
        Untraceable: with the reason.
    """
    if isinstance(module, fx.GraphModule):
        raise Untraceable("it is a torch.fx.GraphModule; fuse the model before it is traced")
    if any(getattr(original_class(module), name, None) is not getattr(nn.Module, name, None) for name in _COPYING):
        raise Untraceable("it has a way of its own to be copied or pickled")
    if "forward" in vars(module):
        raise Untraceable("its forward was set on the instance")
    names = argument_names(module)
    graphs: dict[tuple[bool, type], fx.Graph] = {}
    seen: dict[str, Seen] = {}
    for training in (False, True):
        graphs[training, Tensor], tracer = _trace(module, names, training, Tensor)
        seen |= tracer.seen
        if tracer.asked_for_types:
            with contextlib.suppress(Untraceable):  # then lists take the original forward
                graphs[training, list], tracer = _trace(module, names, training, list)
                seen |= tracer.seen
    return Trace(graphs, tuple(seen.values()))


def _trace(module: nn.Module, names: list[str], training: bool, arguments: type) -> tuple[fx.Graph, _Tracer]:
    tracer = _Tracer(module, names, arguments)
    was_training = module.training
    module.training = training
    try:
        with _without_side_effects(module), _answering(tracer, module):
            graph = tracer.trace(module)
    except Untraceable:
        raise
    except Exception as error:  # whatever the forward of a stranger raises when it is given symbols
        line = next(iter(str(error).splitlines()), "")
        raise Untraceable(f"{type(error).__name__}: {line}") from error
    finally:
        module.training = was_training
    if tracer.leaked():
        raise Untraceable("it keeps a value that it computes outside of its modules")
    return graph, tracer


@contextlib.contextmanager
def _answering(tracer: _Tracer, module: nn.Module) -> Iterator[None]:
    """Let ``isinstance`` and ``torch.is_tensor`` in the module's own code be answered by the tracer."""
    files = {parent.__module__ for parent in original_class(module).__mro__}
    with contextlib.ExitStack() as stack:
        for name in files:
            if name in sys.modules and name.partition(".")[0] not in ("torch", "builtins"):
                namespace = vars(sys.modules[name])
                if "isinstance" not in namespace:
                    stack.enter_context(mock.patch.dict(namespace, {"isinstance": tracer.isinstance}))
        is_tensor = mock.patch.object(torch, "is_tensor", lambda value: tracer.isinstance(value, Tensor))
        stack.enter_context(is_tensor)
        yield


@contextlib.contextmanager
def _without_side_effects(module: nn.Module) -> Iterator[None]:
    """Undo what a forward does to its modules and to the random generators, and refuse to go on if it did anything."""
    holders: list[Any] = [vars(below) for below in module.modules()]
    holders += [value for holder in holders for value in holder.values() if isinstance(value, (dict, list, set))]
    before = [(holder, holder.copy()) for holder in holders]
    python, generator = random.getstate(), torch.get_rng_state()
    changed: str | None = None
    try:
        yield
    finally:
        for holder, content in before:
            name = _changed(content, holder)
            if name is not None:
                changed = changed or name
                holder.clear()
                holder.extend(content) if isinstance(holder, list) else holder.update(content)
        drew = random.getstate() != python or not torch.equal(torch.get_rng_state(), generator)
        random.setstate(python)
        torch.set_rng_state(generator)
    if changed is not None:
        raise Untraceable(f"it sets {changed}")
    if drew:
        raise Untraceable("it draws random numbers")


def _changed(before: Any, now: Any) -> str | None:
    """What is not the same object any more, of two states of a dict, list or set; in words."""
    if isinstance(now, dict):
        missing = object()
        names = before.keys() | now.keys()
        name = next((name for name in names if before.get(name, missing) is not now.get(name, missing)), None)
        return None if name is None else f"the attribute {name}"
    if isinstance(now, set):
        return None if before == now else "what is in a set"
    same = len(before) == len(now) and all(map(operator.is_, before, now))
    return None if same else "what is in a list"


def is_container(module: nn.Module) -> bool:
    """Whether a module has a forward of its own that may call layers below it."""
    below = list(module.modules())[1:]
    defined = original_class(module).forward is not nn.Module.forward
    return defined and any(
        is_product(child) or is_norm(child) or isinstance(child, nn.modules.batchnorm._BatchNorm) for child in below
    )


def _is_part(module: nn.Module) -> bool:
    """Whether a module is a Sequential whose calls belong to the forward that calls it.

    It is not where a module below it has a forward of its own that calls batch norms, a residual block for example:
    such a Sequential is a part of the network, and not of a block.
    """
    if original_class(module).forward is not nn.Sequential.forward or is_watched(module):
        return False
    return all(_is_part(child) or not _calls_norms(child) for child in module.children())


def _calls_norms(module: nn.Module) -> bool:
    return any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in list(module.modules())[1:])
