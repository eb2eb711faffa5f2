"""SID: subtract what the least attended visual tokens would have made the model say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute
from defenses.decoding import DecodingDefense, contrasted
from targets.decoding import AttentionCall, AttentionRule, Step, View
from targets.decoding.attention import softmax
from targets.families.base import Family


@dataclass(frozen=True, kw_only=True)
class SID(DecodingDefense):
    """Contrast the answer with that of a pass that sees the least attended visual tokens only.

    Paper: Huo et al., "Self-Introspective Decoding: Alleviating Hallucinations for Large
    Vision-Language Models" (ICLR 2025, arXiv 2408.02032); code huofushuo/SID. In the second pass,
    layers from `layer` on see of the picture only the visual tokens with the *lowest* head-mean
    attention of the present token in the layer before; ``(1 + a) l − a l_least`` among the tokens
    with ``l ≥ log b + max l``.

    It takes what a compressor would drop for evidence against an answer. Where an attack inverts
    the ranking, that is the true evidence, and SID is expected to do harm [inferred]. That is an
    expectation, nothing measured.

    Args:
        alpha: a ≥ 0, weight of the contrast; 0 is plain decoding, without the second pass.
        cutoff: b in [0, 1] of the plausibility cut.
        layer: first layer that sees the least attended only, ≥ 1, 0-based.
        retention: share of the visual tokens there are at that layer that it sees, in (0, 1]; at
            least one. The paper's is 100 of 576.
        beams: width of the search.
        length_penalty: see `DecodingDefense`.

    Each token costs a second forward. Differentiable through both passes; which tokens are least
    attended has no gradient.

    *Differs from the paper in …*: the share is of what a compressor has left, and where one drops
    tokens behind `layer`, the least attended are chosen anew among what is left, by the attention
    of the layer that follows [inferred]. Text behind the picture sees the choice of the prompt's
    last token, in the prefill and when an answer is scored, as in the code's prefill.
    """

    name: ClassVar[str] = "sid"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    alpha: Annotated[float, Ge(0)] = 1.0
    cutoff: Annotated[float, Interval(ge=0, le=1)] = 0.1
    layer: Annotated[int, Ge(1)] = 2
    retention: Annotated[float, Interval(gt=0, le=1)] = 0.1736  # 100 of 576

    def views(self) -> tuple[View, ...]:
        """The least attended tokens."""
        return (View(attention=self._least),) if self.alpha else ()

    def _least(self) -> AttentionRule:
        return LeastAttended(self.layer, self.retention)

    def refuses(self, family: Family) -> str | None:
        """A model that has no such layer."""
        if self.alpha and self.layer >= len(family.layers):
            return (
                f"layer is {self.layer}, but the language model has layers 0 to "
                f"{len(family.layers) - 1}"
            )
        return None

    def logits(self, step: Step) -> Tensor:
        """Contrasted with the least attended tokens."""
        if not self.alpha:
            return step.logits
        return contrasted(step.logits, step.views[0], self.alpha, self.cutoff)


class LeastAttended(AttentionRule):
    """Hide all visual tokens but the least attended, from a layer on.

    Args:
        first: that layer.
        retention: share of the visual tokens that stay.
    """

    masks = True

    def __init__(self, first: int, retention: float) -> None:
        self._first, self._retention = first, retention
        self._hide: Tensor | None = None  # bool [B, R, n]
        self._start = -1

    def layers(self, depth: int) -> range:
        """And the one before, whose attention chooses."""
        return range(self._first - 1, depth)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Choose, or hide what was not chosen."""
        if call.layer < self._first:
            self._choose(call)
            return call.kernel(call.mask)
        if self._hide is None or call.columns.start != self._start:
            self._choose(call)
        if self._hide is None:
            raise RuntimeError("nothing was chosen")
        return call.kernel(_hiding(call, _aligned(self._hide, call.key.shape[2])))

    @torch.no_grad()
    def _choose(self, call: AttentionCall) -> None:
        logits = call.scaled(call.dots(call.answers()))
        paid = softmax(logits, call.answers_added()).mean(1)
        visual = call.columns.visual[:, None].expand_as(paid)
        self._hide, self._start = visual & ~least(paid, visual, self._retention), call.columns.start


def least(paid: Tensor, visual: Tensor, retention: float) -> Tensor:
    """The lowest entries among the visual columns; of equal ones the first.

    Args:
        paid: attention ``[B, R, n]``.
        visual: bool ``[B, R, n]``.
        retention: share of them, rounded; at least one where there is one.

    Returns:
        bool ``[B, R, n]``.
    """
    number = visual.sum(-1, keepdim=True)
    count = (number * retention).round().clamp_min(1).minimum(number)
    order = paid.masked_fill(~visual, torch.inf).argsort(dim=-1, stable=True)
    places = torch.arange(paid.shape[-1], device=paid.device).expand_as(order)
    return torch.zeros_like(visual).scatter(-1, order, places < count)


def _aligned(hide: Tensor, length: int) -> Tensor:
    """For a layer whose cache has forgotten more, or less: columns are counted from the end."""
    more = max(0, length - hide.shape[-1])
    return torch.nn.functional.pad(hide, (more, 0))[..., -length:]


def _hiding(call: AttentionCall, hide: Tensor) -> Tensor:
    """The call's mask with more hidden, ``[B, 1, q, n]`` to be added."""
    q, dtype = call.query.shape[2], call.query.dtype
    rows = torch.cat([hide[:, :1].expand(-1, q - call.rows, -1), hide], 1)[:, None]
    low = torch.finfo(dtype).min
    added = call.added(0, q)
    if added is None:
        return torch.zeros(rows.shape, dtype=dtype, device=rows.device).masked_fill(rows, low)
    return added.clamp_min(low).to(dtype).masked_fill(rows, low)
