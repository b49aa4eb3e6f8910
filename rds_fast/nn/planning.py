"""Which batch norms of a model can be fused with what follows them, and what becomes of the modules that call them."""

from __future__ import annotations

from collections import defaultdict
from typing import TypeVar

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import FUSED, Blueprint, fused_class, has_hooks, original_class
from .patterns import Fusion, Left, Outcome, Patterns, Returned, rewrite, variant
from .privacy import insert_hand_overs, receivers, result
from .tracing import Untraceable, argument_names, is_container, trace

T = TypeVar("T")


class Plan:
    """What fusing a model does, found from the forwards that its modules had before any was fused."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.graphs: dict[nn.Module, dict[tuple[bool, type], fx.Graph]] = {}
        self.outcomes: dict[nn.Module, list[dict[fx.Node, Outcome]]] = {}  # in the order of graphs[module]
        # By module that is or ends in a batch norm: who calls it, and what becomes of the call.
        self.calls: defaultdict[nn.Module, list[tuple[nn.Module, Outcome]]] = defaultdict(list)
        self.untraceable: dict[nn.Module, str] = {}
        self.ends: set[nn.Module] = set()  # the modules that are, or end in, a batch norm that may be fused
        self.visited: dict[nn.Module, None] = {}  # all modules, children first
        self._visit(model)

    def _visit(self, module: nn.Module) -> None:
        """Children first: whether they end in a batch norm must be known."""
        for child in module.children():
            if child not in self.visited:
                self._visit(child)
        self.visited[module] = None
        if isinstance(module, _BatchNorm):
            if why_not_plain(module) is None:
                self.ends.add(module)
        elif is_container(module):
            self._analyse(module)

    def _analyse(self, module: nn.Module) -> None:
        try:
            self.graphs[module] = trace(module)
        except Untraceable as reason:
            self.untraceable[module] = str(reason)
            return
        path = self.paths[module]
        found = [Patterns(module, path, graph, self.ends).outcomes() for graph in self.graphs[module].values()]
        self.outcomes[module] = found
        for outcomes in found:
            for call, outcome in outcomes.items():
                self.calls[module.get_submodule(str(call.target))].append((module, outcome))
        returned = [sum(isinstance(outcome, Returned) for outcome in outcomes.values()) for outcomes in found]
        if set(returned) == {1} and not has_hooks(module):
            self.ends.add(module)

    def resolve(self, module: nn.Module) -> list[tuple[nn.Module, Fusion | Left]]:
        """Who calls a module and what becomes of the calls, followed up where a caller returns the value as its own."""
        resolved: list[tuple[nn.Module, Fusion | Left]] = []
        for caller, outcome in self.calls[module]:
            if not isinstance(outcome, Returned):
                resolved.append((caller, outcome))
            elif caller in self.ends and caller is not self.model:
                resolved += self.resolve(caller)
            else:
                resolved.append((caller, Left(self._why_not_followed(caller))))
        return resolved or [(self.model, Left(self._why_not_called(module)))]

    def is_fused(self, module: nn.Module) -> bool:
        """Whether a call of the module takes something in."""
        return any(isinstance(outcome, Fusion) for _, outcome in self.resolve(module))

    def _why_not_followed(self, caller: nn.Module) -> str:
        if caller is self.model:
            return "the model returns its output"
        return f"{self._name(caller)}, which returns its output, " + (
            "has hooks" if has_hooks(caller) else "does not always do so"
        )

    def _why_not_called(self, module: nn.Module) -> str:
        above = [caller for caller in self.untraceable if any(module is below for below in caller.modules())]
        if not above:
            return "no forward that can be traced calls it"
        nearest = max(above, key=lambda caller: len(self.paths[caller]))
        return f"the forward of {self._name(nearest)} cannot be traced: {self.untraceable[nearest]}"

    def _name(self, module: nn.Module) -> str:
        return f"{original_class(module).__name__} {self.paths[module]}".strip()

    def apply(self) -> None:
        """Give each module of the model its class. The graphs are used up."""
        fused = {module for module in self.ends if self.is_fused(module)}
        for module in self.visited:
            kind = original_class(module)
            if module in self.outcomes:
                kind = self._class_of_caller(module, module in fused)
            elif module in fused:
                kind = FUSED[kind]
            if type(module) is not kind:
                module.__class__ = kind

    def _class_of_caller(self, module: nn.Module, ends_in_batch_norm: bool) -> type[nn.Module]:
        found = self.outcomes[module]
        fuses = any(isinstance(outcome, Fusion) for outcomes in found for outcome in outcomes.values())
        original = original_class(module)
        graphs = self.graphs[module]
        for graph, outcomes in zip(graphs.values(), found, strict=True):
            rewrite(graph, outcomes, ends_in_batch_norm)
        hands_over = [insert_hand_overs(module, graph) for graph in graphs.values()]
        if not (fuses or ends_in_batch_norm or any(hands_over)):
            return original
        blueprint = Blueprint(
            tuple(variant(graph, *key) for key, graph in graphs.items()),
            len(argument_names(module)),
            tuple(module._modules),
            ends_in_batch_norm,
            _common([result(graph) for graph in graphs.values()]),
            _common([receivers(graph) for graph in graphs.values()]),
        )
        return fused_class(original, blueprint)  # type: ignore[arg-type]  # mypy thinks that a class has no hash


def _common(values: list[T]) -> T | None:
    """What holds for every trace of a forward, so that it need not be asked which of them ran."""
    return values[0] if len(set(values)) == 1 else None


def why_not_plain(module: _BatchNorm) -> str | None:
    """Why a module is not a batch norm whose forward is known; None if it is."""
    kind = original_class(module)
    if kind not in FUSED:
        return f"{kind.__name__} has a forward of its own"
    if "forward" in vars(module):
        return "its forward was set on the instance"
    return "it has hooks" if has_hooks(module) else None
