"""VCD: subtract what a noised picture would have made the model say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute
from defenses.decoding import DecodingDefense, contrasted
from targets.decoding import Step, View


@dataclass(frozen=True, kw_only=True)
class VCD(DecodingDefense):
    """Contrast the answer to a picture with the answer to the same picture under noise.

    Paper: Leng et al., "Mitigating Object Hallucinations in Large Vision-Language Models through
    Visual Contrastive Decoding" (CVPR 2024, arXiv 2311.16922), Eq. 2 to 4; code DAMO-NLP-SG/VCD:
    ``(1 + a) l(y | v, x) − a l(y | v', x)`` among the tokens with ``l ≥ log b + max l``. v' is the
    normalised picture after T of 1000 steps of forward diffusion (`diffused`).

    A hallucination method, tested on no adversarial image by its authors. It may amplify what an
    attacked picture says, since noise takes the attack away from the subtracted pass [inferred].

    Args:
        alpha: a ≥ 0, weight of the contrast; 0 is plain decoding, without the second pass.
        cutoff: b in [0, 1] of the plausibility cut.
        noise_step: T in [0, 999].
        beams: width of the search.
        length_penalty: see `DecodingDefense`.

    Each token costs a second forward, vision tower and compressor included at prefill. The noise is
    drawn once a sample from its own seed. Adaptive attack: through both passes, EOT over the noise.

    *Differs from the paper in …*: tokens are taken greedily (or by beams), not sampled, so that an
    answer can be repeated; the code draws its noise from the global generator.
    """

    name: ClassVar[str] = "vcd"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.EOT
    stochastic: ClassVar[bool] = True

    alpha: Annotated[float, Ge(0)] = 1.0
    cutoff: Annotated[float, Interval(ge=0, le=1)] = 0.1
    noise_step: Annotated[int, Interval(ge=0, le=999)] = 500

    @property
    def draws(self) -> bool:
        """Unless nothing is contrasted."""
        return self.alpha > 0

    def views(self) -> tuple[View, ...]:
        """The noised picture."""
        return (View(disturb=self._noised),) if self.alpha else ()

    def _noised(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        return diffused(pixels, seeds, self.noise_step)

    def logits(self, step: Step) -> Tensor:
        """Contrasted with the noised picture."""
        if not self.alpha:
            return step.logits
        return contrasted(step.logits, step.views[0], self.alpha, self.cutoff)


def diffused(pixels: Tensor, seeds: Sequence[int], step: int) -> Tensor:
    """``sqrt(ᾱ_T) v + sqrt(1 − ᾱ_T) ε``: forward diffusion of normalised pixels.

    Args:
        pixels: ``[B, …]``.
        seeds: B, one for the ε of each sample.
        step: T in [0, 999].
    """
    kept = _signal()[step]
    signal, rest = math.sqrt(kept), math.sqrt(1 - kept)
    noise = torch.stack(
        [
            torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    )
    return signal * pixels + rest * noise.to(pixels)


@lru_cache(maxsize=1)
def _signal() -> tuple[float, ...]:
    """ᾱ after each of 1000 steps, ``Π (1 − β)`` with β a sigmoid ramp from 1e-5 to 5e-3."""
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000, dtype=torch.float64)) * (5e-3 - 1e-5) + 1e-5
    return tuple((1 - betas).cumprod(0).tolist())
