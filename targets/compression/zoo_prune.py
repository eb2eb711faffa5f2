"""ZOO-Prune: keep diverse tokens to which the projector is sensitive, found without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from targets.compression.base import Compressor, Scores, Seen, Stage
from targets.compression.divprune import (
    cosine_distance,
    distance_when_chosen,
    marked,
)
from targets.compression.scoring import gather_rows, precise, standardised_log
from targets.errors import CompressionError
from targets.families.base import Family


@dataclass(frozen=True, kw_only=True)
class ZooPrune(Compressor):
    """Choose visual tokens by the projector's sensitivity times their distance to those chosen.

    Paper: "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in
    Vision-Language Models" (CVPR 2026, arXiv 2509.24837). With P the projector, x_i the features
    that enter it and u_1 … u_m Gaussian directions shared by all tokens, the sensitivity is
    ``S_i = mean_j |P(x_i + h u_j) − P(x_i − h u_j)| / 2h``, scaled to [0, 1] over the image. First
    comes the most sensitive token, then repeatedly the one with the largest
    ``S_i · min over chosen c of (1 − cos(z_i, z_c))``, z being the projected tokens.

    Args:
        estimate: ``difference`` is the published estimate; ``jvp`` its limit for h → 0,
            ``mean_j |J_i u_j|`` with J_i the projector's Jacobian, by forward-mode
            differentiation: exact, with clean gradients.
        directions: m, ≥ 1.
        step: h, > 0, in units of the features.
        seed: of the directions.
        retention: kept ÷ all visual tokens, in (0, 1]; official are 0.3334, 0.2223 and 0.1112.
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        positions: the official code makes position ids contiguous.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: written from a description, without the authors' code
    [secondary]. Directions are the same for all images. Where tokens are groups of patches, the
    group's features are moved. The projector of a model in half precision runs in float32 for the
    sensitivity. Tiles of a picture are one set of tokens [inferred], and projectors
    are not made low-rank for them. The score is ours, the paper has none: ``S_i`` times the
    distance at which a token was or would be chosen (for the first, that to the farthest token).
    The sensitivity is live in the features; the greedy order is not.
    """

    name: ClassVar[str] = "zoo_prune"

    estimate: Literal["difference", "jvp"] = "difference"
    directions: Annotated[int, Ge(1)] = 64
    step: Annotated[float, Gt(0)] = 0.01
    seed: int = 0
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """Before the projector."""
        return Stage.VISION

    def score(self, seen: Seen) -> Scores:
        """Sensitivity times the distance at which a token was or would be chosen, ``[I, V]``."""
        sensitivity = _scaled(self.sensitivity(seen), seen.valid)
        distance = cosine_distance(self._projected(seen))
        order = self._order(distance.detach(), sensitivity.detach(), seen)
        gap = distance_when_chosen(distance, order, seen.counts, seen.valid)
        score = sensitivity * gap
        return Scores(
            score,
            standardised_log(score, seen.valid),
            chosen=marked(order, seen.counts, seen.valid),
        )

    def sensitivity(self, seen: Seen) -> Tensor:
        """``S_i`` before scaling, ``[I, V]``; 0 where not valid.

        Raises:
            CompressionError: without a model.
        """
        if seen.family is None:
            raise CompressionError("zoo_prune needs the model's projector")
        project = _Projection(seen.family).exactly
        features = precise(seen.features).masked_fill(~seen.valid[..., None], 0)
        total = features.new_zeros(features.shape[:2])
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        for _ in range(self.directions):
            direction = torch.randn(features.shape[-1], generator=generator).to(features)
            if self.estimate == "jvp":
                tangent = direction.expand_as(features)
                change = torch.func.jvp(project, (features,), (tangent,))[1]
            else:
                moved = self.step * direction
                change = (project(features + moved) - project(features - moved)) / (2 * self.step)
            total = total + change.norm(dim=-1)
        return (total / self.directions).masked_fill(~seen.valid, 0)

    def _projected(self, seen: Seen) -> Tensor:
        projected = seen.projected
        if projected is None and seen.family is not None:
            projected = seen.family.project_tokens(seen.features)
        if projected is None:
            raise CompressionError("zoo_prune needs the projected tokens")
        return precise(projected).masked_fill(~seen.valid[..., None], 0)

    @torch.no_grad()
    def _order(self, distance: Tensor, sensitivity: Tensor, seen: Seen) -> Tensor:
        """Greedy order ``[I, K]``; the first `Seen.counts` of a row count."""
        free = seen.valid
        worth = sensitivity
        gap = torch.full_like(sensitivity, torch.inf)
        order = []
        for _ in range(max(1, int(seen.counts.amax()))):
            chosen = worth.masked_fill(~free, -torch.inf).argmax(1, keepdim=True)
            order.append(chosen)
            free = free.scatter(1, chosen, False)
            gap = torch.minimum(gap, gather_rows(distance, chosen).squeeze(1))
            worth = sensitivity * gap
        return torch.cat(order, 1)


class _Projection(torch.nn.Module):
    """A family's way from features to tokens as a module around its projector."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.projector = family.projector
        self._family = family

    def forward(self, features: Tensor) -> Tensor:
        """Token features ``[…, r · D]`` to the width of the language model."""
        return self._family.project_tokens(features)

    def exactly(self, features: Tensor) -> Tensor:
        """The same with weights in the dtype of the features, which need not be the model's.

        Small differences drown in the rounding of half precision.
        """
        state = dict(self.named_parameters())
        if all(value.dtype == features.dtype for value in state.values()):
            return self._family.project_tokens(features)
        wide = {name: value.to(features.dtype) for name, value in state.items()}
        made: Tensor = torch.func.functional_call(self, wide, (features,))
        return made


def _scaled(values: Tensor, valid: Tensor) -> Tensor:
    """To [0, 1] over the valid entries of each row; 1 where they are all equal."""
    low = values.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    span = values.masked_fill(~valid, -torch.inf).amax(1, keepdim=True) - low
    flat = ~(span > 0) | ~span.isfinite()
    scaled = (values - low.masked_fill(flat, 0)) / span.masked_fill(flat, 1)
    return torch.where(flat, torch.ones_like(scaled), scaled).masked_fill(~valid, 0)
