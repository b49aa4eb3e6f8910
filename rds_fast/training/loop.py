"""The training loop. A run that is killed and resumed ends, on a CPU, with the same bits as one that is not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..penalties.loss import LossTerms
from . import checkpoints, data, runs
from .accuracy import evaluate_accuracy
from .checks import check_batch_norm, check_model
from .config import TrainingConfig
from .devices import cpu_threads, peak_memory_bytes, reset_peak_memory, resolve_device
from .display import Display
from .extras import require
from .interruption import Interruption
from .normalization import channel_statistics
from .objectives import Objective, Part
from .optimization import learning_rate_schedule
from .order import Order
from .processes import alone
from .state import LOSSES, TrainingState

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM, and the run was saved.

    Attributes:
        run_dir: the run, to be resumed.
        step: the number of steps that are done and saved.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        super().__init__(f"training stopped after step {step} and was saved in {run_dir}")
        self.run_dir, self.step = run_dir, step


class NonFiniteError(ArithmeticError):
    """A loss or a weight became infinite or NaN. The message names the step, its batch and the last checkpoint."""


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """A finished run.

    Attributes:
        model: in eval mode, on the device of the training.
        config: its settings.
        run_dir: its folder.
        metrics: the rows of metrics.jsonl; those with ``kind == "epoch"`` hold the validation accuracy.
        validation_accuracy: at the end, in [0, 1].
        seconds: of the loop, those of the resumed parts together.
    """

    model: nn.Module
    config: TrainingConfig
    run_dir: Path
    metrics: list[dict[str, Any]]
    validation_accuracy: float
    seconds: float


def train(
    config: TrainingConfig,
    run_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    splits: data.Splits | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train a classifier, writing metrics, checkpoints and the model into a folder (see ``runs``).

    Torch's global random generators and number of threads are as before when this returns.

    Args:
        config: the settings.
        run_dir: the folder, made if need be.
        resume: go on from the last checkpoint of the run in the folder (from the beginning, if it has none).
        overwrite: replace the run in the folder.
        quiet: show no progress.
        splits: the data, where they are loaded already; default: ``config.load_data()``.
        evaluation: settings of the evaluation that belong to the experiment; ``rds-fast evaluate`` takes them.

    Raises:
        FileExistsError: the folder holds a run, and neither ``resume`` nor ``overwrite`` is given; or other files.
        FileNotFoundError: ``resume``, and the folder holds no run; or a data file is missing.
        ValueError: the settings are not those of the run to be resumed, another process is at work in the folder (see
            ``processes.alone``), there is no such device, or a file is damaged.
        TrainingInterrupted: Ctrl-C or SIGTERM; everything was saved.
        NonFiniteError: a loss or a weight became infinite or NaN; the last good checkpoint is kept.
        ImportError: a package of the extra ``train`` is needed and missing.
    """
    run_dir = Path(run_dir)
    device = resolve_device(config.device)
    if resume and overwrite:
        raise ValueError("resume and overwrite are both given; they exclude each other")
    with alone(run_dir, "another training"):
        if resume:
            runs.check_same(run_dir, config)
        else:
            runs.check_free(run_dir, overwrite)
        splits = splits or (runs.load_data(run_dir, config) if resume else config.load_data())
        if resume:
            runs.check_same_data(run_dir, config, splits.train)
        with cpu_threads(config.threads), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            run = _Run(config, run_dir, device, splits, quiet)
            if resume:
                runs.keep_place(run_dir, config)
            else:
                runs.create(run_dir, config, splits.train, evaluation)  # only now: what cannot begin leaves no folder
            runs.remove_temporaries(run_dir)
            return run.run()


class _Run:
    """One run: its state, its data, and the losses that are still on the device."""

    def __init__(
        self, config: TrainingConfig, run_dir: Path, device: torch.device, splits: data.Splits, quiet: bool
    ) -> None:
        require("safetensors.torch", "a checkpoint")  # now, not when the first one is due
        self.config, self.run_dir, self.device = config, run_dir, device
        self.training, self.validation = splits.train.to(device), splits.validation.to(device)
        self.order = Order(len(self.training), config.batch_size, config.seed, self.training.index_device)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.objective = Objective(config, self.steps_per_epoch, self.training, device)
        self.groups = self.training.groups if config.loss == "group-dro" else None
        self.learning_rate = learning_rate_schedule(config, self.steps_per_epoch)
        normalization = channel_statistics(self.training) if config.normalize else None
        self.state = TrainingState(config, device, self.training.classes, self.objective, normalization)
        check_model(self.state.model, config, device)
        check_batch_norm(config, len(self.training), self.training.classes)
        self.total_steps = config.total_steps(self.steps_per_epoch)
        self.display = Display(math.ceil(self.total_steps / self.steps_per_epoch), self.total_steps, quiet)
        self.uncollected: list[Tensor] = []  # the losses of the last steps, so that not every step waits for the GPU
        self.waited = 0.0  # for data since the last row, in seconds
        reset_peak_memory(device)

    def run(self) -> TrainingResult:
        """From the checkpoint, if there is one, to the end."""
        state, config, display = self.state, self.config, self.display
        if (self.run_dir / runs.CHECKPOINT).exists():
            state.load(self.run_dir / runs.CHECKPOINT)
        runs.keep_metrics_until(self.run_dir, state.step)
        self.last_row = (state.step, state.seconds)
        display.begin(state.step)
        with Interruption() as interruption, display:
            batches = self.training.batches(self.order.batches(state.step, self.total_steps), config.augmentation)
            while state.step < self.total_steps:
                with self._stopwatch():
                    self._train_step(*self._next(batches))
                    log_is_due = self._due(config.log_interval)
                    checkpoint_is_due = self._due(config.checkpoint_interval) or interruption.requested
                    if log_is_due or checkpoint_is_due:
                        self._collect_losses()
                display.advance(state.step)
                if log_is_due:
                    display.report(self._write_metrics())
                if checkpoint_is_due:
                    self._save_checkpoint()
                if checkpoint_is_due and interruption.requested:
                    raise TrainingInterrupted(self.run_dir, state.step)
        return self._finish()

    def _next(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The next batch. The time until it is here is counted."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    @contextlib.contextmanager
    def _stopwatch(self) -> Iterator[None]:
        """Counts the time of the steps alone, not that of validation and checkpoints."""
        start = time.perf_counter()
        yield
        self.state.seconds += time.perf_counter() - start

    def _due(self, interval: int | None) -> bool:
        """At the end of each epoch and of the run, and every ``interval`` steps within an epoch."""
        step_of_epoch = self.state.step % self.steps_per_epoch
        return self._ends_epoch() or (interval is not None and step_of_epoch % interval == 0)

    def _ends_epoch(self) -> bool:
        """Whether an epoch ends here, or the run, as it may within one where its steps are given."""
        return self.state.step % self.steps_per_epoch == 0 or self.state.step == self.total_steps

    def _inputs(self, images: Tensor) -> Tensor:
        """What the model takes, of images as the data give them."""
        x = data.in_unit_interval(images)
        return x.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x

    def _autocast(self) -> torch.autocast:
        amp = self.config.amp
        return torch.autocast(self.device.type, dtype=_AUTOCAST.get(amp), enabled=amp != "none")

    def _train_step(self, images: Tensor, y: Tensor) -> None:
        """One step of the optimiser, from the gradients of the micro-batches."""
        state, size = self.state, self.config.micro_batch_size
        for group in state.optimizer.param_groups:
            group["lr"] = self.learning_rate(state.step)
        state.model.train()
        state.optimizer.zero_grad()
        groups = self._groups_of_step()
        weights = self.objective.sample_weight(y, groups)
        parts = []
        for first in range(0, len(y), size):
            part = slice(first, first + size)
            weight = None if weights is None else weights[part]
            share = len(y[part]) / len(y) if weights is None else weights[part].sum() / weights.sum()
            parts.append(self._backward(self._inputs(images[part]), y[part], weight, share))
        state.scaler.step(state.optimizer)
        state.scaler.update()
        self.objective.update(parts, groups)
        self.uncollected.append(torch.stack([part.sums() for part in parts]).sum(0))
        state.step += 1

    def _groups_of_step(self) -> Tensor | None:
        """The groups of the samples of this step, where they are weighted."""
        if self.groups is None:
            return None
        indices = self.order.batch(self.state.step).indices
        return self.groups[indices.to(self.groups.device, non_blocking=True)]

    def _backward(self, x: Tensor, y: Tensor, weight: Tensor | None, share: float | Tensor) -> Part:
        """Add a micro-batch's share of the batch's gradient.

        The loss is a mean over samples, so the batch's is the sum of the micro-batches', each weighted by its share of
        the samples, or of their weights: the last micro-batch of an epoch may be smaller.
        """
        with self._autocast():
            terms = self.objective(self.state.model, x, y, self.state.step, weight)
        self.state.scaler.scale(terms.total * share).backward()
        return Part(LossTerms(*(term.detach() for term in terms)), y, share)

    def _validate(self) -> tuple[float, float]:
        """Accuracy and cross-entropy on the validation split, in the precision of training."""
        with self._autocast():
            return evaluate_accuracy(
                self.state.model.eval(), self.validation, self.config.micro_batch_size, self._inputs
            )

    def _collect_losses(self) -> None:
        """Bring the losses of the last steps to the host and add them up, in an order that no interval changes."""
        if not self.uncollected:
            return
        first_step = self.state.step - len(self.uncollected)
        collected = torch.stack(self.uncollected).cpu()
        self.uncollected = []
        for step, losses in enumerate(collected.tolist(), first_step):
            if not all(map(math.isfinite, losses)):
                shown = dict(zip(LOSSES, (loss / len(self.order.batch(step).indices) for loss in losses), strict=True))
                raise self._non_finite(step, f"the loss is not finite ({shown})")
            self.state.sums = [total + loss for total, loss in zip(self.state.sums, losses, strict=True)]

    def _write_metrics(self) -> dict[str, Any]:
        """Append a row: the means over this epoch so far and, at its end, the accuracy on the validation split."""
        state = self.state
        epoch = (state.step - 1) // self.steps_per_epoch
        ends_epoch = self._ends_epoch()
        done = self.order.samples_before(state.step) - epoch * len(self.training)
        row: dict[str, Any] = {
            "kind": "epoch" if ends_epoch else "interval",
            "step": state.step,
            "epoch": epoch + 1,
            **{name: total / done for name, total in zip(LOSSES, state.sums, strict=True)},
            "lr": self.learning_rate(state.step - 1),
            "weight": float(self.objective.weight(state.step - 1)),
            **self._measurements(),
            "seconds": state.seconds,
        }
        if ends_epoch:
            accuracy, loss = self._validate()
            if not math.isfinite(loss):
                raise self._non_finite(state.step - 1, f"the loss on the validation split is {loss}")
            row |= {"validation_accuracy": accuracy, "validation_cross_entropy": loss}
            state.sums = [0.0] * len(LOSSES)
        runs.append_metrics(self.run_dir, row)
        return row

    def _measurements(self) -> dict[str, Any]:
        """Rates since the last row, and the most memory so far. Waits for nothing: the losses were just collected."""
        (step, seconds), self.last_row = self.last_row, (self.state.step, self.state.seconds)
        waited, self.waited = self.waited, 0.0
        images = self.order.samples_before(self.state.step) - self.order.samples_before(step)
        elapsed = self.state.seconds - seconds
        return {
            "images_per_second": images / elapsed,
            "data_wait": waited / elapsed,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }

    def _save_checkpoint(self) -> None:
        if not self.state.is_finite():
            raise self._non_finite(self.state.step - 1, "a weight is not finite")
        self.state.save(self.run_dir / runs.CHECKPOINT)

    def _non_finite(self, step: int, what: str) -> NonFiniteError:
        """The error for what went wrong in a step counted from 0; its samples, and those before, go to a file."""
        batches = {"step": step + 1, "what": what, "indices": self.order.batch(step).indices.tolist()}
        batches["previous_indices"] = self.order.batch(step - 1).indices.tolist() if step else []
        path = self.run_dir / runs.NON_FINITE
        checkpoints.write_atomically(path, json.dumps(batches).encode())
        checkpoint = self.run_dir / runs.CHECKPOINT
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there was no checkpoint yet"
        return NonFiniteError(
            f"step {step + 1} of epoch {step // self.steps_per_epoch + 1}: {what}. The indices of its samples are in "
            f"{path}; {kept}. A new run with a smaller lr or weight may go further"
        )

    def _finish(self) -> TrainingResult:
        self.state.model.eval()
        checkpoints.save(self.run_dir / runs.MODEL, self.state.model.state_dict(), {"step": self.state.step})
        metrics = runs.read_metrics(self.run_dir)
        if metrics and metrics[-1]["step"] == self.state.step:  # the last epoch's, which has it
            accuracy = metrics[-1]["validation_accuracy"]
        else:  # someone removed the rows of a finished run that was resumed
            accuracy, _ = self._validate()
        return TrainingResult(
            model=self.state.model,
            config=self.config,
            run_dir=self.run_dir,
            metrics=metrics,
            validation_accuracy=accuracy,
            seconds=self.state.seconds,
        )
