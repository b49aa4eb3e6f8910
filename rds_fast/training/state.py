"""All that changes while a model is trained, and its way to a checkpoint and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn import fuse
from . import checkpoints, models
from .config import TrainingConfig
from .objectives import Objective
from .optimization import build_optimizer

LOSSES = ("total", "cross_entropy", "penalty", "accuracy")


class TrainingState:
    """The model, its optimiser and gradient scaler, a weight that adapts, the steps done, and torch's generators.

    The learning rate, any other weight of a penalty and the order of the data follow from the step and the
    configuration, so they are no state. Attacks, projections and shares of a batch are drawn from torch's global
    generators, which construction seeds.

    Attributes:
        step: the steps done.
        seconds: spent on them.
        sums: of the losses over the samples of this epoch so far, as ``LOSSES``.
    """

    def __init__(
        self,
        config: TrainingConfig,
        device: torch.device,
        classes: int,
        objective: Objective,
        normalization: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.device, self._objective = device, objective
        self.model = models.build(config.model, config.image_shape, classes, normalize=normalization)
        if config.fuse:
            self.model = fuse(self.model, inplace=True)
        self.model.to(device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stub
        self.optimizer = build_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.step = 0
        self.seconds = 0.0
        self.sums = [0.0] * len(LOSSES)

    def is_finite(self) -> bool:
        """Whether every weight is a finite number. Waits for the device."""
        with torch.no_grad():
            # One sum a tensor: it is finite only if all its elements are, or they overflow, which is as bad.
            sums = [parameter.double().sum() for parameter in self.model.state_dict().values()]
            return bool(torch.stack(sums).isfinite().all())

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically."""
        optimizer_tensors, optimizer_rest = checkpoints.pack_optimizer(self.optimizer)
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        tensors: dict[str, Tensor] = {
            **checkpoints.prefixed("model", self.model.state_dict()),
            **checkpoints.prefixed("optimizer", optimizer_tensors),
            **checkpoints.prefixed("objective", self._objective.state_dict()),
            **checkpoints.prefixed("generator", generators),
        }
        rest: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "optimizer": optimizer_rest,
            "scaler": self.scaler.state_dict(),
        }
        checkpoints.save(path, tensors, rest)

    def load(self, path: Path) -> None:
        """Return to a checkpoint.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of another model.
        """
        tensors, rest = checkpoints.load(
            path,
            "the progress since the last good checkpoint is lost. If you kept a copy of that one, put it here; else "
            "delete the file, and --resume begins the run again",
        )
        try:
            self.model.load_state_dict(checkpoints.under("model", tensors))
            checkpoints.unpack_optimizer(self.optimizer, checkpoints.under("optimizer", tensors), rest["optimizer"])
            self.scaler.load_state_dict(rest["scaler"])
            self._objective.load_state_dict(checkpoints.under("objective", tensors))
            self.step, self.seconds, self.sums = rest["step"], rest["seconds"], rest["sums"]
            generators = checkpoints.under("generator", tensors)
            torch.set_rng_state(generators["cpu"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} does not fit this run ({error}); delete it to begin again") from error
        if self.device.type == "cuda" and "cuda" in generators:  # absent where the run began on a CPU
            torch.cuda.set_rng_state(generators["cuda"], self.device)
