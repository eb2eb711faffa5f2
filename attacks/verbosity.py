"""Losses on how an answer goes on, of verbose images, and the weights that balance them.

Each loss is a pure function of what `WhiteBoxView.generation` gives, one value per sample ``[B]``,
minimised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_DECAY = 0.9
_LEAST = 1e-6
"""Losses smaller than this do not raise a weight any further."""


def certainty(logprobs: Tensor, real: Tensor) -> Tensor:
    """KL(p ‖ uniform) of the next token in nats, mean over the answer: L_unc.

    Args:
        logprobs: ``[B, A, vocabulary]``, live.
        real: bool ``[B, A]``.
    """
    logprobs = logprobs.float()
    negentropy = (logprobs.exp() * logprobs).sum(-1)
    return _mean(negentropy + math.log(logprobs.shape[-1]), real)


def ending(end: Tensor, real: Tensor) -> Tensor:
    """Probability that the answer ends, mean over the answer: L_eos.

    Args:
        end: log-probability ``[B, A]`` of an end token, live.
        real: bool ``[B, A]``.
    """
    return _mean(end.float().exp(), real)


def sameness(hidden: Tensor, real: Tensor) -> Tensor:
    """Negative nuclear norm of the answer's hidden states, a row each: L_div.

    Args:
        hidden: ``[B, A, D]``, live.
        real: bool ``[B, A]``; other rows count as zero, which adds no singular value.
    """
    # Only the singular values are differentiated, so equal ones do no harm.
    values: Tensor = torch.linalg.svdvals(hidden.float() * real[..., None])
    return -values.sum(-1)


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of L_eos and L_div, ``[B]`` each, detached."""

    ending: Tensor
    sameness: Tensor


def balance(
    certain: Tensor, end: Tensor, same: Tensor, step: int, before: Weights | None
) -> Weights:
    """Weights for a step, from the losses ``[B]`` at it and the weights of the step before.

    ``λ₁ = |L_unc / L_eos| / |10 ln(t + 1) − 20|``, ``λ₂ = |L_unc / L_div| / |0.5 ln(t + 1) + 1|``,
    then ``0.9 · before + 0.1 · λ``; the first step's are taken as they are.

    Args:
        certain: L_unc.
        end: L_eos.
        same: L_div.
        step: t, from 0.
        before: weights of the step before; None at the first.
    """
    fade = abs(10 * math.log(step + 1) - 20), abs(0.5 * math.log(step + 1) + 1)
    certain = certain.detach().abs()
    parts = (end.detach().abs().clamp_min(_LEAST), same.detach().abs().clamp_min(_LEAST))
    now = [certain / part / by for part, by in zip(parts, fade, strict=True)]
    if before is None:
        return Weights(*now)
    old = (before.ending, before.sameness)
    return Weights(*(_DECAY * a + (1 - _DECAY) * b for a, b in zip(old, now, strict=True)))


def _mean(values: Tensor, real: Tensor) -> Tensor:
    """Mean of ``[B, A]`` over real entries; 0 where there is none."""
    return torch.where(real, values, torch.zeros_like(values)).sum(1) / real.sum(1).clamp_min(1)
