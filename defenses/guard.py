"""The parts of a defence by the place they act at: what an evaluation and an attack put to use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from defenses.base import Defense, DefenseKind, InputDefense
from defenses.decoding import DecodingDefense
from defenses.detector import Detector
from defenses.encoder import EncoderDefense
from defenses.fallback import FallbackDefense
from defenses.selection import SelectionDefense
from targets.compression.base import Compressor
from targets.decoding.assembly import taken


@dataclass(frozen=True, slots=True)
class Guard:
    """Parts of one defence; of none, nothing.

    Attributes:
        encoder: what changes the weights.
        inputs: what changes the picture, in the order it acts.
        selections: what changes the kept set, in the order it acts.
        decoding: how answers are decoded.
        fallback: what decides how many tokens a request gets.
        detector: what says that an input looks attacked.
    """

    encoder: EncoderDefense | None = None
    inputs: tuple[InputDefense, ...] = ()
    selections: tuple[SelectionDefense, ...] = ()
    decoding: DecodingDefense | None = None
    fallback: FallbackDefense | None = None
    detector: Detector | None = None

    @classmethod
    def of(cls, defense: object) -> Guard:
        """The parts of a defence; of anything else, which is no defence, nothing."""
        if not isinstance(defense, Defense):
            return cls()
        parts = defense.parts()

        def only(kind: DefenseKind) -> Defense | None:
            return next((part for part in parts if part.kind is kind), None)

        return cls(
            encoder=cast("EncoderDefense | None", only(DefenseKind.ENCODER)),
            inputs=tuple(part for part in parts if isinstance(part, InputDefense)),
            selections=tuple(part for part in parts if isinstance(part, SelectionDefense)),
            decoding=cast("DecodingDefense | None", only(DefenseKind.DECODING)),
            fallback=cast("FallbackDefense | None", only(DefenseKind.FALLBACK)),
            detector=cast("Detector | None", only(DefenseKind.DETECTOR)),
        )

    @property
    def votes(self) -> int:
        """Draws that are answered each, of which the majority counts."""
        return max((one.votes for one in self.inputs), default=1)

    @property
    def imposes_clean(self) -> bool:
        """Whether the clean picture's own selection is imposed on the attacked one."""
        return any(one.clean_ranking for one in self.selections)

    @property
    def attacked_selections(self) -> tuple[SelectionDefense, ...]:
        """What changes the selection in an attack's graph: a fall-back has a stand-in there."""
        stand_in = None if self.fallback is None else self.fallback.stand_in()
        return self.selections if stand_in is None else (*self.selections, stand_in)

    def draws(self, *, compressed: bool) -> bool:
        """Whether answers on a path may differ from one draw of its randomness to the next."""
        everywhere = (self.decoding, *self.inputs)
        choosing = (*self.selections, self.fallback) if compressed else ()
        return any(one is not None and one.draws for one in (*everywhere, *choosing))

    def acts(self, *, compressed: bool) -> bool:
        """Whether it changes an answer on a path; the selection is of the compressed one only."""
        everywhere = (self.encoder, self.decoding, *self.inputs)
        if any(one is not None for one in everywhere):
            return True
        return compressed and (bool(self.selections) or self.fallback is not None)

    def refuses(self, compressor: Compressor) -> str | None:
        """Why a part has no meaning for a compressor; None if all have."""
        for one in (*self.selections, self.fallback, self.detector):
            reason = None if one is None else one.refuses(compressor)
            if reason is not None:
                return reason
        return None if self.decoding is None else taken(self.decoding, compressor)

    def protect(self, compressor: Compressor, salt: int = 0) -> Compressor:
        """The compressor with every part of the selection in it.

        Args:
            compressor: what drops tokens.
            salt: of their draws.

        Raises:
            DefenseError: where one has no meaning for the compressor.
        """
        for one in self.selections:
            compressor = one.protect(compressor, salt)
        return compressor
