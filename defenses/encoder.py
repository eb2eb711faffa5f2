"""Defences that put another, hardened vision tower into the model."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from defenses.base import Defense, DefenseKind

if TYPE_CHECKING:
    from targets.lvlm import LVLM


class EncoderDefense(Defense):
    """Base of defences that change weights, and nothing about how they are run.

    The hardened model stands in for the target in the evaluation and in every call of an attack
    that knows the defence, so an adaptive attack is the plain one on the weights deployed.
    """

    kind: ClassVar[DefenseKind] = DefenseKind.ENCODER

    @abstractmethod
    def harden(self, model: LVLM) -> LVLM:
        """The model with the hardened weights; the one given stays as it is.

        Args:
            model: the target as loaded.

        Raises:
            DefenseError: where the weights do not fit the model, or cannot be loaded.
        """
