"""Training with penalties on input gradients, exactly and fast."""

from . import backends, evaluation, nn
from .backends import use_backend
from .double_backward import fast_double_backward
from .ops.cross_entropy import cross_entropy_with_logsumexp
from .ops.gradient_norm import gradient_norm
from .ops.logsumexp import logsumexp
from .penalties import schedules
from .penalties.adaptive import AccuracyBudget, PenaltyRatio
from .penalties.adversarial import AdversarialLoss
from .penalties.attribution import AttributionPenalty, RobustAttributionLoss
from .penalties.density import DensityPenalty, density_penalty, density_penalty_from_logits, log_density
from .penalties.group_dro import GroupDRO
from .penalties.input_gradient import InputGradientPenalty
from .penalties.integrated_gradients import integrated_gradients
from .penalties.jacobian import JacobianPenalty
from .penalties.loss import LossTerms, PenalizedLoss
from .penalties.losses import BinaryCrossEntropy
from .penalties.matching import GradientMatchingPenalty
from .penalties.shared import Penalty, SharedForward

__all__ = [
    "AccuracyBudget",
    "AdversarialLoss",
    "AttributionPenalty",
    "BinaryCrossEntropy",
    "DensityPenalty",
    "GradientMatchingPenalty",
    "GroupDRO",
    "InputGradientPenalty",
    "JacobianPenalty",
    "LossTerms",
    "PenalizedLoss",
    "Penalty",
    "PenaltyRatio",
    "RobustAttributionLoss",
    "SharedForward",
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
