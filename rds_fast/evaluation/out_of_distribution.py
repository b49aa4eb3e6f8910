"""Out-of-distribution detection: does the model's density tell its own data from others?

Three scores that ought to be higher in distribution (Grathwohl et al. 2020), l the log-sum-exp of the
logits f and s their softmax:

    log_density     log p(x) = l(x), up to a constant
    gradient_norm   −‖∇ₓ log p(x)‖₂ = −‖Σᵢ sᵢ ∇ₓ fᵢ(x)‖₂
    max_softmax     maxᵢ sᵢ(x)

Samples in distribution are the positives of every figure.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.gradient_norm import gradient_norm
from ..ops.logsumexp import logsumexp
from ..penalties.checks import refuse_normalised
from ..penalties.shared import differentiable_input, input_gradients, logits_of
from ..training import data
from .detection import auroc, fpr_at_tpr
from .other_data import load_like, parse_source
from .results import Curve, Results
from .samples import batches_of
from .settings import EvaluationSettings

SCORES = {"log_density": "log p(x)", "gradient_norm": "−‖∇ log p(x)‖", "max_softmax": "max softmax"}
HISTOGRAM_BINS = 30


def in_distribution_scores(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Each of ``SCORES`` of each sample, (N,), without a graph; higher means more like the training data.

    Args:
        model: maps x to logits (N, C), in the mode it is to be measured in; it is left as it was.
        x: (N, ...), floating.

    Raises:
        TypeError, ValueError: x or the logits are not as above, or the model ends in log-softmax, whose log-sum-exp
            is 0 for every x.
        RuntimeError: the logits do not depend differentiably on x.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = differentiable_input(x.detach().clone())  # a clone, because inference tensors allow no autograd
        logits = logits_of(model, x, derivatives=1)
        refuse_normalised(logits)
        log_density = logsumexp(logits, 1)
        (gradient,) = input_gradients(log_density, (x,)).undone()
    # In float64: in float32 all confidences above 1 − 6e-8 would be tied.
    confidence = logits.detach().double().softmax(1).amax(1)
    return {
        "log_density": log_density.detach(),
        "gradient_norm": -gradient_norm(gradient),
        "max_softmax": confidence,
    }


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``ood_<data>_<score>_auroc`` and ``_fpr95`` for each data set of ``settings.ood_data`` and each score.

    ``_fpr95`` is the share of the other data that is taken for in distribution where 95% of the split is. Beside
    them, for each, the histograms of the score on both data as curves, ``..._in`` and ``..._out``. The other data are
    what ``other_data.load_like`` makes of them: as many samples, resized to the split's shape.
    """
    results = Results()
    inside = _scores(model, split, settings)
    for source in settings.ood_data:
        outside = _scores(model, load_like(source, split, settings.batch_size, settings.seed), settings)
        for score, label in SCORES.items():
            name = f"ood_{parse_source(source)[0]}_{score}"
            results.scalars[f"{name}_auroc"] = auroc(inside[score], outside[score])
            results.scalars[f"{name}_fpr95"] = fpr_at_tpr(inside[score], outside[score])
            for which, curve in _histograms(inside[score], outside[score], label).items():
                results.curves[f"{name}_{which}"] = curve
    return results


def _scores(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> dict[str, Tensor]:
    batches = [
        in_distribution_scores(model, data.in_unit_interval(batch.images))
        for batch in batches_of(split, settings.batch_size)
    ]
    return {name: torch.cat([batch[name] for batch in batches]) for name in SCORES}


def _histograms(inside: Tensor, outside: Tensor, label: str) -> dict[str, Curve]:
    """The share of the samples of each kind in each bin of a score, over the range of both."""
    both = torch.cat((inside, outside)).double().cpu()
    edges = torch.linspace(float(both.min()), float(both.max()), HISTOGRAM_BINS + 1, dtype=torch.float64)
    centres = tuple(((edges[1:] + edges[:-1]) / 2).tolist())

    def curve(scores: Tensor) -> Curve:
        bin_of = torch.bucketize(scores.double().cpu(), edges[1:-1])
        shares = torch.bincount(bin_of, minlength=HISTOGRAM_BINS).double() / len(scores)
        return Curve(label, "share of the samples", centres, tuple(shares.tolist()))

    return {"in": curve(inside), "out": curve(outside)}
