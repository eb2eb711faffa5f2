"""Stack: several defences deployed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from defenses.base import AdaptiveRoute, Defense, DefenseError, DefenseKind
from defenses.selection import SelectionDefense

_ONE_OF_EACH = (DefenseKind.ENCODER, DefenseKind.DECODING, DefenseKind.FALLBACK)


@dataclass(frozen=True, kw_only=True)
class Stack(Defense):
    """Defences of different places at once; an attack that knows it goes through all of them.

    Those of the image and of the selection act in the order they are listed. In a scenario
    ``{stack: [robust_encoder, hybrid]}``.

    Args:
        members: at least two, none of them a detector (detectors change no answer; list them
            beside the stack).

    Raises:
        DefenseError: for members that cannot act together.
    """

    name: ClassVar[str] = "stack"
    kind: ClassVar[DefenseKind] = DefenseKind.STACK
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.EOT  # of an instance, see `route`

    members: tuple[Defense, ...]

    def __post_init__(self) -> None:
        """Refuse what cannot act together."""
        if len(self.members) < 2:
            raise DefenseError(
                f"defence stack has {len(self.members)} member; list at least two, or the one alone"
            )
        parts = self.parts()
        for part in parts:
            if part.kind is DefenseKind.DETECTOR:
                raise DefenseError(
                    f"defence stack: {part.name} detects and changes no answer; list it beside the "
                    "stack"
                )
        for kind in _ONE_OF_EACH:
            self._at_most_one([part for part in parts if part.kind is kind], f"kind {kind.value}")
        looking = [one for one in parts if isinstance(one, SelectionDefense) and one.looks_again]
        self._at_most_one(looking, "those that rank other views")

    def _at_most_one(self, found: Sequence[Defense], what: str) -> None:
        if len(found) > 1:
            names = " and ".join(one.name for one in found)
            raise DefenseError(f"defence stack holds {names}; one of {what} at most")

    def parts(self) -> tuple[Defense, ...]:
        """The acts of all members, in order."""
        return tuple(part for member in self.members for part in member.parts())

    @property
    def route(self) -> AdaptiveRoute:
        """None where a member has none; else EOT, BPDA, straight through: what one needs all do."""
        routes = {member.route for member in self.members}
        order = (AdaptiveRoute.NONE, AdaptiveRoute.EOT, AdaptiveRoute.BPDA)
        return next((one for one in order if one in routes), AdaptiveRoute.DIFFERENTIABLE)

    @property
    def draws(self) -> bool:
        """Whether a member is random."""
        return any(member.draws for member in self.members)
