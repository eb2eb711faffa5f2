"""Defences that give a request more visual tokens where its ranking is not to be trusted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from defenses.base import Defense, DefenseKind

if TYPE_CHECKING:
    from defenses.selection import SelectionDefense
    from targets.compression.base import Compressor
    from targets.lvlm import LVLM


class FallbackDefense(Defense):
    """Base of defences that choose, request by request, how many visual tokens are kept."""

    kind: ClassVar[DefenseKind] = DefenseKind.FALLBACK

    @abstractmethod
    def choose(
        self,
        model: LVLM,
        images: Tensor,
        questions: Sequence[str],
        compressor: Compressor,
        seeds: Sequence[int],
    ) -> list[Compressor | None]:
        """What each request is answered with.

        Args:
            model: the target.
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B texts.
            compressor: the one deployed.
            seeds: one per sample; a sample's route depends on its own only.

        Returns:
            Of each sample `compressor` itself, one that keeps more, or None for all tokens. Equal
            ones are answered in one batch.
        """

    def refuses(self, compressor: Compressor) -> str | None:
        """Why it has no meaning for a compressor; None if it has."""
        del compressor
        return None

    def stand_in(self) -> SelectionDefense | None:
        """What an adaptive attack has in the graph instead of the decision, which has no gradient.

        None: the attack goes through the compressor as if nothing fell back.
        """
        return None
