"""Self-checks of a finished optimisation: cheap signs that an attack failed for the wrong reason.

In the manner of AutoAttack's checks and the Indicators of Attack Failure (Pintor et al.,
arXiv 2106.09947): each is a pure function of what the loop recorded, and each message names its
remedy. A robust-looking number with such a message beside it is not evidence of robustness.

Messages begin with a stable code (``zero-gradient: …``), so that they can be counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

LAST_STEPS = 10
"""How many steps at the end are examined for a loss that is still moving."""
STILL_MOVING = 0.05
"""Share of the whole descent in the last steps above which the run was too short."""
LOST = 0.05
"""Share of the descent in reduced precision that may be missing in full precision."""
ROUNDING = 2.0**-7
"""Of a loss: what bfloat16 does not tell apart anyway."""

Losses = Sequence[float]
"""Loss at each judged step of one sample, minimised; the first is that of the starting point."""


def zero_gradient(gradients: Sequence[float]) -> str | None:
    """The gradient of one sample is exactly zero at the start, or at half of the steps or more.

    Args:
        gradients: largest absolute pixel gradient at each step.
    """
    zeros = sum(value == 0 for value in gradients)
    if not gradients or (gradients[0] != 0 and 2 * zeros < len(gradients)):
        return None
    return (
        f"zero-gradient: the gradient was exactly zero at {zeros} of {len(gradients)} steps; the "
        "graph is cut or the loss saturated. Use a straight-through or BPDA gradient, float32, "
        "or another loss."
    )


def no_progress(losses: Losses) -> str | None:
    """No step improved on the starting point."""
    if len(losses) < 2 or min(losses[1:]) < losses[0] - _tolerance(losses):
        return None
    return (
        f"no-progress: no step went below the loss of the start, {losses[0]:.4g}; the attack is "
        "no stronger than its starting point. Try a smaller alpha, a random start, or more steps."
    )


def not_decreasing(losses: Losses) -> str | None:
    """Some step improved, but the second half of the run is not below the first."""
    half = len(losses) // 2
    if half < 2 or no_progress(losses) is not None:
        return None
    first, second = sum(losses[:half]) / half, sum(losses[-half:]) / half
    if second < first - _tolerance(losses):
        return None
    return (
        f"not-decreasing: the loss averaged {first:.4g} in the first half of the run and "
        f"{second:.4g} in the second. Lower alpha or use a decaying schedule."
    )


def unfinished(losses: Losses) -> str | None:
    """The best loss so far still moved in the last steps (Indicators of Attack Failure, no. 4).

    A single step, or a start and an end, has no last steps to look at.
    """
    if len(losses) < 3 or no_progress(losses) is not None:
        return None
    best = [min(losses[: end + 1]) for end in range(len(losses))]
    window = min(LAST_STEPS, len(losses) - 1)
    moved = (best[-1 - window] - best[-1]) / (best[0] - best[-1])
    if moved <= STILL_MOVING:
        return None
    return (
        f"unfinished: {moved:.0%} of the descent happened in the last {window} steps, so more "
        "would go further. Raise steps."
    )


def silent_success(losses: Losses, kept: float | None) -> str | None:
    """A better image was met on the way than the one that was kept (IoAF, no. 3).

    Between a start and an end there is no way: whether the end is better, `no_progress` tells.

    Args:
        losses: judged, of one sample.
        kept: of the image that was kept; None if unknown.
    """
    if kept is None or len(losses) < 3 or kept <= min(losses) + _tolerance(losses):
        return None
    return (
        f"silent-success: the image that was kept has a loss of {kept:.4g}, and one on the way had "
        f"{min(losses):.4g}. Keep the best iterate, not the last."
    )


_ON_LOSSES: tuple[Callable[[Losses], str | None], ...] = (no_progress, not_decreasing, unfinished)


def run_checks(
    losses: Losses, gradients: Sequence[float], kept: float | None = None
) -> tuple[str, ...]:
    """Every message that applies to one sample.

    Args:
        losses: judged losses, first to last; NaN entries (steps not judged) are left out.
        gradients: largest absolute pixel gradient at each step, NaN where none was taken.
        kept: loss of the image that was kept; None if unknown.
    """
    seen = [value for value in losses if not math.isnan(value)]
    slopes = [value for value in gradients if not math.isnan(value)]
    messages = [
        zero_gradient(slopes),
        *(check(seen) for check in _ON_LOSSES),
        silent_success(seen, kept),
    ]
    return tuple(message for message in messages if message is not None)


def reduced_precision(losses: Losses, reduced: float, exact: float) -> str | None:
    """The image is worse in full precision than the passes that made it said.

    Tolerated is 5 % of the descent, or 1/128 of the loss, whichever is more.

    Args:
        losses: judged losses in reduced precision, first to last.
        reduced: that of the image returned.
        exact: its loss in full precision.
    """
    seen = [value for value in losses if not math.isnan(value)]
    descent = seen[0] - reduced if seen else 0.0
    tolerance = max(LOST * descent, ROUNDING * abs(reduced), 1e-6)
    if exact <= reduced + tolerance:
        return None
    return (
        f"reduced-precision: the loss of the image is {exact:.4g} in float32 and {reduced:.4g} in "
        "the bfloat16 it was made in; part of the descent was rounding. Set "
        "engine.attack_precision to float32."
    )


def _tolerance(losses: Losses) -> float:
    """What counts as no change: float32 noise at the size of the start."""
    return 1e-6 * max(1.0, abs(losses[0]))
