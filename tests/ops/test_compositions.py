"""Every way to differentiate an operation is right or raises; none is silently wrong.

The function under test is a scalar of each operation; the truth is the same scalar of plain PyTorch. Each way is one
row of ``WAYS``. The few that end in an error are named in ``RAISES``, with the error.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy

import rds_fast

Scalar = Callable[[Tensor], Tensor]
TARGET = torch.tensor([0, 2, 4, 1])


def _target(x: Tensor) -> Tensor:
    return TARGET[: x.shape[0]]


X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
V = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _both(f: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy(f, _target(f), reduction="none"), torch.logsumexp(f, 1)


# An uneven weight a row keeps a wrong order of rows from passing; sin keeps the second derivative from vanishing.
def _scalar(rows: Tensor) -> Tensor:
    return (rows.sin() * torch.linspace(1, 2, rows.shape[0], dtype=rows.dtype)).sum()


OPERATIONS: dict[str, tuple[Scalar, Scalar]] = {
    "logsumexp": (
        lambda x: _scalar(rds_fast.logsumexp(x, 1)),
        lambda x: _scalar(torch.logsumexp(x, 1)),
    ),
    "cross_entropy": (
        lambda x: _scalar(torch.mul(*rds_fast.cross_entropy_with_logsumexp(x, _target(x)))),
        lambda x: _scalar(torch.mul(*_both(x))),
    ),
    "gradient_norm": (
        lambda x: _scalar(rds_fast.gradient_norm(x, 3.0)),
        lambda x: _scalar(torch.linalg.vector_norm(x, 3.0, dim=1)),
    ),
}


def autograd_once(f: Scalar) -> Tensor:
    x = X.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def autograd_twice(f: Scalar) -> Tensor:
    x = X.clone().requires_grad_()
    (gx,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad((gx * V).sum(), x)[0]


def autograd_three_times(f: Scalar) -> Tensor:
    x = X.clone().requires_grad_()
    (gx,) = torch.autograd.grad(f(x), x, create_graph=True)
    (dx,) = torch.autograd.grad((gx * V).sum(), x, create_graph=True)
    return torch.autograd.grad(dx.sum(), x)[0]


def penalty_gradient(f: Scalar) -> Callable[[Tensor], Tensor]:
    """The gradient of a squared gradient: the step of a penalty."""
    return grad(lambda x: grad(f)(x).square().sum())


def autograd_penalty_gradient(f: Scalar) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        (gx,) = torch.autograd.grad(f(x), x, create_graph=True)
        return torch.autograd.grad(gx.square().sum(), x)[0]

    return step


def dual_numbers(f: Scalar) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(X, V))).tangent


def checkpointed(f: Scalar) -> Tensor:
    x = X.clone().requires_grad_()
    value = torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)
    (gx,) = torch.autograd.grad(value, x, create_graph=True)
    return torch.autograd.grad((gx * V).sum(), x)[0]


def compiled_backward(f: Scalar) -> Tensor:
    x = X.clone().requires_grad_()
    return torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)[0]


def exported(f: Scalar) -> Tensor:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x)

    x = X.clone().requires_grad_()
    return torch.autograd.grad(torch.export.export(Model(), (X,)).module()(x), x)[0]


WAYS: dict[str, Callable[[Scalar], Tensor]] = {
    "autograd once": autograd_once,
    "autograd twice": autograd_twice,
    "autograd three times": autograd_three_times,
    "func.grad": lambda f: grad(f)(X),
    "func.grad twice": lambda f: penalty_gradient(f)(X),
    "func.grad three times": lambda f: grad(lambda x: penalty_gradient(f)(x).sum())(X),
    "jvp": lambda f: jvp(f, (X,), (V,))[1],
    "jvp of jvp": lambda f: jvp(lambda x: jvp(f, (x,), (V,))[1], (X,), (V.cos(),))[1],
    "jvp of grad": lambda f: jvp(grad(f), (X,), (V,))[1],
    "grad of jvp": lambda f: grad(lambda x: jvp(f, (x,), (V,))[1])(X),
    "dual numbers": dual_numbers,
    "hessian": lambda f: hessian(f)(X),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f))(X),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f))(X),
    "vmap": lambda f: vmap(f)(torch.stack([X, V, X + V])),
    "vmap over a middle dimension": lambda f: vmap(f, in_dims=1)(torch.stack([X, V, X + V], 1)),
    "vmap over the last dimension of one row": lambda f: vmap(f, in_dims=2)(torch.stack([X[:1], V[:1]], 2)),
    "vmap of grad twice": lambda f: vmap(penalty_gradient(f))(torch.stack([X, V])),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(torch.stack([x, 2 * x])).sum())(X),
    "checkpoint, autograd twice": checkpointed,
    "compile, fullgraph": lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")(X),
    "compile, fullgraph, backward": compiled_backward,
    "compile of func.grad": lambda f: torch.compile(grad(f), fullgraph=True, backend="aot_eager")(X),
    "compile of func.grad twice": lambda f: torch.compile(penalty_gradient(f), backend="aot_eager")(X),
    "make_fx of func.grad twice": lambda f: make_fx(penalty_gradient(f))(X)(X + V),
    "make_fx of autograd twice": lambda f: make_fx(autograd_penalty_gradient(f))(X.clone().requires_grad_())(X + V),
    "export": exported,
}
# What the truth is, where it is not the same way through plain PyTorch.
TRUTH = {
    "make_fx of func.grad twice": lambda f: penalty_gradient(f)(X + V),
    "make_fx of autograd twice": lambda f: penalty_gradient(f)(X + V),
    "compile, fullgraph": lambda f: f(X),
    "compile, fullgraph, backward": autograd_once,
    "compile of func.grad": lambda f: grad(f)(X),
    "compile of func.grad twice": lambda f: penalty_gradient(f)(X),
    "export": autograd_once,
}
RAISES = {"autograd three times", "func.grad three times"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_right_or_an_error(fused_backend: str, operation: str, way: str) -> None:
    ours, plain = OPERATIONS[operation]
    torch.compiler.reset()
    if way in RAISES:
        with pytest.raises(RuntimeError, match=r"third derivative of rds_fast\.\w+ was asked for"):
            WAYS[way](ours)
        return
    truth = TRUTH.get(way, WAYS[way])(plain)
    torch.testing.assert_close(WAYS[way](ours).detach(), truth.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_a_step_traced_by_make_fx_then_compiled(fused_backend: str) -> None:
    ours, plain = OPERATIONS["logsumexp"]
    torch.compiler.reset()
    traced = make_fx(penalty_gradient(ours))(X)
    assert any("rds_fast.logsumexp_double_backward" in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(torch.compile(traced)(X), penalty_gradient(plain)(X), rtol=1e-10, atol=1e-12)


RAW = torch.ops.rds_fast
_LSE = torch.logsumexp(X, 1)
_N = X.norm(dim=1, keepdim=True)
RAW_CALLS = {
    "logsumexp": (X, False),
    "logsumexp_backward": (_LSE, X, _LSE),
    "logsumexp_double_backward": (V, _LSE, X, _LSE),
    "cross_entropy": (X, TARGET, 0.1, -100, False),
    "cross_entropy_backward": (_LSE, _LSE, X, TARGET, _LSE, 0.1, -100),
    "cross_entropy_double_backward": (V, _LSE, _LSE, X, TARGET, _LSE, 0.1, -100),
    "gradient_norm": (X, 2.0, 1.0, False),
    "gradient_norm_backward": (_LSE, X, _N, 2.0, 1.0),
    "gradient_norm_double_backward": (V, _LSE, X, _N, 2.0, 1.0),
}


def _to(dtype: torch.dtype, arguments: tuple) -> tuple:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


@pytest.mark.parametrize("name", RAW_CALLS)
def test_opcheck(fused_backend: str, name: str) -> None:
    torch.library.opcheck(getattr(RAW, name).default, (*RAW_CALLS[name], fused_backend))


@pytest.mark.parametrize("name", ["logsumexp", "cross_entropy", "gradient_norm"])
def test_opcheck_in_16_bit(fused_backend: str, name: str) -> None:
    torch.library.opcheck(getattr(RAW, name).default, (*_to(torch.bfloat16, RAW_CALLS[name]), fused_backend))


@pytest.mark.parametrize("name", RAW_CALLS)
def test_a_raw_operation_refuses_to_be_differentiated(fused_backend: str, name: str) -> None:
    first, *rest = RAW_CALLS[name]
    result = getattr(RAW, name)(first.clone().requires_grad_(), *rest, fused_backend)
    result = result if isinstance(result, Tensor) else result[0]
    with pytest.raises(RuntimeError, match="has no derivative of its own"):
        result.sum().backward()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_fused_operations_run_on_meta_tensors(operation: str) -> None:
    x = torch.empty(4, 5, device="meta", requires_grad=True)
    public = {
        "logsumexp": lambda: rds_fast.logsumexp(x, 1),
        "cross_entropy": lambda: rds_fast.cross_entropy_with_logsumexp(x, TARGET.to("meta"))[0],
        "gradient_norm": lambda: rds_fast.gradient_norm(x),
    }[operation]
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Record():
        (gx,) = torch.autograd.grad(public().sum(), x, create_graph=True)
        gx.sum().backward()
    expected = [f"rds_fast::{operation}{order}" for order in ("", "_backward", "_double_backward")]
    assert [name for name in seen if name.startswith("rds_fast")] == expected


def test_fake_tensors() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 5, requires_grad=True)
        ce, _ = rds_fast.cross_entropy_with_logsumexp(x, torch.empty(4, dtype=torch.int64))
        (gx,) = torch.autograd.grad(ce.sum(), x, create_graph=True)
        rds_fast.gradient_norm(gx).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == (4, 5)


RESULTS: dict[str, tuple[Scalar, Scalar]] = {
    "logsumexp": (lambda x: rds_fast.logsumexp(x, 1), lambda x: torch.logsumexp(x, 1)),
    "cross_entropy": (
        lambda x: rds_fast.cross_entropy_with_logsumexp(x, _target(x))[1],
        lambda x: torch.logsumexp(x, 1),
    ),
    "gradient_norm": (lambda x: rds_fast.gradient_norm(x), lambda x: torch.linalg.vector_norm(x, dim=1)),
}


@pytest.mark.parametrize("operation", RESULTS)
def test_a_hook_of_the_result_is_given_gradients_alone(fused_backend: str, operation: str) -> None:
    """Also while the first backward is differentiated, in which the saved result takes part."""
    found = []
    for function in RESULTS[operation]:
        x = X.clone().requires_grad_()
        result = function(x)
        result.register_hook(lambda gradient: gradient * 1)
        (gradient,) = torch.autograd.grad(result.sum(), x, create_graph=True)
        found += torch.autograd.grad(gradient.sin().sum(), x)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
