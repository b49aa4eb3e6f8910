"""Which layers of a model can be chains, and what becomes of the modules that call them."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import is_norm, is_watched
from .modules import Blueprint, fused_class, original_class
from .patterns import Patterns, Run, rewrite, variant
from .tracing import Trace, Untraceable, argument_names, is_container, trace


@dataclass(frozen=True)
class Call:
    """One call of a batch norm in the forward of ``caller``: the run that it is in, or why it is in none."""

    caller: nn.Module
    run: Run | None
    reason: str = ""


class Plan:
    """What fusing a model does, found from the forwards that its modules had before any was fused."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.traces: dict[nn.Module, Trace] = {}
        self.runs: dict[nn.Module, list[list[Run]]] = {}  # in the order of the trace's graphs
        self.calls: defaultdict[nn.Module, list[Call]] = defaultdict(list)  # by batch norm
        self.untraceable: dict[nn.Module, str] = {}
        inner: set[nn.Module] = set()  # those whose calls are in the forward of another
        for module in self.paths:  # parents first
            if is_container(module):
                self._analyse(module, reported=module not in inner)
                seen = self.traces[module].seen if module in self.traces else ()
                inner.update(module.get_submodule(path) for path, *_ in seen if path)

    def _analyse(self, module: nn.Module, *, reported: bool) -> None:
        try:
            self.traces[module] = trace(module)
        except Untraceable as error:
            self.untraceable[module] = str(error)
            return
        self.runs[module] = []
        for (training, _), graph in self.traces[module].graphs.items():
            with _all_in_mode(module, training):
                patterns = Patterns(module, self.paths[module], graph)
            self.runs[module].append(patterns.runs)
            for node, norm in patterns.norms() if reported else ():
                reason = patterns.why_left(node)
                run = next((run for run in patterns.runs if node in run.nodes), None)
                self.calls[norm].append(Call(module, run, reason or ""))

    def why_not_called(self, module: nn.Module) -> str:
        """Why no forward that was traced calls a batch norm."""
        above = [caller for caller in self.untraceable if any(module is below for below in caller.modules())]
        if not above:
            return "no forward that can be traced calls it"
        nearest = max(above, key=lambda caller: len(self.paths[caller]))
        name = f"{original_class(nearest).__name__} {self.paths[nearest]}".strip()
        return f"the forward of {name} cannot be traced: {self.untraceable[nearest]}"

    def apply(self) -> None:
        """Give each module of the model its class. The graphs are used up."""
        for module in self.paths:
            kind = self._class_of_caller(module) if any(self.runs.get(module, ())) else original_class(module)
            if type(module) is not kind:
                module.__class__ = kind

    def _class_of_caller(self, module: nn.Module) -> type[nn.Module]:
        graphs, seen = self.traces[module]
        for graph, runs in zip(graphs.values(), self.runs[module], strict=True):
            rewrite(graph, runs)
        variants = tuple(variant(graph, *key) for key, graph in graphs.items())
        blueprint = Blueprint(variants, len(argument_names(module)), seen)
        return fused_class(original_class(module), blueprint)  # type: ignore[arg-type]  # mypy thinks that a class has no hash


@contextlib.contextmanager
def _all_in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Every module below in the mode for which the module itself was traced, as they mostly are together."""
    flags = [(below, below.training) for below in module.modules()]
    try:
        for below, _ in flags:
            below.training = training
        yield
    finally:
        for below, flag in flags:
            below.training = flag


def why_not_plain(module: _BatchNorm) -> str | None:
    """Why a module is not a batch norm whose forward is known; None if it is."""
    if not is_norm(module):
        return f"{type(module).__name__} has a forward of its own"
    if "forward" in vars(module):
        return "its forward was set on the instance"
    return "it has hooks" if is_watched(module) else None
