"""What a model says is only worth something if it was computed from numbers.

The likeliest token of logits that are NaN is token 0, and it looks like any other answer: right or
wrong by chance, and then a finding. So answers are only given where the logits were finite.
"""

from __future__ import annotations

from torch import Tensor

from targets.errors import NonFiniteError


class FiniteLogits:
    """Watches the logits that tokens are chosen by; a `logits_processor` of transformers too.

    Looked at is the largest logit of a row: it is NaN where any is, infinite where any is, and
    minus infinity where no token is possible. The device is waited for once, by `require`.
    """

    def __init__(self) -> None:
        self._sound: Tensor | None = None

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Look at logits ``[..., vocabulary]`` and give them back as they are."""
        del input_ids
        fine = scores.detach().amax(-1).isfinite().all()
        self._sound = fine if self._sound is None else self._sound & fine
        return scores

    def require(self) -> None:
        """Refuse an answer if any of these logits was not finite.

        Raises:
            NonFiniteError: saying what to do.
        """
        if self._sound is not None and not bool(self._sound):
            raise _unsound("the logits that the next token is chosen by")


def without_nan(values: Tensor, what: str) -> Tensor:
    """Values as they are; minus infinity may stand among them, as what is impossible.

    Raises:
        NonFiniteError: if one is NaN.
    """
    if bool(values.detach().isnan().any()):
        raise _unsound(what)
    return values


def _unsound(what: str) -> NonFiniteError:
    return NonFiniteError(
        f"{what}: NaN or infinity, so no answer is taken from it. Load the model in float32 or "
        "bfloat16 (float16 overflows), and check the weights and the compressor's scores"
    )
