"""From what was measured to a `Trial`, the record everything else is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from redteam.diagnosis import Places, compare, judge
from redteam.pictures import Pixels, distance
from reports.records import (
    Answers,
    Cell,
    Demand,
    Demands,
    Detection,
    Draws,
    Effort,
    Objective,
    Pipelines,
    Swap,
    Tokens,
    Trial,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redteam.batching import Failure
    from redteam.calibrating import Watched
    from redteam.datasets.base import Sample
    from redteam.diagnosis import Bools
    from redteam.evaluation import Reply, Shot


@dataclass(frozen=True, slots=True)
class Attacked:
    """An attacked image.

    Attributes:
        shot: as saved and read back.
        clean: what it was made from.
        loss: trace of the attack.
        checks: self-checks that fired, and the attack's notes.
        seed: it was made with.
        seconds: this sample's share of the attack.
        effort: what making it took.
        made_by: which part of a combined attack made it.
        base: what its budget was measured from.
        pipeline: hash of the defended target it was made on; "" if on none.
        objective: what the attack's loss says of it.
    """

    shot: Shot
    clean: Shot
    loss: list[float]
    checks: tuple[str, ...]
    seed: int
    seconds: float
    effort: Effort
    made_by: str
    base: Shot
    pipeline: str = ""
    objective: Objective | None = None


@dataclass(frozen=True, slots=True)
class Swapped:
    """Both halves of the swap test."""

    recovered: Reply
    """The attacked image with the clean kept set."""
    reproduced: Reply
    """The clean image with the attacked kept set."""


def changed(first: Pixels | None, second: Pixels | None) -> str:
    """The self-check on an attack that was run twice alike; "" if nothing changed.

    Args:
        first: the image, 8-bit; None if the run ended in an error.
        second: that of the second run.
    """
    if first is None and second is None:
        return ""
    what = "one of two equal runs ended in an error"
    if first is not None and second is not None:
        levels = np.abs(first.astype(np.int16) - second.astype(np.int16))
        if not levels.any():
            return ""
        what = (
            "a second run with the same seed in the same batch gave other values in "
            f"{(levels > 0).mean():.1%} of the picture, by up to {levels.max()} levels"
        )
    return f"not-repeatable: {what}. Use deterministic kernels, and draw only from the given seeds."


def measured(
    cell: Cell,
    attacked: Attacked,
    replies: tuple[Reply, ...],
    swapped: Swapped | None,
    places: Places,
    evidence: Bools | None,
    shared: int,
    deployed: str = "",
) -> Trial:
    """A trial that could be measured.

    Args:
        cell: it belongs to.
        attacked: the image.
        replies: clean full, clean compressed, attacked full, attacked compressed.
        swapped: the swap test; None where there is nothing to diagnose.
        places: of the visual tokens.
        evidence: bool ``[V]``; None if unknown.
        shared: cells that share the image, among which its cost is divided.
        deployed: hash of what answered through compression; "" without a defence.
    """
    full, compressed, hit_full, hit = replies
    sample, clean = attacked.shot.sample, attacked.clean
    timings = {
        "attack": attacked.seconds / shared,
        "answers, attacked": hit_full.seconds / shared + hit.seconds,
        "swap test": swapped.recovered.seconds + swapped.reproduced.seconds if swapped else 0.0,
    }
    return Trial(
        cell=cell.id,
        sample=sample.id,
        image=sample.image_id,
        kind=sample.kind,
        question=sample.question,
        truth=sample.answer,
        seed=attacked.seed,
        answers=Answers(
            clean_full=full.answer,
            clean_compressed=compressed.answer,
            attacked_full=hit_full.answer,
            attacked_compressed=hit.answer,
        ),
        tokens=_tokens(compressed, hit, places, evidence),
        swap=_swap(swapped),
        distance=distance(attacked.base.pixels, attacked.shot.pixels),
        base_png=None if attacked.base.png == clean.png else attacked.base.png,
        effort=attacked.effort,
        made_by=attacked.made_by,
        demands=Demands(
            clean_full=_demand(full, places),
            clean_compressed=_demand(compressed, places),
            attacked_full=_demand(hit_full, places),
            attacked_compressed=_demand(hit, places),
        ),
        pipelines=Pipelines(deployed=deployed, attacked=attacked.pipeline) if deployed else None,
        clean_png=clean.png,
        attacked_png=attacked.shot.png,
        loss=attacked.loss,
        objective=attacked.objective,
        checks=list(attacked.checks),
        timings={name: round(seconds, 6) for name, seconds in timings.items()},
    )


def with_scores(trial: Trial, seen: Sequence[Watched]) -> Trial:
    """A trial with what a detector says of its pictures.

    Args:
        trial: measured.
        seen: of the clean and of the attacked picture; none in cells without a detector.
    """
    if not seen:
        return trial
    clean, attacked = seen
    found = Detection(
        clean=clean.score,
        attacked=attacked.score,
        seconds=round((clean.seconds + attacked.seconds) / 2, 6),
        limit=clean.limit,
    )
    return trial.model_copy(update={"detection": found})


def with_draws(trial: Trial, others: Sequence[tuple[Reply, ...]]) -> Trial:
    """A trial with what became of it under further draws of a defence or a compressor.

    Args:
        trial: measured, under the first draw.
        others: the four answers under each further one; none where nothing is drawn.
    """
    if not others or trial.answers is None:
        return trial
    a = trial.answers
    own = (a.clean_full, a.clean_compressed, a.attacked_full, a.attacked_compressed)
    rows = [
        tuple(one.correct for one in four)
        for four in (own, *(tuple(reply.answer for reply in four) for four in others))
    ]
    found = Draws(
        count=len(rows),
        clean=sum(clean for _, clean, _, _ in rows),
        attacked=sum(hit for _, _, _, hit in rows),
        broken=sum(clean and not hit for _, clean, _, hit in rows),
        eligible=sum(full and clean for full, clean, _, _ in rows),
        failures=sum(row == (True, True, True, False) for row in rows),
    )
    return trial.model_copy(update={"draws": found})


def _tokens(clean: Reply, attacked: Reply, places: Places, evidence: Bools | None) -> Tokens | None:
    if clean.kept is None or attacked.kept is None:
        return None
    return compare(clean.kept, attacked.kept, places, evidence)


def _demand(reply: Reply, places: Places) -> Demand:
    every = len(places.boxes)
    tokens = every if reply.left is None else reply.left
    if tokens == every and reply.kept is not None:
        tokens = int(reply.kept.kept.sum())
    return Demand(
        tokens=tokens,
        generated=reply.generated,
        seconds=round(reply.seconds, 6),
        fallback=reply.fallback,
    )


def _swap(swapped: Swapped | None) -> Swap | None:
    if swapped is None:
        return None
    recovered = swapped.recovered.answer.correct
    reproduced = not swapped.reproduced.answer.correct
    return Swap(
        recovered=recovered,
        reproduced=reproduced,
        recovered_text=swapped.recovered.answer.text,
        reproduced_text=swapped.reproduced.answer.text,
        diagnosis=judge(recovered=recovered, reproduced=reproduced),
    )


def unmeasured(cell: Cell, name: str, clean: Shot | None, seed: int, failure: Failure) -> Trial:
    """A trial that ended in an error: never a finding.

    Args:
        cell: it belongs to.
        name: id of the sample.
        clean: the clean picture; None if it could not be read.
        seed: the image would have been made with.
        failure: what went wrong.
    """
    sample: Sample | None = clean.sample if clean is not None else None
    return Trial(
        cell=cell.id,
        sample=name,
        image=sample.image_id if sample else name,
        kind=sample.kind if sample else "",
        question=sample.question if sample else "",
        truth=sample.answer if sample else "",
        seed=seed,
        clean_png=clean.png if clean is not None else None,
        error=failure.error,
    )
