"""What follows a batch norm in a graph, and how the graph reads when one operation does both."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import Variant, finish, global_by_name, has_hooks, original_class, with_epilogue

_RELU_FUNCTIONS = (functional.relu, torch.relu, torch.relu_, functional.relu_)
_RELU_METHODS = ("relu", "relu_")
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_", "__add__", "__iadd__")
_IN_PLACE = (operator.iadd, "add_", "__iadd__")


@dataclass(frozen=True)
class Fusion:
    """A call of a batch norm, or of a module that ends in one, together with the nodes that it takes in."""

    call: fx.Node
    add: fx.Node | None = None
    relu: fx.Node | None = None

    def __str__(self) -> str:
        return " → ".join(["batch norm", *(["add"] if self.add else []), *(["ReLU"] if self.relu else [])])


@dataclass(frozen=True)
class Left:
    """Why a call stays as it is."""

    reason: str


@dataclass(frozen=True)
class Returned:
    """The call's value is the module's own, so that the module's callers decide."""


Outcome = Fusion | Left | Returned


class Patterns:
    """The patterns of the graph of a module at ``path``. ``ends``: the modules that are or end in such a batch norm."""

    def __init__(self, module: nn.Module, path: str, graph: fx.Graph, ends: set[nn.Module]) -> None:
        self.module = module
        self.path = path
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.calls = [node for node in graph.nodes if self.called(node) in ends]

    def called(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def outcomes(self) -> dict[fx.Node, Outcome]:
        """What becomes of each call."""
        return {call: self._outcome(call) for call in self.calls}

    def _outcome(self, call: fx.Node) -> Outcome:
        if len(call.users) != 1:
            return Left(f"its output is used {len(call.users)} times" if call.users else "its output is not used")
        (user,) = call.users
        if call.kwargs or (isinstance(self.called(call), _BatchNorm) and len(call.args) != 1):
            return Left("it is called with keywords")
        if user.op == "output":
            return Returned() if user.args[0] is call else Left("it is returned among other values")
        if self._is_relu(user):
            relu = self.called(user)
            if relu is not None and has_hooks(relu):
                return Left(f"{self._name(user)} after it has hooks")
            return Fusion(call, relu=user)
        if _is_add(user):
            reason = self._why_not_added(call, user)
            return self._with_addition(call, user) if reason is None else Left(reason)
        return Left(f"followed by {self._name(user)}")

    def _with_addition(self, call: fx.Node, add: fx.Node) -> Fusion:
        relu = next(iter(add.users)) if len(add.users) == 1 else None
        if relu is not None:
            module = self.called(relu)
            if not self._is_relu(relu) or (module is not None and has_hooks(module)):
                relu = None
        return Fusion(call, add, relu)

    def _why_not_added(self, call: fx.Node, add: fx.Node) -> str | None:
        """None if the addition goes with this call."""
        reason = self._unfit(call, add)
        for other in add.all_input_nodes:
            fit = other is not call and other in self.calls and self._unfit(other, add) is None
            if fit and (reason is not None or self._rank(other) > self._rank(call)):
                return f"it is added to {self._name(other)}, which takes the addition in"
        return reason

    def _rank(self, call: fx.Node) -> tuple[bool, int]:
        """Which addend takes the addition: a batch norm before a module that ends in one, then the later one."""
        return isinstance(self.called(call), _BatchNorm), self.order[call]

    def _unfit(self, call: Any, add: fx.Node) -> str | None:
        """Why a call cannot take the addition in, whatever the other addend."""
        if len(add.args) != 2 or not set(add.kwargs) <= {"alpha"} or add.kwargs.get("alpha", 1) != 1:
            return "the addition is called with keywords or alpha"
        first, second = add.args
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return "a constant is added to it"
        if first is second:
            return "it is added to itself"
        if add.target in _IN_PLACE and first is not call:
            return "it is added in place to another value"
        if len(call.users) != 1 or call.kwargs:
            return "its output is used more than once"
        return self._cannot_move(call, add)

    def _cannot_move(self, call: fx.Node, add: fx.Node) -> str | None:
        """The fused call stands where the addition stood: what happens in between must neither affect nor see it."""
        module = self.called(call)
        between = [node for node in self.order if self.order[call] < self.order[node] < self.order[add]]
        if not isinstance(module, _BatchNorm) and any(node.op.startswith("call") for node in between):
            return f"other values are computed between {self._name(call)} and the addition"
        for node in between:
            other = self.called(node)
            if any(source in call.all_input_nodes for source in node.all_input_nodes):
                return f"its input is used by {self._name(node)} before the addition"
            if other is not None and any(below is module for below in other.modules()):
                return "it is called again before the addition"
        return None

    def _is_relu(self, node: fx.Node) -> bool:
        return (
            type(self.called(node)) is nn.ReLU
            or (node.op == "call_function" and node.target in _RELU_FUNCTIONS)
            or (node.op == "call_method" and node.target in _RELU_METHODS)
        )

    def _name(self, node: fx.Node) -> str:
        module = self.called(node)
        if module is not None:
            path = ".".join(filter(None, [self.path, str(node.target)]))
            return f"{original_class(module).__name__} {path}"
        return str(getattr(node.target, "__name__", node.target))


def _is_add(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )


def rewrite(graph: fx.Graph, outcomes: dict[fx.Node, Outcome], ends_in_batch_norm: bool) -> None:
    """Put one call in the place of each fusion. If the module ends in a batch norm it takes an epilogue, last."""
    for call, outcome in outcomes.items():
        if isinstance(outcome, Fusion):
            _replace(graph, outcome)
        elif isinstance(outcome, Returned) and ends_in_batch_norm:
            with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
                epilogue = graph.placeholder("epilogue")
            with graph.inserting_before(call):
                module = graph.get_attr(str(call.target))
                finished = graph.call_function(finish, (module, epilogue, *call.args))
            call.replace_all_uses_with(finished)
            graph.erase_node(call)


def _replace(graph: fx.Graph, fusion: Fusion) -> None:
    call, add, relu = fusion.call, fusion.add, fusion.relu
    # At the addition's place the residual exists, and is what it was: it may have been changed in place before.
    with graph.inserting_before(add or call):
        residual = next(operand for operand in add.args if operand is not call) if add else None
        module = graph.get_attr(str(call.target))
        activation = graph.get_attr(str(relu.target)) if relu and relu.op == "call_module" else relu is not None
        in_place = add is not None and add.target in _IN_PLACE
        fused = graph.call_function(with_epilogue, (module, activation, residual, in_place, *call.args))
    taken = [node for node in (relu, add, call) if node is not None]
    taken[0].replace_all_uses_with(fused)
    for node in taken:
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
