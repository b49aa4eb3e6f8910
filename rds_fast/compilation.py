"""What ``torch.compile`` leaves as it is here; and models that were compiled.

The compiler traces the frames of Python that run under it. Where a gradient is taken with its graph there is nothing
that it could compile, so that code runs as it stands: the compiled function is cut there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame

_REASON = (
    "rds_fast works on the graph of derivatives here, which the compiler cannot trace. Leave fullgraph=True out: this "
    "call then runs uncompiled, with the same values, and what surrounds it is compiled"
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """Mark a function that runs uncompiled wherever ``torch.compile`` meets it, and so does all that it calls.

    To mark its code costs a call nothing. ``torch.compiler.disable`` would wrap it, and import the compiler, which
    takes a second, in processes that never compile anything.
    """
    return _mark(function, what_it_calls=eval_frame._FrameAction.SKIP)


def uncompiled_alone(function: _Function) -> _Function:
    """The same for the function alone: one that says itself what is to be done with the calls after it."""
    return _mark(function, what_it_calls=eval_frame._FrameAction.DEFAULT)


def _mark(function: _Function, what_it_calls: Any) -> _Function:
    marked: Any = function
    marked._torchdynamo_disable = True  # whoever calls it is cut there, for this reason
    marked._torchdynamo_disable_msg = _REASON
    strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, what_it_calls)
    eval_frame.set_code_exec_strategy(marked.__code__, strategy)
    return function


class _Paused(threading.local):
    """What compiled on this thread before each pause that has not ended, the first pause's first."""

    def __init__(self) -> None:
        self.compilers: list[Any] = []


_paused = _Paused()


@uncompiled_alone
def pause_compiling() -> None:
    """What is called from here on runs uncompiled on this thread, until ``resume_compiling``."""
    _paused.compilers.append(eval_frame.set_eval_frame(None))


@uncompiled_alone
def resume_compiling() -> None:
    """End the latest pause."""
    eval_frame.set_eval_frame(_paused.compilers.pop())


def modules_of(model: Any) -> list[Any]:
    """All modules of a model, in any order; none of what is no module.

    As ``model.modules()``, whose nested generators cost the host some thousand calls for a large network, in each step.
    """
    if not isinstance(model, torch.nn.Module):
        return []
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def compiled_part(model: Any) -> tuple[str, str | None]:
    """What of a model was compiled, to follow "the model", and by what: torch.compile, torch.jit or None."""
    for module in modules_of(model):
        if isinstance(module, torch.jit.ScriptModule):
            return f"holds a scripted {module.original_name}", "torch.jit"
        # By name: importing torch._dynamo for isinstance takes a second, in processes that never compile anything.
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            return f"holds a compiled {type(getattr(module, '_orig_mod', module)).__name__}", "torch.compile"
    if isinstance(model, torch.jit.ScriptFunction):
        return "is a scripted function", "torch.jit"
    if hasattr(model, "_torchdynamo_orig_callable"):
        return "is a compiled function", "torch.compile"
    return "", None
