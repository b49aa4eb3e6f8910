"""Whole training steps, interleaved in one process: time, peak memory, ratio to the stock cross-entropy step.

    python bench/step.py                                      # ResNet-18 at 32², batch 32, fp32, this machine's device
    python bench/step.py --mode eval --providers cross_entropy eager ours --threads 2
    python bench/step.py --preset resnet50-h200               # bf16 autocast, channels-last, batch 256 at 224²
    python bench/step.py --preset resnet18-h200 --profile ours --rounds 5
    python bench/step.py --preset resnet18-h200 --cuda-graph  # each step captured once and replayed

A step is forward, penalty and backward into the parameters' gradients; ``--optimizer`` adds SGD with momentum. Every
provider has a network of its own with the same weights. Before the timing each says its loss and the norm of its
gradient: a step that computes something else is not a rival. (The finite difference approximates, and leaves autocast;
PyTorch's TF32 convolutions, its default on CUDA, stay on for it, which it pays for in accuracy.) Ratios are taken
within a round. On a GPU the host's time is given beside: where it is not much shorter than the step's, the GPU waited.
Peak memory is that of one step, above what stood before it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import Results, captured, device_name, host_seconds, interleaved_seconds, keep_freed_memory
from bench.one_graph import one_graph_step
from bench.steps import LOSSES, Case, NotAvailable, attempt

PROVIDERS = ("cross_entropy", "cross_entropy_fused", "eager", "one_graph", "finite_difference", "ours", "ours_fused")
PRESETS = {
    "resnet50-h200": Case("resnet50", 224, 256, autocast=torch.bfloat16, channels_last=True),
    "resnet18-h200": Case("resnet18", 32, 1024, autocast=torch.bfloat16, channels_last=True),
}
AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Step = Callable[[Tensor, Tensor], Tensor]


class Runner(NamedTuple):
    """One provider's step on its own network."""

    network: nn.Module
    run: Callable[[], Tensor]

    def gradient_norm(self) -> float:
        squares = [p.grad.double().square().sum() for p in self.network.parameters() if p.grad is not None]
        return float(torch.stack(squares).sum().sqrt())


def provider_step(provider: str, network: nn.Module, case: Case, device: torch.device) -> Step:
    """A function of the batch that fills the network's gradients and returns the loss."""
    if provider == "one_graph":
        return one_graph_step(network, device, case.autocast)
    loss = case.under_autocast(device, LOSSES[provider](network))

    def step(x: Tensor, y: Tensor) -> Tensor:
        total = loss(x, y)
        total.backward()
        return total.detach()

    return step


def prepare(
    provider: str,
    network: nn.Module,
    case: Case,
    batch: tuple[Tensor, Tensor],
    *,
    optimizer: bool = False,
    cuda_graph: bool = False,
) -> Runner:
    """The provider's step, run once, on a network of its own."""
    x, y = batch
    network = copy.deepcopy(network)
    step = provider_step(provider, network, case, x.device)
    attempt(provider, lambda: step(x, y))
    update = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9) if optimizer else None

    def run() -> Tensor:
        network.zero_grad(set_to_none=True)
        loss = step(x, y)
        if update:
            update.step()
        return loss

    return Runner(network, attempt(provider, lambda: captured(run, x.device)) if cuda_graph else run)


def prepare_all(case: Case, device: torch.device, arguments: argparse.Namespace) -> tuple[dict[str, Runner], list[str]]:
    """The providers that can run, and those of ours that failed, which keep nothing from the others."""
    torch.manual_seed(0)
    network, batch = case.network(device), case.batch(device)
    runners, failed = {}, []
    for provider in arguments.providers:
        try:
            options = {"optimizer": arguments.optimizer, "cuda_graph": arguments.cuda_graph}
            runner = prepare(provider, network, case, batch, **options)
        except NotAvailable as reason:
            print(f"{provider:20} not available: {reason}", flush=True)
            continue
        except Exception:
            print(f"{provider:20} failed: {traceback.format_exc()}", flush=True)
            failed.append(provider)
            continue
        runners[provider] = runner
        loss = float(runner.run())
        print(f"{provider:20} loss {loss:.6f}, norm of the gradient {runner.gradient_norm():.6f}", flush=True)
    return runners, failed


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory allocated in one step, above what was allocated before it."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def profile(run: Callable[[], object], device: torch.device, rows: int) -> None:
    """The kernels of one step, the longest first; on a CPU PyTorch's operations."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    run()
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == wanted]
    time = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total for event in events}
    events.sort(key=lambda event: -time[event.key])
    total = sum(time.values())
    print(f"{sum(event.count for event in events)} {'kernels' if cuda else 'operations'}, {total * 1e-3:.2f} ms")
    for event in events[:rows]:
        print(f"{time[event.key] * 1e-3:10.3f} ms {time[event.key] / total:6.1%} {event.count:6} x  {event.key[:100]}")


def measure(case: Case, device: torch.device, arguments: argparse.Namespace) -> list[str]:
    """Measures one case, appends its records, prints them, and returns the providers that failed."""
    runners, failed = prepare_all(case, device, arguments)
    if not runners:
        return failed
    if arguments.profile:
        profile(runners[arguments.profile].run, device, arguments.rows)
        return failed
    times = interleaved_seconds({name: r.run for name, r in runners.items()}, device, arguments.rounds)
    results = Results("step", device)
    operation = "training_step" + ("_with_optimizer" if arguments.optimizer else "")
    record = {
        "operation": operation + ("_as_cuda_graph" if arguments.cuda_graph else ""),
        "mode": case.mode,
        "size": case.size,
        "dtype": case.precision + (", channels-last" if case.channels_last else ""),
    }
    of_gpu = f"{'host ms':>10}{'GB at peak':>12}" if device.type == "cuda" else ""
    print(f"\n{'':20}{'ms':>10}  {'p20 to p80':20}{'ratio':>7}  {'p20 to p80':14}{of_gpu}")
    for provider, seconds in times.items():
        results.append(seconds, provider=provider, metric="time", unit="s", **record)
        low, middle, high = numpy.percentile(seconds * 1e3, (20, 50, 80))
        line = f"{provider:20}{middle:10.2f}  {f'{low:.2f} to {high:.2f}':20}"
        if "cross_entropy" in times:
            ratio = seconds / times["cross_entropy"]
            results.append(ratio, provider=provider, metric="ratio_to_cross_entropy", unit="1", **record)
            low, middle, high = numpy.percentile(ratio, (20, 50, 80))
            line += f"{middle:7.3f}  {f'{low:.3f} to {high:.3f}':14}"
        if device.type == "cuda":
            host = host_seconds(runners[provider].run, device)
            results.append(host, provider=provider, metric="host_time", unit="s", **record)
            line += f"{numpy.median(host) * 1e3:10.2f}"
            if not arguments.cuda_graph:  # whose memory is kept from step to step
                peak = peak_bytes(runners[provider].run, device)
                results.append(numpy.array([peak]), provider=provider, metric="peak_memory", unit="B", **record)
                line += f"{peak * 1e-9:12.2f}"
        print(line, flush=True)
    print(f"appended to {results.path}", flush=True)
    return failed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, help="cases of a GPU; they set all up to --mode")
    parser.add_argument("--model", default="resnet18", help="one of rds_fast's (32²) or torchvision's, by its name")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--amp", choices=AUTOCAST, default="none")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--mode", choices=["train", "eval"], default="train")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument(
        "--without", nargs="+", default=[], choices=PROVIDERS, help="such as one_graph, whose compilation takes minutes"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--optimizer", action="store_true", help="SGD's step is part of the step")
    parser.add_argument("--cuda-graph", action="store_true", help="capture each step and replay it; on a GPU only")
    parser.add_argument(
        "--no-cudnn-benchmark", action="store_true", help="cuDNN's heuristics choose algorithms, not its search"
    )
    parser.add_argument("--keep-freed-memory", action="store_true", help="glibc keeps freed pages, as in kernels.py")
    parser.add_argument("--profile", metavar="PROVIDER", choices=PROVIDERS, help="list this one's kernels instead")
    parser.add_argument("--rows", type=int, default=30, help="of the profile")
    arguments = parser.parse_args()
    if arguments.cuda_graph and not arguments.device.startswith("cuda"):
        parser.error(f"--cuda-graph needs a CUDA device, and --device is {arguments.device}")
    arguments.providers = [provider for provider in arguments.providers if provider not in arguments.without]
    if arguments.profile:
        arguments.providers = [arguments.profile]
    return arguments


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.keep_freed_memory:
        keep_freed_memory()
    torch.backends.cudnn.benchmark = not arguments.no_cudnn_benchmark
    own = Case(
        arguments.model,
        arguments.image_size,
        arguments.batch_size,
        autocast=AUTOCAST[arguments.amp],
        channels_last=arguments.channels_last,
    )
    failed = []
    for case in [PRESETS[name] for name in arguments.preset] if arguments.preset else [own]:
        case = case._replace(mode=arguments.mode)
        layout = "channels-last" if case.channels_last else "contiguous"
        print(f"{device_name(device)}, torch {torch.__version__}; {case.size}, {case.precision}, {layout}, {case.mode}")
        failed += measure(case, device, arguments)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
