"""Attacks of torchattacks by name: ``type: torchattacks.MIFGSM``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import Tensor

from attacks.libraries import LibraryAttack, load_class
from attacks.option_logits import OptionLogits

_PER_SAMPLE: Final = frozenset(
    {"FGSM", "BIM", "PGD", "PGDL2", "MIFGSM", "NIFGSM", "SINIFGSM", "UPGD", "PIFGSM", "PIFGSMPP"}
)
"""They step by the sign, or by a gradient each sample has to itself, and pass the batch whole."""


@dataclass(frozen=True, kw_only=True)
class TorchAttack(LibraryAttack):
    """Attack with a class of torchattacks that sees the LVLM as a classifier of answer options.

    Paper: Kim, "Torchattacks: A PyTorch Repository for Adversarial Attacks" (arXiv 2010.01950);
    each attack names its own. Questions and answers: see `attacks.option_logits.OptionLogits`.

    Args:
        attack: name of the library's class.
        path: of attacks that use gradients: ``full`` attacks the model with all visual tokens and
            does not know the compressor; ``compressed`` attacks through it, with a straight-through
            gradient of the selection. Attacks that ask the deployed target have no choice.
        norm: norm of the ball, and of the attack where it has that choice.
        params: parameters of the library's constructor, (name, value); a step size that is not
            given keeps the library's own ratio to epsilon.

    Raises:
        AttackError: on construction, for an attack that is not offered, with the reason, or a
            parameter that it does not have or that follows from the scenario.

    *Differs from the paper in …*: what leaves the ball is projected back, with a note; the loss
    trace holds the log-probability of the right option before and after. Samples are attacked one
    by one, each with its own seed, unless the attack draws nothing and steps sample by sample;
    so results do not depend on the batch.
    """

    name: ClassVar[str] = "torchattacks"

    attack: str = "PGD"

    def generate(self, model: OptionLogits, images: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Call the library's attack on the whole batch."""
        found: Tensor = load_class(self.library, self.attack)(model, **settings)(
            images, model.labels
        )
        return found

    @property
    def _fixed(self) -> Mapping[str, Any]:
        return {"norm": {"linf": "Linf", "l2": "L2"}[self.norm]}

    def _together(self) -> bool:
        start = self._known().get("random_start")
        given = dict(self.params).get("random_start", start.default if start else False)
        return self.attack in _PER_SAMPLE and not given
