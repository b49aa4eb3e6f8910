"""Training classifiers: data, models, objectives, and a loop that can be killed and resumed."""

from .config import TrainingConfig
from .data import Images, Splits
from .loop import NonFiniteError, TrainingInterrupted, TrainingResult, train
from .runs import load_model, read_metrics

__all__ = [
    "Images",
    "NonFiniteError",
    "Splits",
    "TrainingConfig",
    "TrainingInterrupted",
    "TrainingResult",
    "load_model",
    "read_metrics",
    "train",
]
