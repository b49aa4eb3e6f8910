"""The modules of a fused model: batch norms that take in what follows them, and modules that hand it to them.

A fused model has the same module objects at the same paths as the plain one, and each means what it meant: a fused
batch norm called on its own is a batch norm, and a ReLU stays where it was. What changes is the ``forward`` of the
modules that call them, which is generated from a trace of the original. Wherever a module sees that a condition under
which it was traced does not hold, the original ``forward`` runs: it is still there, and it is always right.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.aliases import offers
from ..ops.batch_norm import batch_norm
from ..ops.recompute import recipes


class Epilogue(NamedTuple):
    """What follows a batch norm: ``+ residual``, in place or not, then ReLU, a module or True; each may be missing."""

    residual: Tensor | None = None
    in_place: bool = False
    relu: nn.Module | bool = False

    def apply(self, output: Any) -> Any:
        """The plain composition."""
        if self.residual is not None and self.in_place:
            output += self.residual  # as the model had it: the sum has output's shape and dtype, or it is an error
        elif self.residual is not None:
            output = output + self.residual
        if isinstance(self.relu, nn.Module):
            return self.relu(output)  # in place or not: whoever holds output sees it
        return torch.relu(output) if self.relu else output


def _takes(epilogue: Epilogue, input: Tensor) -> bool:
    """Whether the fused operation computes the same: no broadcasting, no promotion."""
    residual = epilogue.residual
    return residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    )


def _refuse_scripting(module: nn.Module) -> nn.Module:
    """What ``torch.jit.script`` calls first of each module, to be given what it should compile."""
    raise RuntimeError(
        f"the model holds a fused {original_class(module).__name__} (rds_fast.nn.fuse), whose forward torch.jit.script "
        "cannot compile; script the model that was not fused, which has the same state dict (fuse leaves it as it is "
        "unless inplace=True), or use torch.jit.trace or torch.export, which take the fused one"
    )


class FusedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm, with the addition and the ReLU that follow it in one operation where a caller hands them over."""

    __prepare_scriptable__ = _refuse_scripting

    def forward(self, input: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        if epilogue is None:
            return super().forward(input)
        if not _takes(epilogue, input):
            return epilogue.apply(super().forward(input))
        self._check_input_dim(input)
        tracked = not self.training or self.track_running_stats
        return batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            self._share_of_the_batch(),
            self.eps,
            residual=epilogue.residual,
            relu=epilogue.relu is not False,
            recomputable=torch._C._len_torch_function_stack() > 0,  # without a mode no convolution would ask for it
        )

    def _share_of_the_batch(self) -> float:
        """The factor of the running statistics' update, after counting the batch; momentum None: a plain average."""
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum


class FusedBatchNorm1d(FusedBatchNorm, nn.BatchNorm1d):
    pass


class FusedBatchNorm2d(FusedBatchNorm, nn.BatchNorm2d):
    pass


class FusedBatchNorm3d(FusedBatchNorm, nn.BatchNorm3d):
    pass


FUSED: dict[type[nn.Module], type[FusedBatchNorm]] = {
    nn.BatchNorm1d: FusedBatchNorm1d,
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.BatchNorm3d: FusedBatchNorm3d,
}


class Variant(NamedTuple):
    """The generated forward for one training flag and one type of arguments, as source and the globals it names."""

    training: bool
    arguments: type
    source: str
    globals: tuple[tuple[str, Any], ...]


class Blueprint(NamedTuple):
    """All that a generated forward is made of, and the number of arguments and the submodules it was traced with.

    result, receivers: what the trace shows of who sees the argument and the result, see ``privacy``.
    """

    variants: tuple[Variant, ...]
    arity: int
    children: tuple[str, ...]
    ends_in_batch_norm: bool
    result: str | None
    receivers: tuple[str, ...] | None


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
        if len(args) != self.blueprint.arity or self.is_outdated() or global_hooks():
            return None
        kinds = {Tensor if isinstance(argument, Tensor) else type(argument) for argument in args}
        return self.functions.get((self.training, kinds.pop())) if len(kinds) == 1 else None

    def is_outdated(self) -> bool:
        """Whether submodules were added, removed or moved since the trace. Replaced ones are looked up by name."""
        return tuple(self._modules) != self.blueprint.children

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
    def forward(self: FusedForward, *args: Any, epilogue: Epilogue | None = None, **kwargs: Any) -> Any:
        function = None if kwargs else self._generated(args)
        if function is None:
            output = original.forward(self, *args, **kwargs)
            if not torch.compiler.is_compiling():
                offers.withdraw(output)  # nothing is known of who else holds it
                recipes.withdraw(output)
            return output if epilogue is None else epilogue.apply(output)
        return function(self, *args, epilogue) if self.blueprint.ends_in_batch_norm else function(self, *args)

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
    if isinstance(module, FusedForward):
        return module.original
    return next((plain for plain, fused in FUSED.items() if type(module) is fused), type(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the calls of a module, so that its own output must be seen."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def global_hooks() -> bool:
    """Whether somebody watches the calls of all modules, those that a fused forward leaves out too."""
    return bool(_has_any_global_hook())


# What a call of a layer runs, and somebody may set on the instance or the class.
CODE = frozenset(("forward", "_conv_forward"))


def is_watched(module: nn.Module) -> bool:
    """Whether a call runs more than the forward of the module's class."""
    return has_hooks(module) or any(name in vars(module) for name in CODE)  # as PyTorch 2.11 can compile


# The two functions that generated code calls. They look at the modules as these are now.


def finish(module: nn.Module, epilogue: Epilogue | None, *args: Any) -> Any:
    """``module(*args)``, then the epilogue; in one operation where ``module`` is or ends in a fused batch norm."""
    if epilogue is None:
        return module(*args)
    fused = isinstance(module, FusedBatchNorm) or (
        isinstance(module, FusedForward) and module.blueprint.ends_in_batch_norm
    )
    if fused and not is_watched(module):
        return module(*args, epilogue=epilogue)
    return epilogue.apply(module(*args))


def with_epilogue(
    module: nn.Module, relu: nn.Module | bool, residual: Tensor | None, in_place: bool, *args: Any
) -> Any:
    """``module(*args)``, ``+ residual`` unless it is None, then ``relu``: a module, or whether there is one."""
    if isinstance(relu, nn.Module) and (type(relu) is not nn.ReLU or is_watched(relu)):
        return relu(finish(module, None if residual is None else Epilogue(residual, in_place), *args))
    return finish(module, Epilogue(residual, in_place, relu), *args)
