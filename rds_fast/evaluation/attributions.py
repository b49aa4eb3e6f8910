"""Attributions by name: what in an input a classifier's logit of a class comes from."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..attacks.pgd import check_floating
from ..penalties.integrated_gradients import integrated_gradients
from ..training.extras import require
from ..training.names import check_name
from .leakage import input_gradient


def attributions(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    method: str = "input_gradient",
    *,
    path_steps: int = 100,
    noise: float = 0.15,
    noise_samples: int = 25,
    seed: int = 0,
) -> Tensor:
    """The attribution of f_y, the logit of class y, to the values of each input.

    ====================  =============================================================  ==========================
    input_gradient        ∇ₓ f_y                                                         ours
    integrated_gradients  x ⊙ (1/m) Σₖ ∇f_y(k x / m), k = 1..m, from a black image       ours
                          (Sundararajan, Taly and Yan 2017)
    saliency              |∇ₓ f_y| (Simonyan, Vedaldi and Zisserman 2014)                captum
    input_x_gradient      x ⊙ ∇ₓ f_y (Shrikumar et al. 2016)                             captum
    smoothgrad            the mean of ∇f_y(x + n) over Gaussian n (Smilkov et al. 2017)  captum
    deeplift              DeepLIFT, rescale rule, against a black image (Shrikumar,      captum
                          Greenside and Kundaje 2017)
    ====================  =============================================================  ==========================

    Args:
        model: maps (N, ...) to logits (N, C), in the mode it is in; an ``nn.Module`` for captum's.
        x: samples (N, ...), floating.
        y: class indices (N,).
        method: one of ``METHODS``.
        path_steps: m, of integrated_gradients (``rds_fast.integrated_gradients``).
        noise, noise_samples, seed: of smoothgrad: standard deviation in the units of x, how many n, and what decides
            them; PyTorch's own generator is left as it was.

    Returns:
        (N, ...), without a graph. Signed, except for saliency.

    Raises:
        ValueError: the method is unknown, with the nearest name, or path_steps is less than 1.
        ImportError: captum is needed and not installed; the message says how to install it.
    """
    check_name("the attribution", method, METHODS)
    check_floating(x)
    if method == "input_gradient":
        return input_gradient(model, x, y)
    if method == "integrated_gradients":
        return integrated_gradients(model, x, y, 0.0, steps=path_steps, of="target_logit")
    x = x.detach().clone().requires_grad_()
    if method == "smoothgrad":
        return _smoothgrad(model, x, y, noise, noise_samples, seed)
    return _CAPTUM[method](model, x, y).detach()


def pixel_scores(attribution: Tensor) -> Tensor:
    """(N, P): how much of an attribution falls on each pixel, |values| summed over the channels of (N, C, ...).

    Of an attribution (N, D) each value is a pixel.
    """
    sizes = attribution.abs()
    return (sizes.sum(1) if sizes.dim() > 2 else sizes).flatten(1)


def _captum(name: str, **options: object) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    def attribute(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        method = getattr(require("captum.attr", "attributions other than gradients and their integral"), name)(model)
        with warnings.catch_warnings():
            # DeepLift says that it sets hooks, which it takes away again.
            warnings.filterwarnings("ignore", message="Setting forward, backward hooks")
            attribution: Tensor = method.attribute(x, target=y, **options)
        return attribution

    return attribute


def _smoothgrad(model: nn.Module, x: Tensor, y: Tensor, noise: float, samples: int, seed: int) -> Tensor:
    captum = require("captum.attr", "smoothgrad")
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):  # captum draws from PyTorch's own generator
        torch.manual_seed(seed)
        tunnel = captum.NoiseTunnel(captum.Saliency(model))
        attribution: Tensor = tunnel.attribute(
            x, nt_type="smoothgrad", nt_samples=samples, stdevs=noise, target=y, abs=False
        )
    return attribution.detach()


_CAPTUM = {
    "saliency": _captum("Saliency"),
    "input_x_gradient": _captum("InputXGradient"),
    "deeplift": _captum("DeepLift"),
}
METHODS = ("input_gradient", "integrated_gradients", *_CAPTUM, "smoothgrad")
