"""The runs of layers in a graph that can be chains, and how the graph reads when each is one call."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import (
    ADDITIONS,
    RELU,
    Layer,
    chain,
    does_nothing,
    expanded,
    is_activation,
    is_norm,
    is_product,
    is_watched,
    stages_of,
)
from .modules import Variant, global_by_name, original_class

_RELU_FUNCTIONS = (functional.relu, torch.relu, torch.relu_, functional.relu_)
_RELU_METHODS = ("relu", "relu_")
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_", "__add__", "__iadd__")
_IN_PLACE = (operator.iadd, "add_", "__iadd__")
# What neither writes to an argument nor hands it to a stranger.
_HARMLESS_FUNCTIONS = {operator.add, torch.add, operator.mul, torch.mul, torch.cat, operator.getitem, getattr}
_HARMLESS_METHODS = {"add", "mul", "mean", "chunk", "size", "dim", "view", "flatten"}


@dataclass
class Run:
    """Layers that are called one after the other, each with the one before's result and nothing else.

    nodes: their calls, in this order, those of additions and functions among them.
    """

    nodes: list[fx.Node]
    layers: list[Layer]
    input: fx.Node
    residual: fx.Node | None = None
    texts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return " → ".join(self.texts)

    def around(self, norm: nn.Module) -> str:
        """The stage of a norm, in words."""
        words: list[str] = []
        found = False
        for layer, text in zip(self.layers, self.texts, strict=True):
            if isinstance(layer, nn.Module) and (is_product(layer) or (is_norm(layer) and "batch norm" in words)):
                if found:
                    break
                words = []
            found = found or layer is norm
            words += [text] if text else []
        return " → ".join(words)


class Patterns:
    """The runs of the graph of a module at ``path``."""

    def __init__(self, module: nn.Module, path: str, graph: fx.Graph) -> None:
        self.module = module
        self.path = path
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.nodes = list(graph.nodes)
        self.taken: set[fx.Node] = set()
        self.runs: list[Run] = []
        for node in self.nodes:
            layer = self._layer(node)
            if layer is not None and node not in self.taken and (is_product(layer) or is_norm(layer)):
                self._start(node, layer)

    def called(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _layer(self, node: fx.Node) -> Layer | None:
        """The layer that a node calls with one argument; None if it is none that a chain knows."""
        if _is_relu_function(node):
            return RELU
        module = self.called(node)
        if module is None or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        known = is_product(module) or is_norm(module) or is_activation(module) or does_nothing(module)
        return module if known and not is_watched(module) else None

    def _start(self, node: fx.Node, layer: Layer) -> None:
        """The longest run from a node on, if it is worth a call."""
        first: Any = node.args[0]
        run = Run([node], [layer], first, texts=[_text(layer)])
        while self._extend(run):
            pass
        while does_nothing(run.layers[-1]):
            run.nodes.pop(), run.layers.pop(), run.texts.pop()
        if len([text for text in run.texts if text]) > 1:
            self.runs.append(run)
            self.taken.update(run.nodes)

    def _extend(self, run: Run) -> bool:
        """Take the next node into a run, if it can be."""
        last = run.nodes[-1]
        if len(last.users) != 1:
            return False
        (node,) = last.users
        if node in self.taken or not self._can_move(run, node):
            return False
        residual = None
        layer: Layer | None
        if _is_add(node):
            if self._why_not_added(last, node) is not None or run.residual is not None:
                return False
            other: Any = next(operand for operand in node.args if operand is not last)
            norms = [call for call, layer in zip(run.nodes, run.layers, strict=True) if is_norm(layer)]
            if not norms or self._rank(other) > self._rank(norms[-1]):
                return False
            residual = other
            layer = "iadd" if node.target in _IN_PLACE else "add"
        else:
            layer = self._layer(node)
        if layer is None or layer in [known for known in run.layers if isinstance(known, nn.Module) and is_norm(known)]:
            return False
        if stages_of(expanded([*run.layers, layer])) is None:
            return False
        run.nodes.append(node)
        run.layers.append(layer)
        run.texts.append(_text(layer))
        run.residual = run.residual or residual
        return True

    def _rank(self, node: fx.Node) -> tuple[bool, bool, int]:
        """Which of two addends takes the addition: a batch norm, one that the module itself calls, the later one."""
        layer = self._layer(node)
        if layer is None or not is_norm(layer) or len(node.users) != 1:
            return False, False, 0
        return True, "." not in str(node.target), self.order[node]

    def _can_move(self, run: Run, node: fx.Node) -> bool:
        """Whether the run may wait for the place of ``node``: what comes in between must neither affect nor see it."""
        own = set(run.nodes)
        modules = [layer for layer in run.layers if isinstance(layer, nn.Module)]
        between = self.nodes[self.order[run.nodes[0]] + 1 : self.order[node]]
        return all(other in own or self._is_harmless(other, modules) for other in between)

    def _is_harmless(self, node: fx.Node, modules: list[nn.Module]) -> bool:
        if node.op in ("placeholder", "get_attr"):
            return True
        if node.op == "call_function":
            return node.target in _HARMLESS_FUNCTIONS and not node.kwargs
        if node.op == "call_method":
            return node.target in _HARMLESS_METHODS and not node.kwargs
        layer = self.called(node)
        if layer is None or self._layer(node) is None or layer in modules:
            return False
        if _may_draw(layer) and any(map(_may_draw, modules)):
            return False  # in another mode, when the order of their random numbers matters
        if not getattr(layer, "inplace", False):
            return True
        value: Any = node.args[0]  # new, and nobody else's
        source = self._layer(value)
        return len(value.users) == 1 and source is not None and (is_product(source) or is_norm(source))

    def why_left(self, call: fx.Node) -> str | None:
        """Why a batch norm's call is in no run; None if it is in one."""
        if call in self.taken:
            return None
        if call.kwargs or len(call.args) != 1:
            return "it is called with keywords"
        if len(call.users) != 1:
            return f"its output is used {len(call.users)} times" if call.users else "its output is not used"
        (user,) = call.users
        if user.op == "output":
            if user.args[0] is not call:
                return "it is returned among other values"
            return "the model returns its output" if not self.path else f"{self._own_name()} returns its output"
        if _is_add(user):
            reason = self._why_not_added(call, user)
            if reason is not None:
                return reason
        if user in self.taken and _is_add(user):
            return "it is added to another value, with which the addition goes"
        module = self.called(user)
        if module is not None and is_watched(module):
            return f"{self._name(user)} after it has hooks"
        return f"followed by {self._name(user)}"

    def _why_not_added(self, call: Any, add: fx.Node) -> str | None:
        """Why an addition cannot be taken in with a call."""
        if len(add.args) != 2 or not set(add.kwargs) <= {"alpha"} or add.kwargs.get("alpha", 1) != 1:
            return "the addition is called with keywords or alpha"
        first, second = add.args
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return "a constant is added to it"
        if first is second:
            return "it is added to itself"
        if add.target in _IN_PLACE and first is not call:
            return "it is added in place to another value"
        return None

    def _own_name(self) -> str:
        return f"{original_class(self.module).__name__} {self.path}".strip()

    def _name(self, node: fx.Node) -> str:
        module = self.called(node)
        if module is not None:
            path = ".".join(filter(None, [self.path, str(node.target)]))
            return f"{original_class(module).__name__} {path}"
        return str(getattr(node.target, "__name__", node.target))

    def norms(self) -> list[tuple[fx.Node, nn.Module]]:
        """The calls of batch norms, of any class."""
        found = ((node, self.called(node)) for node in self.nodes)
        return [(node, module) for node, module in found if isinstance(module, _BatchNorm)]


def _text(layer: Layer) -> str:
    if layer in ADDITIONS:
        return "add"
    if layer == RELU or isinstance(layer, nn.ReLU):
        return "ReLU"
    if does_nothing(layer):
        return ""
    if is_norm(layer):
        return " → ".join(["batch norm", *filter(None, map(_text, expanded([layer])[1:]))])
    if type(layer) is nn.Linear:
        return "linear"
    return "convolution" if is_product(layer) else type(layer).__name__


def _may_draw(module: nn.Module) -> bool:
    """Whether a module that does nothing now may be one that draws random numbers once its mode is another."""
    return does_nothing(module) and type(module) is not nn.Identity


def _is_add(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )


def _is_relu_function(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in _RELU_FUNCTIONS) or (
        node.op == "call_method" and node.target in _RELU_METHODS
    )


def rewrite(graph: fx.Graph, runs: list[Run]) -> None:
    """Put one call in the place of the last node of each run."""
    now: dict[fx.Node, fx.Node] = {}  # by the last node of a run: the call in its place
    for run in runs:
        last = run.nodes[-1]
        # There the residual exists, and is what it was: it may have been changed in place before.
        with graph.inserting_before(last):
            layers = tuple(
                layer if isinstance(layer, str) else graph.get_attr(str(node.target))
                for node, layer in zip(run.nodes, run.layers, strict=True)
            )
            values = [now.get(value, value) for value in (run.input, run.residual) if value is not None]
            now[last] = called = graph.call_function(chain, (layers, *values))
        last.replace_all_uses_with(called)
        for node in reversed(run.nodes):
            graph.erase_node(node)


def variant(graph: fx.Graph, training: bool, arguments: type) -> Variant:
    """The graph as source."""
    next(node for node in graph.nodes if node.op == "output").type = None  # an annotation that may not be importable
    code = graph.python_code("self")
    named = set(compile(code.src, "", "exec").co_names)
    for constant in compile(code.src, "", "exec").co_consts:
        named.update(getattr(constant, "co_names", ()))
    kept = tuple((name, global_by_name(value)) for name, value in sorted(code.globals.items()) if name in named)
    return Variant(training, arguments, code.src, kept)
