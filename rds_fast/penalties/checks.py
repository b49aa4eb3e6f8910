"""What a penalty needs of its arguments, and what it says when it does not get it.

No check reads a value of a tensor on a device: shapes, dtypes, flags and the names of autograd nodes are enough. A
penalty that cannot be right raises; the danger that all of these guard against is a penalty that is silently zero.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..compilation import compiled_part, modules_of
from ..distributed import in_use, refuse_freed_weights_behind, refuse_static_graph

# Nodes that pass the logits on as they are. The number at the end of a node's name is stripped before the comparison.
_PASSED_ON = frozenset(
    f"{operation}Backward"
    for operation in ("Alias", "Clone", "ReshapeAlias", "Squeeze", "ToCopy", "UnsafeView", "Unsqueeze", "View")
)

# PyTorch's default ignore_index: rows of this class index enter neither the cross-entropy nor a penalty on labels.
IGNORED = -100

# How many such nodes are looked through. A head has one or two: a cast, a flattening.
_LONGEST_PASSAGE = 8


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError, with the nearest valid name, unless ``value`` is one of ``choices``."""
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
        valid = ", ".join(map(repr, choices))
        raise ValueError(f"{name} is {value!r}; it must be one of {valid}. Did you mean {nearest!r}?")


def check_input(x: Any, name: str = "x", hint: str = "") -> None:
    """x is a batch of floating-point inputs that autograd can follow. ``hint``: more of what to do about it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor of shape (N, ...){hint}")
    if x.is_complex():
        raise TypeError(
            f"{name} is {x.dtype}; a penalty needs the gradient with respect to real numbers. Pass "
            f"torch.view_as_real({name}), and let the model begin with torch.view_as_complex"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"{name} is {x.dtype}, which has no gradient; it must be floating point. Convert it first, for example "
            f"images of bytes with {name}.float() / 255"
        )
    if x.dim() == 0:
        raise ValueError(f"{name} has no dimension; it must have shape (N, ...), one sample a row{hint}")
    if x.is_inference():
        raise RuntimeError(
            f"{name} was made in torch.inference_mode, so autograd cannot follow it; make it outside, or pass "
            f"{name}.clone()"
        )


def check_targets(y: Any) -> None:
    """y is a tensor, as the cross-entropy needs it."""
    if not isinstance(y, Tensor):
        raise TypeError(
            f"y is a {type(y).__name__}; it must be a torch.Tensor of class indices (N,) or probabilities (N, C)"
        )


def check_pair(x: Tensor, y: Any) -> None:
    """y holds a label, or the probabilities, of each sample of x."""
    check_targets(y)
    if y.shape[:1] != x.shape[:1]:
        raise ValueError(f"y has shape {tuple(y.shape)}; x of shape {tuple(x.shape)} needs a label of each sample")


def check_model(model: Any) -> None:
    """model can be called with x: not a module's class, and not None; and its backward may run twice in a step."""
    if not callable(model) or isinstance(model, type):
        found = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(
            f"the model is {found}; it must be a callable that maps x (N, ...) to logits (N, C), such as a "
            "torch.nn.Module"
        )
    if isinstance(model, torch.nn.Module) and in_use():
        for module in modules_of(model):
            refuse_static_graph(module)


def check_autograd() -> None:
    """A penalty is a gradient, which autograd takes: gradients are enabled, for evaluation too, outside torch.func."""
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            "the penalty was called inside a transformation of torch.func (grad, vjp, jvp, vmap ...), which it does "
            "not support: it takes the gradient with respect to x by autograd itself. Differentiate it by autograd "
            "too: penalty.backward(), or torch.autograd.grad(penalty, list(model.parameters()))"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "the penalty was called in torch.inference_mode, and it needs the gradient of the model with respect to x; "
            "call it outside (for its value alone, .detach() the result)"
        )
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "the penalty was called with gradients disabled (torch.no_grad), and it needs the gradient of the model "
            "with respect to x; call it under torch.enable_grad() (for its value alone, .detach() the result)"
        )


def check_logits(logits: Any, x: Any, samples: int | None = None) -> None:
    """logits is one floating-point tensor (N, C). ``samples``: N, where x is several inputs."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returned a {type(logits).__name__}; a penalty needs one tensor of logits (N, C). Wrap the "
            "model so that it returns its logits alone (for GoogLeNet and Inception: without auxiliary outputs)"
        )
    if not logits.is_floating_point():
        raise TypeError(f"the logits are {logits.dtype}; they must be floating point, the model's output before argmax")
    if isinstance(x, Tensor):
        samples = x.shape[0]
    if logits.dim() != 2 or logits.shape[0] != samples:
        given = f"x of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"inputs of {samples} samples"
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)} for {given}; they must be (N, C), one row for each of the "
            f"{samples} samples. Pool or flatten further dimensions inside the model"
        )


def no_path(name: str = "x") -> RuntimeError:
    """The error where the logits do not depend on x differentiably: its gradient would be zero without a word."""
    several = "" if name == "x" else ". If the logits are not to depend on it, name the others in with_respect_to"
    return RuntimeError(
        f"there is no gradient path from {name} to the logits, and the penalty needs one; look for torch.no_grad, "
        f".detach(), .data, .item() or an integer conversion inside the model, or for logits computed from another "
        f"tensor than {name}{several}"
    )


def refuse_one_logit(logits: Tensor) -> None:
    """A softmax over one class is 1 whatever the logit is: its cross-entropy is 0, and its density the logit itself."""
    if logits.shape[1] == 1:
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}, one logit a sample, and a softmax over one class is 1 for "
            "every input: the cross-entropy is 0, and nothing is learned from it. Give a binary loss, "
            "PenalizedLoss(penalty, loss=rds_fast.BinaryCrossEntropy()), or return two logits, such as "
            "torch.cat([torch.zeros_like(f), f], dim=1), with class indices 0 and 1 as labels"
        )


def refuse_compiled(model: Any) -> None:
    """An exact penalty differentiates a model twice: torch.compile's cannot be, and torch.jit's not reliably."""
    found, compiler = compiled_part(model)
    if compiler == "torch.compile":
        raise _compiled(f"the model {found}")
    if compiler == "torch.jit":
        raise RuntimeError(
            f"the model {found} (torch.jit), whose second derivatives are not always right (those of traced batch norm "
            "in train mode can be wrong from the second call on), and the exact penalty needs them; pass the Python "
            "module that it was made from, or use DensityPenalty(method='finite_difference')"
        )


def refuse_compiled_logits(logits: Tensor) -> None:
    """The same by the logits' autograd node. A compiled function deeper in the graph raises in PyTorch's backward."""
    head = _head(logits)
    if type(head).__name__.startswith("CompiledFunction"):
        raise _compiled("the logits come from a compiled function")


def _compiled(found: str) -> RuntimeError:
    return RuntimeError(
        f"{found} (torch.compile), which cannot be differentiated twice, as the exact penalty needs; pass the model "
        "that was not compiled (compiled_model._orig_mod is it), or use DensityPenalty(method='finite_difference')"
    )


def check_given_logits(logits: Tensor, x: Tensor) -> None:
    """What holds by construction where a penalty runs the model itself."""
    check_input(x)
    check_autograd()
    check_logits(logits, x)
    if not x.requires_grad:
        raise RuntimeError(
            "x does not require a gradient, so the logits have no gradient path from it; call x.requires_grad_() "
            "before the model, or let the penalty run the model: penalty(model, x, y)"
        )
    if not logits.requires_grad:
        raise no_path()
    refuse_compiled_logits(logits)
    # The node through which the results of a DistributedDataParallel go knows their module.
    refuse_static_graph(getattr(logits.grad_fn, "ddp_weakref", lambda: None)())
    if in_use():
        refuse_freed_weights_behind(logits)


def refuse_normalised(logits: Tensor) -> None:
    """Log-probabilities have log Σ exp = 0 for every x, so the density penalty of them is identically zero."""
    head = _head(logits)
    if head is not None and _is_normalised(head, samples=logits.shape[0]):
        raise ValueError(
            "the model ends in log-softmax: its outputs are log-probabilities, whose log-sum-exp is 0 for every x, so "
            "the density penalty would be identically zero; return the logits before the log-softmax (and train with "
            "cross-entropy in the place of the negative log-likelihood)"
        )


def _is_normalised(head: Any, samples: int) -> bool:
    """Whether a node is a log-softmax within each sample: the operation itself, or written out in one of two ways."""
    kind = _kind(head)
    if kind == "LogSoftmaxBackward":
        return _within_samples(head, head._saved_dim, samples)
    if kind == "LogBackward":  # log softmax f
        softmax = _behind_views(head.next_functions[0][0])
        return _kind(softmax) == "SoftmaxBackward" and _within_samples(softmax, softmax._saved_dim, samples)
    if kind == "SubBackward" and head._saved_alpha == 1:  # f − log Σ exp f
        minuend, (subtrahend, _) = head.next_functions
        return (
            _kind(subtrahend) == "LogsumexpBackward"
            and subtrahend.next_functions[0] == minuend
            and subtrahend._saved_keepdim
            and all(_within_samples(head, dim, samples) for dim in subtrahend._saved_dim)
        )
    return False


def _within_samples(node: Any, dim: int, samples: int) -> bool:
    """Whether ``dim`` of a node's result is not the samples', which are dimension 0 if there are as many of them."""
    shape = node._input_metadata[0].shape
    dim = dim - 2**64 if dim >= 2**63 else dim  # negative dims are saved as unsigned 64-bit numbers
    return shape[0] == samples and dim % len(shape) != 0


def _head(logits: Tensor) -> Any:
    """The autograd node that computed the logits, behind views and casts; None for a leaf."""
    return _behind_views(logits.grad_fn)


def _behind_views(node: Any) -> Any:
    for _ in range(_LONGEST_PASSAGE):
        if _kind(node) not in _PASSED_ON:
            break
        node = node.next_functions[0][0]
    return node


def _kind(node: Any) -> str:
    """The name of one of PyTorch's autograd nodes without its number; "" for none and for a Function's."""
    if node is None or isinstance(node, BackwardCFunction):  # whose name may be an attribute that hides the method
        return ""
    name = node.name()
    return name.rstrip("0123456789") if name[-1:].isdigit() else ""


def check_labels(labels: Any, logits: Tensor) -> None:
    """labels are class indices of the logits' rows. Their range is checked by the caller, on CPU alone."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"y is a {type(labels).__name__}; it must be a torch.Tensor of class indices (N,)")
    if labels.dtype != torch.int64:
        raise TypeError(
            f"y is {labels.dtype}; the gradient of the target's logit needs class indices, torch.int64. Convert other "
            "integers with y.long(); for probabilities use of='cross_entropy'"
        )
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"y has shape {tuple(labels.shape)}; class indices for logits of shape {tuple(logits.shape)} must have "
            f"shape {tuple(logits.shape[:1])}"
        )
    if labels.device != logits.device:
        raise ValueError(f"y is on {labels.device} and the logits on {logits.device}; move one to the other's device")
