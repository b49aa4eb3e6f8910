"""What a run shows while it trains: a progress bar in a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from .extras import require


def describe(row: dict[str, Any]) -> str:
    """The losses, rates and memory of one row of metrics, in words."""
    text = f"loss {row['total']:.4f} (cross-entropy {row['cross_entropy']:.4f}, penalty {row['penalty']:.4f})"
    if "validation_accuracy" in row:
        text += f", validation accuracy {100 * row['validation_accuracy']:.1f}%"
    text += f", {row['images_per_second']:,.0f} images/s, data wait {100 * row['data_wait']:.0f}%"
    return text if row["peak_memory_bytes"] is None else f"{text}, peak memory {row['peak_memory_bytes'] / 1e9:.2f} GB"


def describe_shortly(row: dict[str, Any]) -> str:
    """The same, with the loss's parts for the loss, in as few characters as fit beside a bar in 80 columns."""
    text = f"ce {row['cross_entropy']:.3f} pen {row['penalty']:.3f}"
    if "validation_accuracy" in row:
        text += f" val {100 * row['validation_accuracy']:.1f}%"
    text += f" {row['images_per_second']:,.0f} img/s wait {100 * row['data_wait']:.0f}%"
    return text if row["peak_memory_bytes"] is None else f"{text} {row['peak_memory_bytes'] / 1e9:.1f}GB"


class Display:
    """Shows steps and rows of metrics while it is entered. ``quiet`` shows nothing.

    Raises:
        ImportError: standard output is a terminal, and rich is not installed.
    """

    def __init__(self, epochs: int, total_steps: int, quiet: bool) -> None:
        self._epochs, self._total_steps, self._quiet = epochs, total_steps, quiet
        self._bar: Any = None
        if not quiet and sys.stdout.isatty():
            progress = require("rich.progress", "a progress bar")
            self._bar = progress.Progress(
                progress.TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
                progress.BarColumn(bar_width=4),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[losses]}"),
            )

    def begin(self, step: int) -> None:
        """Training begins, or goes on, with ``step`` steps done."""
        if self._bar is not None:
            epoch = self._epochs * step // self._total_steps + 1
            self._task = self._bar.add_task("", total=self._total_steps, completed=step, epoch=epoch, losses="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """``step`` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, row: dict[str, Any]) -> None:
        """A row of metrics was written."""
        if self._bar is not None:
            self._bar.update(self._task, epoch=row["epoch"], losses=describe_shortly(row))
        elif not self._quiet and row["kind"] == "epoch":
            print(f"epoch {row['epoch']}/{self._epochs}: {describe(row)}", flush=True)
