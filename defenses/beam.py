"""Plain beam search: the control that every decoding method with beams is read against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor

from defenses.base import AdaptiveRoute
from defenses.decoding import DecodingDefense
from targets.decoding import Step


@dataclass(frozen=True, kw_only=True)
class BeamSearch(DecodingDefense):
    """Search over several continuations by the model's own distribution, and nothing else.

    On LLaVA-1.5 beams alone give 56 % of the CHAIRi gain that VASparse reports over greedy decoding
    (arXiv 2501.06553, Table 1), so a method that uses beams is compared with this, not with greedy.

    Args:
        beams: W ≥ 1; 3 is what VASparse uses for 64 new tokens, 2 for 512.
        length_penalty: exponent of the length that a finished beam's log-probability is divided by.

    Each step costs a forward of W rows. An adaptive attack takes the teacher-forced loss, which is
    that of greedy decoding: beams only reorder what the same distribution says.
    """

    name: ClassVar[str] = "beam"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    beams: Annotated[int, Ge(1)] = 3

    def logits(self, step: Step) -> Tensor:
        """The model's own."""
        return step.logits
