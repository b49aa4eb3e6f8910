"""Training with penalties on input gradients, exactly and fast."""

from . import backends, evaluation, nn
from .backends import use_backend
from .double_backward import fast_double_backward
from .ops.cross_entropy import cross_entropy_with_logsumexp
from .ops.gradient_norm import gradient_norm
from .ops.logsumexp import logsumexp
from .penalties import schedules
from .penalties.adversarial import AdversarialLoss
from .penalties.attribution import AttributionPenalty, RobustAttributionLoss
from .penalties.density import DensityPenalty, density_penalty, density_penalty_from_logits, log_density
from .penalties.input_gradient import InputGradientPenalty
from .penalties.integrated_gradients import integrated_gradients
from .penalties.loss import LossTerms, PenalizedLoss

__all__ = [
    "AdversarialLoss",
    "AttributionPenalty",
    "DensityPenalty",
    "InputGradientPenalty",
    "LossTerms",
    "PenalizedLoss",
    "RobustAttributionLoss",
    "backends",
    "cross_entropy_with_logsumexp",
    "density_penalty",
    "density_penalty_from_logits",
    "evaluation",
    "fast_double_backward",
    "gradient_norm",
    "integrated_gradients",
    "log_density",
    "logsumexp",
    "nn",
    "schedules",
    "use_backend",
]
