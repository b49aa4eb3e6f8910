"""Checkpoints: one safetensors file each, whose header carries the rest as JSON. No pickle, so no code is ever loaded.

Tensors and JSON are one file so that one rename makes both current: whenever the process dies, the file on the disk is
the old checkpoint or the new one, whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .extras import require


# What a file is called while it is written; a killed process leaves it.
TEMPORARY = ".*.tmp"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by new content; a reader, or a crash, sees the old content or the new and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself survives a power failure only once the folder is on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and a JSON-able state as one file, atomically."""
    safetensors = require("safetensors.torch", "checkpoints")
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, safetensors.save(on_cpu, metadata={"state": json.dumps(state, allow_nan=False)}))


def load(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save`` wrote, on the CPU.

    Args:
        path: the file.
        remedy: what to do if it is damaged, for the error's message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a checkpoint of this package.
    """
    safetensors = require("safetensors", "checkpoints")
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or is no checkpoint of rds_fast ({error!r}): {remedy}") from error


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under ``prefix.name``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``prefixed``: those of the tensors whose names begin with ``prefix.``."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as flat tensors, ``parameter.name``, and JSON for all else."""
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, entries in packed["state"].items():
        for name, entry in entries.items():
            if isinstance(entry, Tensor):
                tensors[f"{parameter}.{name}"] = entry
            else:
                values.setdefault(str(parameter), {})[name] = entry
    return tensors, {"values": values, "groups": packed["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Load into an optimiser what ``pack_optimizer`` took out."""
    state: dict[int, dict[str, Any]] = {int(parameter): dict(entries) for parameter, entries in rest["values"].items()}
    for key, tensor in tensors.items():
        parameter, name = key.split(".", 1)
        state.setdefault(int(parameter), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
    for weight, entries in optimizer.state.items():  # files are contiguous, and parameters may be channels last
        for name, entry in entries.items():
            if isinstance(entry, Tensor) and entry.shape == weight.shape:
                entries[name] = torch.empty_like(weight, dtype=entry.dtype).copy_(entry)
