"""Defences that act while the model answers, and the pieces that several of them share."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from annotated_types import BaseMetadata, Ge, Gt, Interval, Le, Lt
from torch import Tensor

from defenses.base import Defense, DefenseError, DefenseKind
from targets.decoding.base import Decoding

OFF = 1.0e3
"""How far below the rest an implausible token is put, in nats: its probability is 0 in float32.

Not −∞, so that the log-probability of a right answer that a method rules out, and the gradient of
an adaptive attack that wants it back, stay finite.
"""


@dataclass(frozen=True, kw_only=True)
class DecodingDefense(Defense, Decoding):
    """Base of the decoding methods: a `Decoding` that says how an attack goes through it.

    Give one to `LVLM.answer`, `LVLM.option_scores` or the passes behind a white-box view as
    `decoding`. Scoring a given answer uses the same modified distribution, live, so an adaptive
    attack takes the gradient of that. A search over beams has no gradient of its own; its steps
    have, and no robustness may be claimed from the search being discrete.

    Args:
        beams: width of the search, ≥ 1; 1 is greedy.
        length_penalty: exponent of the length that a finished beam's log-probability is divided by.

    Raises:
        DefenseError: for an option outside its range.
    """

    kind: ClassVar[DefenseKind] = DefenseKind.DECODING

    beams: Annotated[int, Ge(1)] = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check every option against its range."""
        check_ranges(self)

    @property
    def draws(self) -> bool:
        """Whether these options draw at random; an attack then needs EOT."""
        return self.stochastic


def check_ranges(defense: Any) -> None:  # noqa: ANN401 - any defence that is a dataclass
    """Check every option of a defence against the range it is annotated with.

    Raises:
        DefenseError: for the first one outside it.
    """
    for one in fields(defense):
        for rule in _rules(type(defense), one.name):
            value = getattr(defense, one.name)
            if value is not None and not _within(value, rule):
                raise DefenseError(
                    f"defence {defense.name}: {one.name} is {value!r}; allowed is {rule}"
                )


def _rules(owner: type, name: str) -> tuple[BaseMetadata | Interval, ...]:
    """The ranges an option was annotated with; of a union those of its members."""
    from typing import get_args, get_type_hints

    hint = get_type_hints(owner, include_extras=True)[name]
    members = (hint, *get_args(hint))
    found = [one for member in members for one in getattr(member, "__metadata__", ())]
    return tuple(one for one in found if isinstance(one, BaseMetadata | Interval))


def _within(value: float, rule: BaseMetadata | Interval) -> bool:
    if isinstance(rule, Interval):
        return all(_within(value, bound) for bound in rule)
    bounds = {
        Ge: lambda bound: value >= bound.ge,
        Gt: lambda bound: value > bound.gt,
        Le: lambda bound: value <= bound.le,
        Lt: lambda bound: value < bound.lt,
    }
    return bool(bounds[type(rule)](rule))


def plausible(logits: Tensor, cutoff: float) -> Tensor:
    """Tokens that are at least `cutoff` times as likely as the likeliest, bool.

    Li et al., "Contrastive Decoding" (arXiv 2210.15097), Eq. 3; in logits ``l ≥ log b + max l``.

    Args:
        logits: ``[…, vocabulary]``, or log-probabilities.
        cutoff: b in [0, 1]; 0 lets every token pass.
    """
    if cutoff == 0:
        return logits.new_ones(logits.shape).bool()
    return logits >= logits.amax(-1, keepdim=True) + math.log(cutoff)


def cut(logits: Tensor, passed: Tensor) -> Tensor:
    """Logits with the tokens that did not pass put `OFF` nats below where the method puts them."""
    return logits - OFF * (~passed).to(logits.dtype)


def contrasted(logits: Tensor, other: Tensor, alpha: float, cutoff: float) -> Tensor:
    """``(1 + a) · logits − a · other`` among the plausible tokens; a = 0 is `logits` itself.

    Args:
        logits: ``[…, vocabulary]`` of the pass that is trusted.
        other: the same of the one that is contrasted with.
        alpha: a ≥ 0.
        cutoff: see `plausible`; judged by `logits`.
    """
    if alpha == 0:
        return logits
    return cut((1 + alpha) * logits - alpha * other, plausible(logits, cutoff))
