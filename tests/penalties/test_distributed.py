"""A penalised step on several processes, by DistributedDataParallel and by ``fully_shard``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import distributed_steps
import pytest
import torch
from distributed_steps import LOSSES, PROCESSES, SHARDED, network

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="PyTorch was built without torch.distributed or gloo",
)


def test_steps_are_those_of_one_process(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    files = [tmp_path / f"{rank}.pt" for rank in range(PROCESSES)]
    processes = [
        subprocess.Popen(
            [sys.executable, distributed_steps.__file__, str(rank), str(tmp_path / "meeting"), str(file)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank, file in enumerate(files)
    ]  # fmt: skip
    try:
        errors = [process.communicate()[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, "\n".join(errors)
    found = [torch.load(file) for file in files]
    for name in LOSSES:
        each = [distributed_steps.gradients(name, network(), rank) for rank in range(PROCESSES)]
        mean = [sum(of_ranks) / PROCESSES for of_ranks in zip(*each, strict=True)]
        for fused in (False, True):
            for of_rank in found:
                torch.testing.assert_close(of_rank[name, fused], mean, rtol=1e-9, atol=1e-12)
    for of_rank in found:
        assert ["static_graph" in message for message in of_rank["static graph"]] == [True] * 3
        assert ["set_reshard_after_backward(False)" in message for message in of_rank["freed weights"]] == [True] * 6
    for name in SHARDED:
        truth = distributed_steps.trained(name, network(), list(range(PROCESSES)))
        for of_rank in found:
            torch.testing.assert_close(of_rank["sharded", name], truth, rtol=1e-9, atol=1e-12)
