"""VisionZip: keep what CLS looks at, merge the rest into a few contextual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Compressor, Merged, Scores, Seen, Selection, Stage
from targets.compression.scoring import gather_rows, log_probability
from targets.errors import CompressionError
from targets.families.vision import VisionPass

_CONTEXTUAL_SHARE = 6.4
"""Tokens per contextual token: 5.4 dominant ones for each, as in (54, 10) and (162, 30)."""


@dataclass(frozen=True, kw_only=True)
class VisionZip(Compressor):
    """Keep CLS and the patches it attends to most; sum up the others in contextual tokens.

    Paper: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models"
    (CVPR 2025, arXiv 2412.04467). At the layer that makes the features: the score is the attention
    of CLS, summed over heads. Of T tokens, C are contextual and D = T − C dominant, CLS being one
    of the D, so that D − 1 patches are kept. Of the remaining patches every ``step``-th becomes a
    target (step = remaining // C, the first C); each other one joins the target whose head-mean key
    has the largest cosine with its own; a contextual token is ``target + mean(joined)``. The
    projector receives [CLS, dominant in spatial order, contextual].

    Args:
        retention: T ÷ all visual tokens, in (0, 1]; T = round(retention · V) counts CLS and
            contextual tokens. 1 means no compression at all.
        keep_tokens: T, ≥ 1, instead of retention.
        contextual_tokens: C; None is round(T / 6.4), the official split 5.4 : 1.
        positions: the official code makes position ids contiguous; with ``keep`` a token has the
            position of its patch, CLS that of the first patch.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: a tower without CLS is scored by the mean attention received,
    and all D dominant tokens are patches. Given the whole budget (T = V) nothing is merged.
    """

    name: ClassVar[str] = "visionzip"

    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    contextual_tokens: Annotated[int, Ge(0)] | None = None
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """Before the projector."""
        return Stage.VISION

    @property
    def attends(self) -> bool:
        """Its score is an attention."""
        return True

    @property
    def merges(self) -> bool:
        """It makes contextual tokens."""
        return True

    def split(self, total: int, has_cls: bool) -> tuple[int, int]:
        """Patches kept as they are, and contextual tokens, for T = `total`.

        Raises:
            CompressionError: if nothing is left for a patch.
        """
        wanted = self.contextual_tokens
        contextual = round(total / _CONTEXTUAL_SHARE) if wanted is None else wanted
        patches = total - contextual - int(has_cls)
        if patches < 1:
            raise CompressionError(
                f"compressor visionzip: {total} tokens less {contextual} contextual"
                f"{' and CLS' if has_cls else ''} leave no patch; keep more tokens or lower "
                "contextual_tokens"
            )
        return patches, contextual

    def score(self, seen: Seen) -> Scores:
        """Attention of CLS summed over heads, in [0, N], ``[I, V]``."""
        if seen.attention is None:
            raise CompressionError("visionzip needs the attention of the vision tower")
        score = seen.attention.sum(1)
        return Scores(score, log_probability(score), attends=True)

    def select(self, scores: Scores, seen: Seen) -> Selection:
        """The dominant patches, and where each other one goes."""
        patches, _ = self.split(seen.count, _pass(seen).has_cls)
        order = scores.score.detach().argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(scores.score, dtype=torch.bool).scatter(1, order[:, :patches], True)
        return self.complete(kept, seen)

    @torch.no_grad()
    def complete(self, kept: Tensor, seen: Seen) -> Selection:
        """Targets and assignment for a dominant set; both follow from the keys."""
        vision = _pass(seen)
        _, contextual = self.split(seen.count, vision.has_cls)
        left = int((~kept).sum(1).amin())
        if left < contextual:
            raise CompressionError(
                f"visionzip: a forced set leaves {left} patches, too few for {contextual} "
                "contextual tokens; force a smaller set"
            )
        targets = _targets(kept, contextual)
        if contextual == 0:
            return Selection(kept, targets, torch.full_like(kept, -1, dtype=torch.long))
        metric = torch.nn.functional.normalize(vision.patch_keys.float().mean(1), dim=-1)
        similarity = metric @ gather_rows(metric, targets).transpose(1, 2)  # [I, V, C]
        assignment = similarity.argmax(-1)
        is_target = torch.zeros_like(kept).scatter(1, targets, True)
        return Selection(kept, targets, assignment.masked_fill(kept | is_target, -1))

    def merge(self, selection: Selection, seen: Seen) -> Merged:
        """[CLS, dominant, contextual] before the projector, ``[I, S, D]``."""
        vision, kept = _pass(seen), selection.kept
        targets, assignment = selection.targets, selection.assignment
        if targets is None or assignment is None:
            raise CompressionError("visionzip: the forced selection has no merge targets")
        images, tokens = kept.shape
        widest = int(kept.sum(1).amax())
        # Kept indices in spatial order first, then the rest: rows may keep different numbers.
        order = (~kept).long().argsort(dim=1, stable=True)[:, :widest]
        is_kept = kept.gather(1, order)
        # Valid slots come first in each row, so contextual tokens precede the padding.
        source, valid = torch.cat([order, targets], 1), torch.ones_like(targets, dtype=torch.bool)
        valid = torch.cat([is_kept, valid], 1)
        joined = _contextual(vision.patches, targets, assignment)
        features = torch.cat([gather_rows(vision.patches, order), joined], 1)
        dominant = torch.cat([is_kept, torch.zeros_like(targets, dtype=torch.bool)], 1)
        if vision.has_cls:
            features = torch.cat([vision.hidden[:, :1], features], 1)
            source = torch.nn.functional.pad(source, (1, 0), value=0)
            valid = torch.nn.functional.pad(valid, (1, 0), value=True)
            dominant = torch.nn.functional.pad(dominant, (1, 0), value=False)
        if features.shape[1] > tokens:
            raise CompressionError(
                f"visionzip: {features.shape[1]} tokens do not fit into the {tokens} places of an "
                f"image; force a smaller kept set ({images} images)"
            )
        place = (~valid).long().argsort(dim=1, stable=True)
        return Merged(
            gather_rows(features, place),
            valid.gather(1, place),
            source.gather(1, place),
            dominant.gather(1, place),
        )


def _pass(seen: Seen) -> VisionPass:
    if seen.vision is None:
        raise CompressionError("visionzip needs to see the vision tower run")
    return seen.vision


def _targets(kept: Tensor, count: int) -> Tensor:
    """Every step-th of the tokens not kept, the first `count`: ``[I, count]``."""
    rest = kept.long().argsort(dim=1, stable=True)  # tokens not kept first, in spatial order
    step = (~kept).sum(1, keepdim=True) // max(count, 1)
    places = torch.arange(count, device=kept.device) * step
    return rest.gather(1, places.expand(len(kept), count))


def _contextual(hidden: Tensor, targets: Tensor, assignment: Tensor) -> Tensor:
    """``target + mean(joined)`` for each target: ``[I, C, D]``."""
    places = torch.arange(targets.shape[1], device=hidden.device)
    joins = (assignment[:, None] == places[:, None]).to(hidden.dtype)  # [I, C, V]
    mean = (joins @ hidden) / joins.sum(-1, keepdim=True).clamp_min(1)
    return gather_rows(hidden, targets) + mean
