"""CAGE, the compression-aligned attack: distort the tokens that will survive, whatever K is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from attacks.base import Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.encoder import EncoderAttack, KeptRange, kept_range, ordered_range
from attacks.encoder_losses import drift, drift_alignment, survival, weighted_mean
from attacks.seeds import SeedBank
from targets.base import Batch, EncoderView, TowerLayer

_PUBLISHED = (16, 192)
"""Budgets imagined, of 576 tokens."""


@dataclass(frozen=True, kw_only=True)
class CAGE(EncoderAttack):
    """Distort the features of tokens that survive compression, and move scores onto distorted ones.

    Paper: "On the Adversarial Robustness of Large Vision-Language Models under Visual Token
    Compression" (arXiv 2601.21531), compared with XinweiZhang1998/CAGE at eaedb3f. With s the
    scores of the tokens, r their ranks, d = 1 − cos of their features and the clean ones::

        π_i = clip((Kmax − r_i) / (Kmax − Kmin), 0, 1)             chance to survive, K unknown
        L_EFD = Σ π_i d_i / Σ π_i                                  expected feature distortion
        L_RDA = Σ_i softmax(Z(d))_i · log softmax(Z(s))_i          rank–distortion alignment
        maximise  efd_weight · L_EFD + rda_weight · L_RDA

    π and softmax(Z(d)) are detached; Z standardises over the tokens. The aim is wrong answers of
    the compressed model, and nothing keeps the uncompressed one right.

    Args:
        efd_weight: weight of L_EFD, ≥ 0.
        rda_weight: weight of L_RDA, ≥ 0; lambda of the paper's form.
        alignment: L_RDA as in the ``paper``, or ``rescaled`` to (L_RDA + log V) / log V ≤ 1, as
            the code has it.
        score: ``attention`` of CLS to the patches (received, without CLS), or feature ``norm``.
        layer: tower layer of scores and features, −1 the last.
        k_min: smallest budget imagined, in tokens, ≥ 1; None is 16 of 576, the same share of any
            other number. Above the number of tokens it is that number, which is noted.
        k_max: largest, ≥ `k_min`; None is 192 of 576.
        steps: gradient steps T, ≥ 0.
        alpha: step size in [0, 1] pixel units; None is epsilon / 4.
        restarts: starts, best loss kept per sample, ≥ 1; later ones are random.
        random_start: begin at a random point of the ball. Without it and with rda_weight 0 the
            gradient of the first step is rounding, because nothing has drifted yet.

    Raises:
        AttackError: k_min above k_max; see also `attacks.descent.descend`.

    *Differs from the paper in …*: its perturbation lives in the picture behind resize and crop, in
    units of CLIP's normalisation (epsilon / std per channel, which is epsilon in pixels), and is
    clamped to valid colours only when saved; ours lives in the pixels of the given picture, whose
    preprocessing is differentiated, and is clamped and judged as 8 bits at every step. The best
    iterate is kept instead of the last. The default weights are the paper's form with the 0.005
    of the authors' command line on L_RDA; their present README has it on L_EFD instead
    (``efd_weight: 0.005, rda_weight: 1, alignment: rescaled``).
    """

    name: ClassVar[str] = "cage"

    efd_weight: Annotated[float, Ge(0)] = 1.0
    rda_weight: Annotated[float, Ge(0)] = 0.005
    alignment: Literal["paper", "rescaled"] = "paper"
    score: Literal["attention", "norm"] = "attention"
    layer: int = -2
    k_min: Annotated[int, Ge(1)] | None = None
    k_max: Annotated[int, Ge(1)] | None = None
    random_start: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        ordered_range(self.name, self.k_min, self.k_max)

    def propose(self, view: EncoderView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Look at the clean images once, then climb."""
        with torch.no_grad():
            (clean,) = view.layers(batch.images, (self.layer,))
        budgets = kept_range(self.k_min, self.k_max, _PUBLISHED, clean.score.shape[1])

        def loss(images: Tensor, step: int) -> Tensor:
            del step
            (seen,) = view.layers(images, (self.layer,))
            return -self._gain(seen, clean.hidden, budgets)

        how = Descent(random_start=self.random_start)
        found = descend(loss, batch, budget, rng, how=how)
        return replace(found, notes=budgets.notes)

    def _gain(self, seen: TowerLayer, clean: Tensor, budgets: KeptRange) -> Tensor:
        moved = drift(seen.hidden, clean)
        score = seen.score if self.score == "attention" else seen.hidden.float().norm(dim=-1)
        alive = survival(score, budgets.low, budgets.high)
        aligned = drift_alignment(moved, score, rescaled=self.alignment == "rescaled")
        return self.efd_weight * weighted_mean(moved, alive) + self.rda_weight * aligned
