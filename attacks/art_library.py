"""Attacks of the Adversarial Robustness Toolbox by name: ``type: art.HopSkipJump``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor, nn

from attacks.libraries import LibraryAttack, load_class
from attacks.option_logits import OptionLogits
from targets.base import Knowledge

_PROBABILITIES: Final = frozenset({"SimBA"})
"""It refuses a classifier whose outputs are not probabilities."""
_IN_PAIRS: Final = frozenset({"PixelAttack"})
"""They squeeze a batch of one into no batch at all, so the picture is given twice."""


class _Probabilities(nn.Module):
    """A classifier's probabilities."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities ``[N, classes]``."""
        found: Tensor = self.model(images).softmax(1)
        return found


@dataclass(frozen=True, kw_only=True)
class ArtAttack(LibraryAttack):
    """Attack with an evasion class of ART that sees the LVLM as a classifier of answer options.

    Paper: Nicolae et al., "Adversarial Robustness Toolbox v1.0.0" (arXiv 1807.01069); each attack
    names its own. Questions and answers: see `attacks.option_logits.OptionLogits`.

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
    by one, each with its own seed, so results do not depend on the batch. Attacks that use no
    gradients get a black-box classifier of the deployed target's option scores.
    """

    name: ClassVar[str] = "art"

    attack: str = "ProjectedGradientDescentPyTorch"

    def generate(self, model: OptionLogits, images: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Call the library's attack on arrays."""
        copies = 2 if self.attack in _IN_PAIRS else 1
        with _on(images.device):
            estimator = self._estimator(model, images)
            attack = load_class(self.library, self.attack)(estimator, **settings)
            pictures = images.cpu().numpy().astype(np.float32).repeat(copies, 0)
            # One-hot: two classes given by index are taken for a single output.
            labels = np.eye(model.classes, dtype=np.float32)[model.labels.cpu().numpy()]
            found = attack.generate(x=pictures, y=labels.repeat(copies, 0))
        return torch.from_numpy(np.asarray(found, dtype=np.float32)[: len(images)])

    @property
    def _fixed(self) -> Mapping[str, Any]:
        return {"norm": {"linf": np.inf, "l2": 2}[self.norm]}

    def _estimator(self, model: OptionLogits, images: Tensor) -> Any:  # noqa: ANN401 - ART's
        from art.estimators.classification import BlackBoxClassifierNeuralNetwork, PyTorchClassifier

        shape = tuple(images.shape[1:])
        logits = _Probabilities(model) if self.attack in _PROBABILITIES else model
        if self.needs is Knowledge.WHITE_BOX:
            return PyTorchClassifier(
                model=logits,
                loss=nn.CrossEntropyLoss(),
                input_shape=shape,
                nb_classes=model.classes,
                clip_values=(0.0, 1.0),
                device_type="gpu" if images.is_cuda else "cpu",
            )

        def predict(pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            found: Tensor = logits(torch.as_tensor(pictures, dtype=torch.float32))
            return found.cpu().numpy()

        return BlackBoxClassifierNeuralNetwork(
            predict, shape, model.classes, channels_first=True, clip_values=(0.0, 1.0)
        )


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """ART takes the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
