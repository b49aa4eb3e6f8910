"""What small modules of other libraries amount to, found from a trace of what they do and not from their names.

A module may do nothing as it is now (a drop path whose rate is 0, or in eval mode), or may be a batch norm that goes on
to call further layers (a norm with an activation). The answers depend on the class, on the mode and on the numbers,
flags and words among the attributes of module and class, and are kept by these. A module that holds anything else, such
as a list of functions or of what it has seen, is not asked.
"""

from __future__ import annotations

import functools
import gc
import inspect
import operator
import random
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn import functional

T = TypeVar("T")

_SIMPLE = frozenset((bool, int, float, str, type(None)))
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_answers: dict[Any, Any] = {}


@functools.cache
def _class_attributes(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of what a class and those above it hold besides methods, up to PyTorch's own."""
    own = [parent for parent in kind.__mro__ if not parent.__module__.startswith(("torch.", "builtins"))]
    names = {name: value for parent in own for name, value in vars(parent).items() if not name.startswith("__")}
    return tuple(name for name, value in names.items() if type(value) in (*_SIMPLE, tuple, list, dict, set))


def _kept(question: Callable[[nn.Module], T | None]) -> Callable[[nn.Module], T | None]:
    """The question, asked once for all modules that are alike; None for one with attributes that a key cannot hold."""

    @functools.wraps(question)
    def ask(module: nn.Module) -> T | None:
        kind = type(module)
        key: list[Any] = [question, kind, kind.forward, *module._modules]
        for name, value in vars(module).items():
            if name not in _INTERNAL:
                if type(value) not in _SIMPLE:
                    return None
                key += name, type(value), value
        for name in _class_attributes(kind):  # type: ignore[arg-type]  # mypy thinks that a class has no hash
            value = getattr(module, name)
            if type(value) not in _SIMPLE:
                return None
            key += type(value), value
        known = tuple(key)
        if known not in _answers:
            _answers[known] = question(module)
        answer: T | None = _answers[known]
        return answer

    return ask


@_kept
def returns_its_argument(module: nn.Module) -> bool | None:
    """Whether a module, as it is now, is known to do nothing."""
    graph = _trace(module)
    if graph is None:
        return False
    first, *others = graph.nodes
    return first.op == "placeholder" and len(others) == 1 and others[0].args == (first,)


@_kept
def layers_after_norm(module: nn.Module) -> tuple[str, ...] | None:
    """The names of the layers that a batch norm with a forward of its own calls behind it; None: it does more."""
    is_norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    graph = _trace(module) if is_norm else None
    return None if graph is None else _after(module, graph)


def _trace(module: nn.Module) -> fx.Graph | None:
    """The forward of a stranger's module; None where it cannot be followed. PyTorch's own are known already."""
    if type(module).__module__.startswith("torch.nn."):
        return None
    state, attributes = random.getstate(), dict(vars(module))
    tracer = _Tracer()
    try:
        with torch.random.fork_rng(devices=()):
            graph = tracer.trace(module)
    except Exception:  # whatever the forward raises when it is given symbols
        return None
    drew = random.getstate() != state
    random.setstate(state)
    return None if drew or dict(vars(module)) != attributes or tracer.leaked() else graph


class Tracer(fx.Tracer):
    """A tracer that knows whether anybody kept a value: a forward that hands its values out does more than a graph."""

    kind = fx.Proxy

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[fx.Proxy]] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = self.kind(node, self)
        self.made.append(weakref.ref(proxy))
        return proxy

    def leaked(self) -> bool:
        """Whether a symbol outlives the trace."""
        if any(proxy() is not None for proxy in self.made):
            gc.collect()  # a cycle may hold it
        return any(proxy() is not None for proxy in self.made)


class _Tracer(Tracer):
    proxy_buffer_attributes = True
    param_shapes_constant = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


# What checks the argument; its results go nowhere else.
_CHECKS = (getattr, operator.eq, operator.or_, operator.and_, torch._assert)


def _after(module: Any, graph: fx.Graph) -> tuple[str, ...] | None:
    (placeholder,) = (node for node in graph.nodes if node.op == "placeholder")
    names: list[str] = []
    value: fx.Node | None = None
    counts = 0
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") or (node.op == "call_function" and node.target in _CHECKS):
            continue
        if node.op == "call_method" and node.target == "add_" and _name(node.args[0]) == "num_batches_tracked":
            counts += 1 if node.args[1:] == (1,) and not node.kwargs else 2
            continue
        if node.target is functional.batch_norm and value is None and _is_own(module, placeholder, node):
            value = node
        elif node.op == "call_module" and value is not None and node.args == (value,) and not node.kwargs:
            names.append(str(node.target))
            value = node
        elif node.op == "output" and node.args == (value,):
            return tuple(names) if counts == (module.training and module.track_running_stats) else None
        else:
            return None
    return None


def _is_own(module: Any, placeholder: fx.Node, node: fx.Node) -> bool:
    """Whether a call of ``batch_norm`` is what the module's own class would make of its argument."""
    given = inspect.signature(functional.batch_norm).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    present = {name for name in ("running_mean", "running_var", "weight", "bias") if getattr(module, name) is not None}
    if module.training and not module.track_running_stats:
        present -= {"running_mean", "running_var"}
    expected: dict[str, Any] = {
        "input": placeholder,
        **{name: name if name in present else None for name in ("running_mean", "running_var", "weight", "bias")},
        "training": module.training or (module.running_mean is None and module.running_var is None),
        "momentum": module.momentum,
        "eps": module.eps,
    }
    found = {name: value if name == "input" else _name(value) or value for name, value in given.arguments.items()}
    return module.momentum is not None and found == expected


def _name(argument: Any) -> str | None:
    """The attribute that a node stands for."""
    return str(argument.target) if isinstance(argument, fx.Node) and argument.op == "get_attr" else None
