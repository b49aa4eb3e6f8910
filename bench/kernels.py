"""Bandwidth of the operations, forward, backward and double backward, against a copy of the same bytes.

    python bench/kernels.py                         # this machine's device, the default sizes
    python bench/kernels.py --device cpu --sizes 8192x1000 65536x10 --providers torch native
    python bench/kernels.py --operations logsumexp --dtypes bfloat16 --providers torch compile native triton

Each operation runs through its public function and autograd, PyTorch's own and ours alike. The bytes are those that
the mathematics needs (``BYTES``), not those that an implementation moves, so that a share of the copy's rate of 1 is
the floor. The copy reads and writes half of the bytes each. ``exp`` is ``torch.exp`` into a given output over as many
elements: where it is slower than the copy, it bounds the forward. On a GPU the rates are of the kernels alone, and the
host's time to launch them is a record of its own.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rds_fast
from bench.measure import Results, device_name, host_seconds, interleaved_seconds, keep_freed_memory

MODES = ("forward", "backward", "double_backward")

# Bytes a pass must move for N·C elements of a given size: each input read once, each output written once. Values of
# one a row (log-sum-exp, cotangents, targets) are left out: they are 1/C of the rest.
BYTES: dict[str, int] = {
    "forward": 1,  # x
    "backward": 2,  # x, gx
    "double_backward": 3,  # x, v, dx
}

# Why each size: a classifier of 1,000 classes; a small and a large vocabulary; CIFAR's 10 classes.
CPU_SIZES = ("8192x1000", "512x32768", "128x131072", "65536x10")
# N·C >= 2²⁸ so that a pass outlasts its launch and exceeds the cache: 1,000 classes; vocabularies of which a row of
# the double backward fits on chip and does not; then 10 classes, where the launch counts.
CUDA_SIZES = ("268436x1000", "8192x32768", "2048x131072", "1024x262144", "65536x10")

Passes = dict[str, Callable[[], object]]


def passes(function: Callable[[Tensor], Tensor], x: Tensor) -> Passes:
    """The three passes of a row-wise function, each alone, through autograd."""
    x = x.detach().requires_grad_()
    result = function(x)
    g = torch.rand_like(result).add_(0.5).requires_grad_()
    (gx,) = torch.autograd.grad(result, x, g, create_graph=True)
    v = torch.randn_like(gx)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(x)

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(result, x, g.detach(), retain_graph=True),
        "double_backward": lambda: torch.autograd.grad(gx, (g, x), v, retain_graph=True),
    }


def compiled_passes(function: Callable[[Tensor], Tensor], x: Tensor) -> Passes:
    """The same, each pass as one graph of plain PyTorch compiled by itself: autograd cannot compile a second order."""
    x = x.detach()
    g = torch.rand_like(function(x)).add_(0.5)
    v = torch.randn_like(x)

    def backward(x: Tensor, g: Tensor) -> Tensor:
        return torch.func.vjp(function, x)[1](g)[0]

    def double_backward(x: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.vjp(backward, x, g)[1](v)

    forward, backward_, double = (torch.compile(f, fullgraph=True) for f in (function, backward, double_backward))
    return {
        "forward": lambda: forward(x),
        "backward": lambda: backward_(x, g),
        "double_backward": lambda: double(x, g, v),
    }


def functions(operation: str, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """PyTorch's function and ours, of (N, C) to (N,)."""
    if operation == "logsumexp":
        return lambda t: torch.logsumexp(t, 1), lambda t: rds_fast.logsumexp(t, 1)
    if operation == "gradient_norm":
        return lambda t: torch.linalg.vector_norm(t, dim=1), rds_fast.gradient_norm
    target = torch.randint(x.shape[1], (x.shape[0],), device=x.device)
    return (
        lambda t: torch.nn.functional.cross_entropy(t, target, reduction="none") + torch.logsumexp(t, 1),
        lambda t: torch.add(*rds_fast.cross_entropy_with_logsumexp(t, target)),
    )


def provider_passes(provider: str, operation: str, x: Tensor) -> Passes:
    torchs, ours = functions(operation, x)
    if provider == "torch":
        return passes(torchs, x)
    if provider == "compile":
        return compiled_passes(torchs, x)
    with rds_fast.use_backend(provider):
        made = passes(ours, x)

    def forward() -> object:
        with rds_fast.use_backend(provider):
            return made["forward"]()

    return {**made, "forward": forward}


def copy_of(number_of_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    source = torch.ones(max(number_of_bytes // 8, 1), device=device)
    destination = torch.empty_like(source)
    return lambda: destination.copy_(source)


def run_case(
    operation: str, mode: str, size: str, dtype: torch.dtype, providers: list[str], device: torch.device, rounds: int
) -> list[tuple[str, float, float]]:
    """Measures one case, appends its records, and returns (provider, median GB/s, median share of the copy)."""
    rows, columns = (int(part) for part in size.split("x"))
    torch.manual_seed(0)
    x = torch.randn(rows, columns, device=device, dtype=dtype)
    number_of_bytes = BYTES[mode] * x.numel() * x.element_size()
    candidates = {"copy": copy_of(number_of_bytes, device)}
    if mode == "forward":
        out = torch.empty_like(x)
        candidates["exp"] = lambda: torch.exp(x, out=out)
    for provider in providers:
        candidates[provider] = provider_passes(provider, operation, x)[mode]
    times = interleaved_seconds(candidates, device, rounds, without_host=True)
    results = Results("kernels", device)
    summary = []
    for name, seconds in times.items():
        rate = number_of_bytes / seconds * 1e-9
        share = times["copy"] / seconds
        record = {
            "operation": operation,
            "provider": name,
            "mode": mode,
            "size": size,
            "dtype": str(dtype).removeprefix("torch."),
        }
        results.append(rate, metric="bandwidth", unit="GB/s", **record)
        results.append(share, metric="share_of_copy", unit="1", **record)
        if device.type == "cuda":
            results.append(host_seconds(candidates[name], device), metric="host_time", unit="s", **record)
        summary.append((name, float(torch.tensor(rate).median()), float(torch.tensor(share).median())))
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", help="NxC, such as 8192x1000")
    parser.add_argument(
        "--operations",
        nargs="+",
        default=["logsumexp", "cross_entropy", "gradient_norm"],
        choices=["logsumexp", "cross_entropy", "gradient_norm"],
    )
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--dtypes", nargs="+", default=None, choices=["float64", "float32", "bfloat16", "float16"])
    parser.add_argument(
        "--providers", nargs="+", default=None, choices=["torch", "compile", "reference", "native", "triton"]
    )
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    sizes = arguments.sizes or (CUDA_SIZES if cuda else CPU_SIZES)
    dtypes = arguments.dtypes or (["float32", "bfloat16"] if cuda else ["float32"])
    ours = [backend for backend in rds_fast.backends.available(device) if backend != "reference"]
    if not cuda and "triton" in ours:
        ours.remove("triton")  # the interpreter
    providers = arguments.providers or ["torch", *ours]
    keep_freed_memory()
    print(f"{device_name(device)}, torch {torch.__version__}; medians of {arguments.rounds} interleaved rounds")
    failed = 0
    for operation in arguments.operations:
        for dtype in dtypes:
            for size in sizes:
                for mode in arguments.modes:
                    case = (operation, mode, size, getattr(torch, dtype), providers, device, arguments.rounds)
                    try:
                        rates = run_case(*case)
                    except Exception:  # one case keeps nothing from the others
                        figures, failed = f"failed: {traceback.format_exc()}", failed + 1
                    else:
                        figures = "  ".join(f"{name} {rate:.1f} GB/s ({share:.0%})" for name, rate, share in rates)
                    print(f"{operation:14} {dtype:9} {size:>13} {mode:16} {figures}", flush=True)
    print(f"appended to {Results('kernels', device).path}")
    if failed:
        sys.exit(f"{failed} cases failed")


if __name__ == "__main__":
    main()
