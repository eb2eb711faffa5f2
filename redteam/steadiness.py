"""How an attack's loss jumps at random points around clean images: a sign of masked gradients.

The second of the Indicators of Attack Failure (Pintor et al., arXiv 2106.09947). An attack that
takes no step judges its start and nothing else, so its loss anywhere in the ball is that of a run
from there (`Attack.standing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from redteam.calibrating import batch_of
from redteam.evaluation import Asker, Shot, good
from redteam.plan import seed_of

if TYPE_CHECKING:
    from attacks.base import Attack

RADIUS: Final = 8 / 255
"""Of the linf ball that the points are drawn from. [Indicators of Attack Failure]"""


@dataclass(frozen=True, slots=True)
class Around:
    """Losses of one sample.

    Attributes:
        clean: of the clean image.
        points: of random points around it.
    """

    clean: float
    points: tuple[float, ...]

    def instability(self, trace: Sequence[float]) -> float:
        """Mean change of the loss ÷ its size, in [0, 1].

        Its size is that of the clean image's loss, or what the attack moved it by if that is more:
        a log-likelihood is next to nothing where the model is sure, and any change of it would be
        a multiple. [inferred]

        Args:
            trace: of the attack on this sample, any thinning.
        """
        moved = max(trace) - min(trace) if trace else 0.0
        size = max(abs(self.clean), moved) or 1.0  # as the Indicators have it for a loss of zero
        change = float(np.mean(np.abs(np.array(self.points) - self.clean)))
        return min(1.0, change / size)


def look_around(
    asker: Asker,
    attack: Attack,
    view: Any,  # noqa: ANN401 - a view that the attack may use
    shots: Mapping[int, Shot],
    points: int,
    draw: tuple[int, str],
) -> dict[int, Around]:
    """The loss at the clean image and at random points around it, by index.

    A sample of which any of these failed is left out, and so are all for an attack that cannot
    stand still.

    Args:
        asker: of the target.
        attack: as it is run.
        view: that it is run with.
        shots: clean, by index.
        points: of each sample, in batches of the engine's size.
        draw: seed of the run, and what the points are drawn for.
    """
    seed, what = draw
    here, there = attack.standing(random=False), attack.standing(random=True)
    if here is None or there is None:
        return {}
    places = [(index, point) for index in shots for point in range(points + 1)]
    at = {number: shots[index] for number, (index, _) in enumerate(places)}

    def losses(numbers: Sequence[int]) -> list[float | None]:
        found: dict[int, float | None] = {}
        for standing, clean in ((here, True), (there, False)):
            some = [number for number in numbers if (places[number][1] == 0) is clean]
            if not some:
                continue
            samples = [at[number].sample for number in some]
            batch = batch_of(samples, asker.images([at[number] for number in some]))
            names = tuple(
                f"{one.id}#{places[number][1]}" for one, number in zip(samples, some, strict=True)
            )
            seeds = [
                seed_of(seed, f"{what}/{places[number][1]}", one.id)
                for one, number in zip(samples, some, strict=True)
            ]
            made = standing(view, replace(batch, ids=names), RADIUS, seeds)
            found |= {number: own.kept for number, own in zip(some, made.own, strict=True)}
        return [found[number] for number in numbers]

    seen = good(asker.each(at, losses, f"attack {attack.name}, around clean images"))
    result = {}
    for index in shots:
        mine = [seen.get(number) for number, (one, _) in enumerate(places) if one == index]
        known = [value for value in mine if value is not None and np.isfinite(value)]
        if len(known) == points + 1:
            result[index] = Around(known[0], tuple(known[1:]))
    return result
