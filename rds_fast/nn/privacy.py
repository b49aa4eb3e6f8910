"""Where a value goes straight from one module to the next, and nobody else can hold it.

There its alias may be taken (``rds_fast.ops.aliases``), and the cotangents of its two uses, the branch of a residual
block and the way past it, meet in a kernel; and there it may be computed again rather than kept
(``rds_fast.ops.recompute``). Whether it is so has a part that a trace fixes and one that may change:

- traced: the caller uses the value once, as the one argument of the receiver; the giver is an operation with a fused
  ReLU, or its forward returns what such an operation computed and does nothing else with it; the receiver's forward
  hands its argument to modules and additions only, and does not return it. That a forward keeps nothing in an
  attribute, its trace shows.
- looked up in every call: that these forwards are the ones that run (not so under global hooks), and that no module
  through which the value goes has hooks or a forward set on the instance. Such a module is of this package, a
  torch.nn.Sequential or one of the layers below: no others are known to keep nothing.

Dispatch modes of PyTorch also see all values. They are taken not to ask for gradients.
"""

from __future__ import annotations

import operator
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..double_backward import fast_double_backward
from ..ops.aliases import offers
from ..ops.recompute import recipes
from .modules import CODE, FUSED, FusedForward, finish, is_watched, with_epilogue

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _code(kind: type) -> tuple[Any, ...]:
    """What a call of such a layer runs, which somebody may replace for the whole class."""
    return tuple(getattr(kind, name, None) for name in CODE)


# Layers whose result is never their argument itself, and their code.
_LAYERS: dict[type, tuple[Any, ...]] = {
    kind: _code(kind)
    for kind in (
        *_CONVOLUTIONS,
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *FUSED.keys(),
        *FUSED.values(),
    )
}
_MODES = (fast_double_backward, DeviceContext)


def hand_over(value: Any, giver: nn.Module | None, receiver: nn.Module) -> Any:
    """``value``, which ``giver`` returned and ``receiver`` gets: generated code calls this in between.

    giver: None for an operation, which leaves nothing on its result where it was not fused.
    """
    if torch.compiler.is_compiling() or not (offers.holds(value) or recipes.holds(value)):
        return value
    if _modes_are_known() and (giver is None or _gives(giver)) and _receives(receiver, value):
        offers.permit(value)
        recipes.permit(value)
    return value


def _modes_are_known() -> bool:
    """Whether no stranger's function mode sees the value."""
    return all(type(mode) in _MODES for mode in _get_current_function_mode_stack())


def _is_generated(module: nn.Module) -> TypeGuard[FusedForward]:
    """Whether the module's class is one that ``fused_class`` made, not one derived from it."""
    return "blueprint" in vars(type(module))


def _submodule(module: Any, path: str) -> nn.Module:
    """As ``get_submodule``, whose checks take longer than all the rest here."""
    for name in path.split("."):
        module = module._modules[name]
    found: nn.Module = module
    return found


def _gives(module: nn.Module) -> bool:
    """Whether what the module returned is held by nobody else, provided that it is an alias's tensor.

    An alias or a recipe is on the results of fused batch norms only, and a FusedForward withdraws it where its original
    forward ran. A ReLU's result has none, be it a new tensor or the old one, changed in place.
    """
    if is_watched(module):
        return False
    if type(module) is nn.ReLU:
        return True
    if type(module) is nn.Sequential:
        return len(module) > 0 and _gives(next(reversed(module._modules.values())))
    if not _is_generated(module) or module.is_outdated():
        return False
    result = module.blueprint.result
    return result is not None and (result == "" or _gives(_submodule(module, result)))


def _receives(module: nn.Module, value: Tensor) -> bool:
    """Whether the module, called with the value, uses it and lets it be."""
    if is_watched(module):
        return False
    code = _LAYERS.get(type(module))
    if code is not None:
        return code == _code(type(module))
    if type(module) is nn.Sequential:
        return len(module) > 0 and _receives(next(iter(module._modules.values())), value)
    if not _is_generated(module) or module._generated((value,)) is None:
        return False
    receivers = module.blueprint.receivers
    return receivers is not None and all(_receives(_submodule(module, name), value) for name in receivers)


# What a trace shows of this, once the graph is rewritten.


def result(graph: fx.Graph) -> str | None:
    """The module that has the last say over the value that is returned and not used otherwise.

    The module that computes it or, where that is a fused operation, the ReLU; the empty name where this is a function.
    None: the value is something else.
    """
    (output,) = (node for node in graph.nodes if node.op == "output")
    value = output.args[0]
    if not isinstance(value, fx.Node) or len(value.users) != 1:
        return None
    if value.op == "call_module":
        return str(value.target)
    if value.target is not with_epilogue:
        return None
    relu = _relu_module(value)
    return str(relu.target) if relu is not None else "" if value.args[1] else None


def _relu_module(fused: fx.Node) -> fx.Node | None:
    """The module that has the last say over a fused operation's result; None where that is a function, or nothing."""
    return fused.args[1] if isinstance(fused.args[1], fx.Node) else None


def receivers(graph: fx.Graph) -> tuple[str, ...] | None:
    """The modules that are called with the first argument alone; None where more than that and additions is done."""
    argument = next(iter(graph.nodes))
    names = []
    for user in argument.users:
        called = called_with(user, argument)
        if called is not None:
            names.append(called)
        elif not (user.target in (operator.add, torch.add) or _is_residual(user, argument)):
            return None
    return tuple(names)


def called_with(user: fx.Node, value: fx.Node) -> str | None:
    """The module that a node calls with one argument, which is the value, used in no other way; else None."""
    if user.op == "call_module" and user.args == (value,) and not user.kwargs:
        return str(user.target)
    if user.target not in (with_epilogue, finish):
        return None
    options = 4 if user.target is with_epilogue else 2
    if user.args[options:] != (value,) or value in user.args[:options]:
        return None
    module = user.args[0]
    assert isinstance(module, fx.Node)
    return str(module.target)


def _is_residual(user: fx.Node, value: fx.Node) -> bool:
    return user.target is with_epilogue and user.args[2] is value and value not in user.args[4:]


def may_give(module: nn.Module) -> bool:
    """Whether a call of the module may return what ``_gives`` asks for, whatever its hooks are now."""
    if type(module) is nn.Sequential:
        return len(module) > 0 and may_give(module[-1])
    return isinstance(module, FusedForward) and module.blueprint.result is not None


def may_receive(module: nn.Module) -> bool:
    """Whether a call of the module may use its argument twice and do what ``_receives`` asks for."""
    return isinstance(module, FusedForward) or type(module) is nn.Sequential


def insert_hand_overs(module: nn.Module, graph: fx.Graph) -> bool:
    """Let the calls of ``hand_over`` stand in the rewritten graph of a module; False where there are none."""
    inserted = False
    for node in list(graph.nodes):
        is_call = node.op == "call_module"
        if len(node.users) != 1 or not (is_call or node.target is with_epilogue):
            continue
        (user,) = node.users
        target = called_with(user, node)
        if target is None:
            continue
        receiver = module.get_submodule(target)
        if is_call:
            worth_it = may_give(module.get_submodule(str(node.target))) and may_receive(receiver)
        else:
            worth_it = type(receiver) in _CONVOLUTIONS or may_receive(receiver)
        if not worth_it:
            continue
        with graph.inserting_before(user):
            giver = graph.get_attr(str(node.target)) if is_call else _relu_module(node)
            handed = graph.call_function(hand_over, (node, giver, graph.get_attr(target)))
        user.replace_input_with(node, handed)
        inserted = True
    return inserted
