"""ICD: subtract what a misleading instruction would have made the model say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute, DefenseError
from defenses.decoding import DecodingDefense, contrasted
from targets.decoding import Step, View


@dataclass(frozen=True, kw_only=True)
class ICD(DecodingDefense):
    """Contrast the answer to a question with the answer under a disturbing role.

    Paper: Wang et al., "Mitigating Hallucinations in Large Vision-Language Models with Instruction
    Contrastive Decoding" (ACL Findings 2024, arXiv 2403.18715); code p1k0pan/ICD:
    ``(1 + a) l(y | v, x) − a l(y | v, x_d)`` among the tokens with ``l ≥ log b + max l``, where x_d
    is the question behind a role that confuses.

    Args:
        alpha: a ≥ 0, weight of the contrast; 0 is plain decoding, without the second pass.
        cutoff: b in [0, 1] of the plausibility cut.
        role: put in front of the question, with a space between.
        beams: width of the search.
        length_penalty: see `DecodingDefense`.

    Raises:
        DefenseError: for an empty role, which would contrast the question with itself.

    Each token costs a second forward. Differentiable: an adaptive attack goes through both passes.

    *Differs from the paper in …*: for models with a Q-Former the paper puts the role into its text;
    here it always stands in the prompt. The exact wording of its roles was not at hand: the default
    is a reconstruction of the "confused object detector" [inferred].
    """

    name: ClassVar[str] = "icd"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    alpha: Annotated[float, Ge(0)] = 1.0
    cutoff: Annotated[float, Interval(ge=0, le=1)] = 0.1
    role: str = "You are a confused object detector."

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not self.role.strip():
            raise DefenseError(
                f"defence {self.name}: role is {self.role!r}; give the words that disturb, or set "
                "alpha to 0"
            )

    def views(self) -> tuple[View, ...]:
        """The question behind the role."""
        return (View(question=self._disturbed),) if self.alpha else ()

    def _disturbed(self, question: str) -> str:
        return f"{self.role} {question}"

    def logits(self, step: Step) -> Tensor:
        """Contrasted with the disturbed question."""
        if not self.alpha:
            return step.logits
        return contrasted(step.logits, step.views[0], self.alpha, self.cutoff)
