"""PAI: attend more to the picture, and lean away from what the text alone would say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute
from defenses.decoding import DecodingDefense, cut, plausible
from targets.decoding import AttentionCall, AttentionRule, Step, View
from targets.decoding.attention import softmax
from targets.families.base import Family


@dataclass(frozen=True, kw_only=True)
class PAI(DecodingDefense):
    """Raise the attention of the present token to visual tokens, then contrast with no picture.

    Paper: Liu et al., "Paying More Attention to Image: A Training-Free Method for Alleviating
    Hallucination in LVLMs" (ECCV 2024, arXiv 2407.21771); code LALBJ/PAI. In layers from
    `start_layer` on the last query's attention logits of visual tokens become
    ``A + α |A|``; then ``l = γ (log p − log p_text) + log p_text`` among the tokens with
    ``p ≥ b · max p``.

    It amplifies the visual tokens that are *there*: where an attack chose which survive, it is
    expected to amplify the attack [inferred]. That is an expectation, nothing measured.

    Args:
        alpha: α ≥ 0; 0 leaves attention alone.
        gamma: γ ≥ 1, weight of guidance; 1 leaves out the pass without a picture, and with α = 0 is
            plain decoding.
        start_layer: first layer changed, 0-based.
        cutoff: b in [0, 1].
        beams: width of the search.
        length_penalty: see `DecodingDefense`.

    Each token costs a second forward, of the text alone. Differentiable, both parts.

    *Differs from the paper in …*: which columns are visual tokens is known for each layer, so it
    acts on what a compressor left, merged tokens included; the prompt without a picture is the same
    prompt without its image tokens.
    """

    name: ClassVar[str] = "pai"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    alpha: Annotated[float, Ge(0)] = 0.2
    gamma: Annotated[float, Ge(1)] = 1.1
    start_layer: Annotated[int, Ge(0)] = 2
    cutoff: Annotated[float, Interval(ge=0, le=1)] = 0.1

    def views(self) -> tuple[View, ...]:
        """The question without its picture."""
        return (View(image=False),) if self.gamma != 1 else ()

    def attention(self) -> AttentionRule | None:
        """Raised in the main pass only."""
        return Raised(self.alpha, self.start_layer) if self.alpha else None

    def refuses(self, family: Family) -> str | None:
        """A model without layers to change."""
        if self.alpha and self.start_layer >= len(family.layers):
            return (
                f"start_layer is {self.start_layer}, but the language model has layers 0 to "
                f"{len(family.layers) - 1}"
            )
        return None

    def logits(self, step: Step) -> Tensor:
        """Guided away from the text alone."""
        if self.gamma == 1:
            return step.logits
        seen, blind = step.logits.log_softmax(-1), step.views[0].log_softmax(-1)
        return cut(self.gamma * (seen - blind) + blind, plausible(seen, self.cutoff))


class Raised(AttentionRule):
    """``A + α |A|`` for the attention logits of answer positions at visual tokens.

    Args:
        alpha: α > 0.
        start: first layer.
    """

    def __init__(self, alpha: float, start: int) -> None:
        self._alpha, self._start = alpha, start

    def layers(self, depth: int) -> range:
        """From the first one on."""
        return range(self._start, depth)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Attention with the raised logits."""
        logits = call.scaled(call.dots(call.answers()))
        visual = call.columns.visual[:, None, None]
        raised = torch.where(visual, logits + self._alpha * logits.abs(), logits)
        return call.put(call.attend(softmax(raised, call.answers_added())))
