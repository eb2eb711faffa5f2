"""How much work a plan is: counts, and a rough time from documented constants."""

from __future__ import annotations

from dataclasses import dataclass

from redteam.plan import ImageGroup, Plan, WorkUnit
from redteam.scenario import Method


def unit_cost(unit: WorkUnit) -> float:
    """Rough CPU seconds of a unit; only relative where the speed of its target is unknown."""
    return len(unit.samples) * sample_cost(unit.group, clean=unit.leads)


def sample_cost(group: ImageGroup, *, clean: bool) -> float:
    """Rough CPU seconds of one sample in a group.

    Args:
        group: what is done with it.
        clean: whether its clean answers fall into this group.
    """
    answer, gradient = speed(group.target) or (1.0, 3.0)
    # Swap tests are two answers for each failure; a quarter of the samples is a generous guess.
    answers = 1 + 1.5 * len(group.cells) + (1 + len(group.cells)) * clean
    return (answers + group.queries) * answer + group.gradients * gradient


def speed(target: Method) -> tuple[float, float] | None:
    """Documented CPU seconds of (an answer, a gradient step) of one image; None if unknown."""
    found = target.signature.facts.get("seconds")
    return None if found is None else (float(found[0]), float(found[1]))


@dataclass(frozen=True, slots=True)
class Estimate:
    """How much work a plan is.

    Attributes:
        samples: in the data set.
        images: attacked images to make.
        gradients: gradient steps of one image, in all.
        answers: answers of the model, swap tests aside.
        seconds: rough CPU time; None where the speed of a target is not known.
    """

    samples: int
    images: int
    gradients: int
    answers: int
    seconds: float | None


def estimate(plan: Plan, samples: int) -> Estimate:
    """Add up a plan on so many samples."""
    groups = plan.groups
    clean = sum(1 + len(plan.scenario.compressions) for _ in plan.scenario.targets)
    known = all(speed(target) for target in plan.scenario.targets)
    return Estimate(
        samples=samples,
        images=samples * len(groups),
        gradients=samples * sum(group.gradients for group in groups),
        answers=samples * (clean + sum(1 + len(group.cells) for group in groups)),
        seconds=sum(map(unit_cost, plan.units(samples))) if known else None,
    )
