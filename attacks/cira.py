"""CIRA, the compression-induced risk attack: the evidence stays in the image and is not looked at.

Ranks are turned upside down in several layers at once, so that no selector keeps what mattered;
the features of tokens that lose their place are preserved, so that the uncompressed model reads on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import pad

from attacks.base import Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.encoder import EncoderAttack, kept_range, ordered_range, present_layers
from attacks.encoder_losses import displacement, drift, inverted_ranking, ranks, weighted_mean
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from targets.base import Batch, EncoderView

_PUBLISHED = (32, 192)
"""Budgets imagined, of 576 tokens."""


@dataclass(frozen=True, kw_only=True)
class CIRA(EncoderAttack):
    """Turn the ranking of the tokens upside down, but preserve the features of those it displaces.

    Paper: "Still There, No Longer Seen" (CIRA). With s the attention of CLS to the tokens, mean
    over `layers`, r ranks from 1, h features of the last layer behind the tower's final
    normalisation, ^c clean and ^a attacked, Z standardised over the N tokens::

        maximise  L_GSH + lambda · L_HEP
        L_GSH = 1/N · ⟨Z(s^a), Z((r^c − 1) / (N − 1))⟩             Pearson, 1 when inverted
        w_i   = [min(Kmax, r_i^a − 1) − max(Kmin, r_i^c) + 1]_+ / (Kmax − Kmin + 1)
        L_HEP = −Σ w_i (1 − cos(h_i^a, h_i^c)) / 2 / Σ w_i

    w is the chance over budgets in [Kmin, Kmax] that token i is kept clean and lost under attack;
    it is detached and renewed at every step. The loss traced is minimised, L with the sign turned.

    Args:
        steps: gradient steps T, ≥ 0.
        alpha: step size in [0, 1] pixel units; None is epsilon / 4.
        restarts: starts, best loss kept per sample, ≥ 1; later ones are random.
        gsh_weight: weight of L_GSH, ≥ 0; 0 is the ablation without it, which needs `random_start`:
            on the clean image no token has lost its place, and the gradient is zero.
        hep_weight: lambda, ≥ 0; 0 is the ablation without L_HEP.
        hep_over: tokens whose features L_HEP preserves: the ``displaced`` by w, or ``all`` alike
            (the ablation with uniform preservation).
        layers: tower layers whose attention is averaged, −1 the last; those that a shallow tower
            does not have are left out, which is noted.
        k_min: smallest budget imagined, in tokens, ≥ 1; None is 32 of 576, the same share of any
            other number. Above the number of tokens it is that number, which is noted.
        k_max: largest, ≥ `k_min`; None is 192 of 576.
        views: ``one``, or ``translations``: the mean of the loss over the four shifted pictures
            that the defence by translation consensus looks at, the adaptive form against it. Each
            is compared with the clean picture shifted alike. Costs four times as much.
        shift: pixels of a translation, ≥ 1; None is half a token.
        random_start: begin at a random point of the ball.

    Raises:
        AttackError: k_min above k_max, a tower with none of `layers`, a shift as large as the
            picture; see also `attacks.descent.descend`.

    *Differs from the paper in …*: attention is averaged over heads, not summed, which Z undoes;
    every iterate is judged as the 8-bit image that will be saved, and the best is kept instead of
    the last. Shifts act on the given picture, not behind its preprocessing, which is the same where
    the picture has the tower's size; what adaptive CIRA compares a shifted picture with is our
    choice. Towers without CLS are attacked by the mean attention a token receives.
    """

    name: ClassVar[str] = "cira"
    takes_penalty: ClassVar[bool] = True

    gsh_weight: Annotated[float, Ge(0)] = 1.0
    hep_weight: Annotated[float, Ge(0)] = 0.8
    hep_over: Literal["displaced", "all"] = "displaced"
    layers: tuple[int, ...] = (-1, -3, -5)
    k_min: Annotated[int, Ge(1)] | None = None
    k_max: Annotated[int, Ge(1)] | None = None
    views: Literal["one", "translations"] = "one"
    shift: Annotated[int, Ge(1)] | None = None
    random_start: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        ordered_range(self.name, self.k_min, self.k_max)

    @property
    def gradients_per_step(self) -> int:
        """One for each shifted picture."""
        return 4 if self.views == "translations" else 1

    def against(self, defense: str, options: Mapping[str, object]) -> CIRA | None:
        """The published adaptive form against translation consensus with its public views."""
        shift = options.get("shift")
        if defense != "translation_consensus" or options.get("views") != "public" or shift == 0:
            return None
        return replace(self, views="translations", shift=shift if type(shift) is int else None)

    def propose(self, view: EncoderView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Rank the clean images once, then climb."""
        objective = _Objective(self, view, batch)
        how = Descent(random_start=self.random_start)
        found = descend(objective, batch, budget, rng, how=how)
        return replace(found, notes=objective.notes)


class _Objective:
    """−L of images, one per sample."""

    def __init__(self, attack: CIRA, view: EncoderView, batch: Batch) -> None:
        self.attack, self.view = attack, view
        self.layers, notes = present_layers(view, attack.layers)
        with torch.no_grad():
            self.shift = self._shift(batch.images) if attack.views == "translations" else 0
            score, self.features = self._look(batch.images)
        self.ranks = ranks(score)
        self.budgets = kept_range(attack.k_min, attack.k_max, _PUBLISHED, score.shape[1])
        self.notes = notes + self.budgets.notes

    def __call__(self, images: Tensor, step: int) -> Tensor:
        del step
        attack = self.attack
        score, features = self._look(images)
        loss = -attack.gsh_weight * inverted_ranking(score, self.ranks)
        if attack.hep_weight > 0:
            moved = drift(features, self.features) / 2
            loss = loss + attack.hep_weight * weighted_mean(moved, self._weights(score))
        return loss.view(-1, len(images)).mean(0)

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[G, V]`` and final features ``[G, V, D]`` of the G = B or 4·B views."""
        seen = images if self.shift == 0 else translations(images, self.shift)
        last, *others = self.view.layers(seen, (-1, *self.layers), normalised=True)
        return torch.stack([one.score for one in others]).float().mean(0), last.hidden

    def _weights(self, score: Tensor) -> Tensor:
        if self.attack.hep_over == "all":
            return torch.ones_like(score)
        return displacement(self.ranks, ranks(score), self.budgets.low, self.budgets.high)

    def _shift(self, images: Tensor) -> int:
        size = (images.shape[-2], images.shape[-1])
        shift = self.attack.shift
        if shift is None:
            shift = half_token(self.view, images)
        if shift >= min(size):
            raise AttackError(
                f"attack cira: shift is {shift} pixels in pictures of {size[0]} × {size[1]}; it "
                f"must be below {min(size)}"
            )
        return shift


def half_token(view: EncoderView, images: Tensor) -> int:
    """Half the side of a square as large as the pixels one token stands for; at least 1."""
    size = (images.shape[-2], images.shape[-1])
    tokens = view.layers(images[:1], (0,))[0].score.shape[1]
    everywhere = torch.ones(1, tokens, dtype=torch.bool, device=images.device)
    covered = float(view.token_mask_to_pixels(everywhere, size).sum())
    return max(1, round(math.sqrt(covered / tokens) / 2))


def translations(images: Tensor, shift: int) -> Tensor:
    """The four public views of translation consensus, ``[4·B, 3, H, W]``, unshifted ones first.

    T(0, 0), T(d, 0), T(0, d) and T(d, d): the picture moved right and down by d pixels; what
    enters is its own reflection.

    Args:
        images: ``[B, 3, H, W]``.
        shift: d, below H and W.
    """
    height, width = images.shape[-2:]
    moves = ((0, 0), (shift, 0), (0, shift), (shift, shift))
    wide = [pad(images, (right, 0, down, 0), mode="reflect") for right, down in moves]
    return torch.cat([one[..., :height, :width] for one in wide])
