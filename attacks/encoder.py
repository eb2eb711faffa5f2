"""What the attacks on the vision tower alone share: their steps, and what counts there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from attacks.base import Attack
from attacks.budget import Budget
from attacks.encoder_losses import published_count
from attacks.errors import AttackError
from targets.base import EncoderView, Knowledge


@dataclass(frozen=True, kw_only=True)
class EncoderAttack(Attack):
    """Base of attacks that know the vision tower and nothing behind it.

    No compressor, budget, question or language model is known, so one image serves all of them.

    Args:
        steps: gradient steps T, ≥ 0; 0 is the start alone.
        alpha: step size in [0, 1] pixel units; None is epsilon / 4.
        restarts: starts, best loss kept per sample, ≥ 1; those after the first are random.
    """

    knowledge: ClassVar[Knowledge] = Knowledge.ENCODER

    steps: Annotated[int, Ge(0)] = 100
    alpha: Annotated[float, Gt(0)] | None = None
    restarts: Annotated[int, Ge(1)] = 1

    def budget(self, epsilon: float) -> Budget:
        """Linf radius, step size, steps and restarts."""
        alpha = epsilon / 4 if self.alpha is None else self.alpha
        return Budget(epsilon, "linf", alpha, self.steps, self.restarts)


@dataclass(frozen=True, slots=True)
class KeptRange:
    """The budgets an attacker imagines, in tokens; both ends count.

    Attributes:
        low: smallest.
        high: largest.
        notes: remarks for the report.
    """

    low: int
    high: int
    notes: tuple[str, ...] = ()


def ordered_range(name: str, k_min: int | None, k_max: int | None) -> None:
    """Refuse options of which the smallest budget is above the largest.

    Raises:
        AttackError: with both.
    """
    if k_min is not None and k_max is not None and k_min > k_max:
        raise AttackError(
            f"attack {name}: k_min is {k_min} and k_max is {k_max}; k_min must not be above k_max"
        )


def kept_range(
    k_min: int | None, k_max: int | None, published: tuple[int, int], tokens: int
) -> KeptRange:
    """The options `k_min` and `k_max` for images of `tokens` visual tokens.

    Args:
        k_min: a count, or None for the published one as a share of 576.
        k_max: likewise.
        published: both, of 576 tokens.
        tokens: V of the images at hand; more cannot be kept.

    Returns:
        1 ≤ low ≤ high ≤ V, with a note where a count had to give way.
    """
    high = published_count(published[1], tokens) if k_max is None else k_max
    low = published_count(published[0], tokens) if k_min is None else k_min
    cut = KeptRange(min(low, high, tokens), min(high, tokens))
    given = [f"k_min {k_min}" * (k_min is not None), f"k_max {k_max}" * (k_max is not None)]
    if (k_min is None or cut.low == k_min) and (k_max is None or cut.high == k_max):
        return cut
    return KeptRange(
        cut.low,
        cut.high,
        (
            f"{' and '.join(filter(None, given))} do not fit images of {tokens} visual tokens; "
            f"budgets from {cut.low} to {cut.high} were imagined",
        ),
    )


def present_layers(
    view: EncoderView, layers: Sequence[int]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Those of `layers` that the tower has, and a note on those it has not.

    Args:
        view: of the tower.
        layers: 0 the first, −1 the last.

    Raises:
        AttackError: if it has none of them.
    """
    depth = view.tower_depth()
    found = tuple(number for number in layers if -depth <= number < depth)
    if not found:
        raise AttackError(
            f"layers are {list(layers)}, and the vision tower has {depth}; name at least one from "
            f"{-depth} to {depth - 1}"
        )
    absent = [number for number in layers if number not in found]
    note = f"the vision tower has {depth} layers; {absent} of layers {list(layers)} were left out"
    return found, (note,) if absent else ()
