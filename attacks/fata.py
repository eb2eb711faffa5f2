"""FATA, the feature-aware token attack: make the compressor drop tokens whose content is intact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from attacks.base import Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.encoder import EncoderAttack
from attacks.encoder_losses import attention_on, best_tokens, published_count
from attacks.objectives import remaining_content
from attacks.seeds import SeedBank
from targets.base import Batch, EncoderView

_PUBLISHED = 64
"""Tokens of M, of 576."""


@dataclass(frozen=True, kw_only=True)
class FATA(EncoderAttack):
    """Take the attention away from the most important tokens, and leave their features as they are.

    Paper: "Feature-Aware Token Attack". With M the tokens of highest clean attention of CLS in the
    last layer of the vision tower (head mean), fixed from the clean image, s their attention under
    attack, h their features in the same layer, ^c clean::

        minimise  L_attn + lambda · L_sem
        L_attn = Σ_M s            L_sem = 1 − mean_M cos(h, h^c)

    What is aimed at are images that are read right with all tokens and wrong after compression.

    Args:
        steps: gradient steps T, ≥ 0; 0 is the random start alone.
        alpha: step size in [0, 1] pixel units; None is epsilon / 4.
        restarts: starts, best loss kept per sample, ≥ 1.
        semantic_weight: lambda, ≥ 0; with 0 this is `attention_only`.
        top: number of tokens in M, ≥ 1; None is 64 of 576, the same share of any other number.
        random_start: begin at a random point of the ball.

    Raises:
        AttackError: see `attacks.descent.descend`.

    *Differs from the paper in …*: every iterate is judged as the 8-bit image that will be saved,
    and the best is kept instead of the last. The paper feeds the language model a row in which the
    kept tokens are copied back to all places; here compressors work as they are deployed. Its
    adaptations to Qwen and InternVL have losses of their own, which are not implemented: on towers
    without CLS the same loss is taken on the attention that tokens receive.
    """

    name: ClassVar[str] = "fata"

    semantic_weight: Annotated[float, Ge(0)] = 1.0
    top: Annotated[int, Ge(1)] | None = None
    random_start: bool = True

    def propose(self, view: EncoderView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Fix M on the clean images, then descend."""
        how = Descent(random_start=self.random_start)
        return suppress(view, batch, budget, rng, how, self.top, self.semantic_weight)


def suppress(
    view: EncoderView,
    batch: Batch,
    budget: Budget,
    rng: SeedBank,
    how: Descent,
    top: int | None,
    semantic_weight: float,
) -> Proposal:
    """FATA, and with ``semantic_weight = 0`` its baseline without feature preservation.

    Args:
        view: the tower.
        batch: clean images.
        budget: see `attacks.descent.descend`.
        rng: see there.
        how: see there.
        top: tokens in M; None is the published share.
        semantic_weight: lambda.
    """
    with torch.no_grad():
        (clean,) = view.layers(batch.images, (-1,))
    tokens = clean.score.shape[1]
    group = best_tokens(clean.score, published_count(_PUBLISHED, tokens) if top is None else top)

    def loss(images: Tensor, step: int) -> Tensor:
        del step
        (seen,) = view.layers(images, (-1,))
        attention = attention_on(seen.score, group)
        if semantic_weight == 0:
            return attention
        lost = 1 - remaining_content(seen.hidden, clean.hidden, group)
        return attention + semantic_weight * lost

    return descend(loss, batch, budget, rng, how=how)
