"""evaluation.json: what was measured of a run, and everything that decided it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ..training import runs
from ..training.checkpoints import write_atomically
from ..training.config import TrainingConfig
from ..training.data.lists import read_text
from .results import Evaluation
from .settings import EvaluationSettings


@dataclasses.dataclass(frozen=True)
class Record:
    """The evaluation of one run.

    Attributes:
        split: ``"test"`` or ``"validation"``.
        fingerprint: of the samples that were measured.
        training: the settings of the run, with the place where its data lay in the evaluation.
        device: the name of what computed.
        identity: digests of the run's training data and teacher; empty where the run kept none.
    """

    evaluation: Evaluation
    settings: EvaluationSettings
    split: str
    fingerprint: str
    training: TrainingConfig
    device: str
    versions: dict[str, str | None]
    identity: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What evaluation.json holds."""
        return {
            **self.evaluation.to_json(),
            "split": self.split,
            "fingerprint": self.fingerprint,
            "settings": self.settings.to_settings(),
            "training": json.loads(self.training.to_json()),
            "device": self.device,
            "versions": self.versions,
            "identity": self.identity,
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> Record:
        """What ``to_json`` gave.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is something else, or of another version.
        """
        return Record(
            Evaluation.from_json(content),
            EvaluationSettings.from_settings(content["settings"]),
            content["split"],
            content["fingerprint"],
            TrainingConfig.from_settings(content["training"]),
            content["device"],
            dict(content["versions"]),
            dict(content.get("identity", {})),
        )


def write(run_dir: str | Path, record: Record) -> None:
    """Write a run's evaluation.json, at once or not at all."""
    content = json.dumps(record.to_json(), indent=2, allow_nan=False) + "\n"
    write_atomically(Path(run_dir) / runs.EVALUATION, content.encode())


def read(run_dir: str | Path) -> Record:
    """The evaluation of a run.

    Raises:
        FileNotFoundError: the folder holds no run, or the run was not evaluated.
        ValueError: its evaluation.json is damaged or of another version.
    """
    path = Path(run_dir) / runs.EVALUATION
    if not path.is_file():
        runs.read_config(Path(run_dir))  # which says so where there is no run at all
        raise FileNotFoundError(f"the run in {run_dir} was not evaluated; 'rds-fast evaluate {run_dir}' does that")
    try:
        return Record.from_json(json.loads(read_text(path)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or of another version ({error!r}); 'rds-fast evaluate {run_dir}' writes it again"
        ) from error


def name_of(device: torch.device) -> str:
    """What a device is called in a record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
