"""TransPrune: keep the visual tokens that the layers change most, and that the words look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from targets.compression.base import Scores, Seen
from targets.compression.budgets import checked_shares, fixed_stages, power_stages
from targets.compression.raters import precise, sight_of, text_rows
from targets.compression.scoring import TINY, log_probability
from targets.compression.staged import Staged
from targets.errors import CompressionError

_OFFICIAL: Final = (0.875, 0.625, 0.125)
_SEEN: Final = "transitions"


@dataclass(frozen=True, kw_only=True)
class TransPrune(Staged):
    """Keep visual tokens with large token transitions in middle layers and the words' attention.

    Paper: "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Models" (CVPR
    2026). For each module F (attention, MLP) of the watched layers, with x its normalised input and
    y its output before the residual addition, token transition variation is
    ``TTV = ‖y‖ / ‖x‖ · softmax(1 − cos(x, y))``, softmax over the visual tokens; it is added up
    over modules and layers so far. Instruction-guided attention (IGA) is the pruning layer's own
    attention, rows of all prompt tokens behind the image, softmax over all columns, mean over heads
    and rows. Score: ``α · TTV / ΣTTV + (1 − α) · IGA / ΣIGA``, sums over the image.

    Args:
        layers: 0-based layers at whose inputs tokens are dropped; None is 7, 9, 12 of 32, moved in
            proportion to the model's depth. Layers from the one before the first of them on are
            watched (6 … 11).
        retention: kept ÷ all visual tokens, in (0, 1]; the official final share is 0.125.
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        budget_is: ``final`` means what the last stage leaves, ``average`` the mean over all layers
            of the language model.
        shares: share of all tokens left after each stage but the last; None is 0.875, 0.625 where
            0.125 is left at last, and powers of these for other budgets.
        alpha: weight of TTV, in [0, 1]; the rest is IGA's.
        direction: ``signed`` is 1 − cos, the authors' code; ``absolute`` is 1 − |cos|, the paper.
        positions: the official code numbers the tokens anew at each stage.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: the official softmax of directions runs over the whole sequence
    and batch; this one runs over the living visual tokens of each image, which gives the modules
    slightly other weights but the same order of tokens within each. Shares of the published "Low"
    setting are not public [unknown]; how stages follow other budgets is ours. Where no text follows
    the image, IGA is the last prompt token's. Nothing is detached.
    """

    name: ClassVar[str] = "transprune"
    official_layers: ClassVar[tuple[int, ...]] = (7, 9, 12)

    budget_is: Literal["final", "average"] = "final"
    shares: tuple[Annotated[float, Interval(gt=0, le=1)], ...] | None = None
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.5
    direction: Literal["signed", "absolute"] = "signed"
    positions: Literal["keep", "reindex"] = "reindex"

    def __post_init__(self) -> None:
        """Check budget, layers, shares and weight."""
        super().__post_init__()
        stages = len(self.official_layers if self.layers is None else self.layers)
        checked_shares(self.name, self.shares, stages)
        if not 0 <= self.alpha <= 1:
            raise CompressionError(
                f"compressor transprune: alpha is {self.alpha!r}; it is the weight of transitions "
                "beside attention, in [0, 1]"
            )

    def stages(self, tokens: int, final: int, number: int) -> tuple[int, ...]:
        """Powers of the official shares, unless given; equal factors for other than 3 stages."""
        if self.shares is not None:
            return fixed_stages(self.shares, tokens, final, number)
        if number == len(_OFFICIAL):
            return power_stages(_OFFICIAL, tokens, final)
        return power_stages([0.5 ** (i + 1) for i in range(number)], tokens, final)

    def watches(self, layers: int) -> tuple[int, ...]:
        """From the layer before the first pruning layer to the one before the last."""
        at = self.drops_at(layers)
        return tuple(range(at[0] - 1, at[-1]))

    def watch(self, layer: int, module: str, before: Tensor, after: Tensor, seen: Seen) -> None:
        """Remember a module's transitions ``[I, V]``."""
        found = transition(before, after, seen.valid, absolute=self.direction == "absolute")
        seen.memory.setdefault(_SEEN, {})[layer, module] = found

    def score(self, seen: Seen) -> Scores:
        """Share of transitions and attention, ``[I, V]``; sums to 1 over an image."""
        at = seen.cut.layer or 0
        # A replay under checkpointing finds later layers remembered as well.
        watched: dict[tuple[int, str], Tensor] = seen.memory.get(_SEEN, {})
        past = [value for (layer, _), value in watched.items() if layer < at]
        if not past:
            raise CompressionError("transprune has not watched any layer before its cut")
        text = sight_of(seen)
        paid = text.attention(text_rows(text)).mean(1)
        transitions = torch.stack(past).sum(0)
        score = self.alpha * _share(transitions, seen) + (1 - self.alpha) * _share(paid, seen)
        return Scores(score, log_probability(score))


def transition(before: Tensor, after: Tensor, valid: Tensor, *, absolute: bool = False) -> Tensor:
    """Token transition variation of a module, ``[I, V]``; 0 where not valid.

    Args:
        before: ``[I, V, D]`` its input.
        after: ``[I, V, D]`` its output.
        valid: bool ``[I, V]``.
        absolute: take 1 − |cos| for the direction.
    """
    x, y = (precise(one).masked_fill(~valid[..., None], 0) for one in (before, after))
    # The floor goes under the root, so that a zero vector has a gradient.
    sizes = [(one.square().sum(-1) + TINY).sqrt() for one in (x, y)]
    cosine = (x * y).sum(-1) / (sizes[0] * sizes[1])
    turn = 1 - (cosine.abs() if absolute else cosine)
    weight = turn.masked_fill(~valid, torch.finfo(turn.dtype).min).softmax(-1)
    return (sizes[1] / sizes[0] * weight).masked_fill(~valid, 0)


def _share(values: Tensor, seen: Seen) -> Tensor:
    """Values ÷ their sum over each image."""
    values = values.masked_fill(~seen.valid, 0)
    return values / values.sum(1, keepdim=True).clamp_min(TINY)
