"""An LVLM on closed questions as an image classifier: pictures in, logits of the options out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from attacks.errors import AttackError
from targets.base import Batch
from targets.base import Path as ModelPath

ROWS: Final = 64
"""Most pictures in one question to the deployed target."""
_SHIFT: Final = 1e-6
"""Keeps log(1 − p) finite where p rounds to 1."""


class OptionLogits(nn.Module):
    """An LVLM on closed questions as an image classifier: one class for each answer option.

    Logits are the options' log-probabilities, shifted so that the least of a picture is 1: some
    library losses (CW, the margins) take for granted that logits are positive, and no loss depends
    on a common shift. An open question has two classes, the right answer (0) and anything else
    (1), with logits log p and log(1 − p). There p is the probability of the right answer: with
    gradients the geometric mean over its tokens, of a deployed target that of the whole text.

    Args:
        view: a white-box view, or with `deployed` one of option scores.
        batch: samples whose questions are asked. All have the same number of options. Of one
            sample, any number of pictures can be passed; of several, exactly one each, in order.
        path: with all visual tokens, or through the compressor; ignored with `deployed`.
        deployed: ask the deployed target, without gradients.
    """

    def __init__(
        self,
        view: Any,  # noqa: ANN401 - as `deployed` says
        batch: Batch,
        *,
        path: ModelPath = "full",
        deployed: bool = False,
    ) -> None:
        super().__init__()
        # Libraries find the device by the parameters.
        self.anchor = nn.Parameter(torch.zeros((), device=batch.images.device), requires_grad=False)
        self.first_slope: Tensor | None = None
        self._view, self._batch, self._path, self._deployed = view, batch, path, deployed
        self._options = closed_options(batch)
        self.eval()

    @property
    def classes(self) -> int:
        """How many logits a picture has."""
        return 2 if self._options is None else len(self._options[0])

    @property
    def labels(self) -> Tensor:
        """The class of the right answer of each sample, int64 ``[B]``."""
        found = [0] * len(self._batch.ids)
        if self._options is not None:
            found = [_place(self._batch, row) for row in range(len(found))]
        return torch.tensor(found, device=self.anchor.device)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of pictures ``[N, 3, H, W]`` in [0, 1]."""
        rows = self._rows(len(images))
        images = images.to(self.anchor.device).float()
        if self._deployed:
            parts = [
                self._logprobs(images[start : start + ROWS], rows[start : start + ROWS])
                for start in range(0, len(images), ROWS)
            ]
            found = torch.cat(parts)
        else:
            found = self._logprobs(self._watched(images), rows)
        return found - found.detach().amin(1, keepdim=True) + 1

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of one picture a sample, the right option's log-probability, and whether it leads."""
        with torch.no_grad():
            found = self(images).log_softmax(1)
        labels = self.labels
        return found.gather(1, labels[:, None]).squeeze(1), found.argmax(1) == labels

    def _rows(self, count: int) -> list[int]:
        """Which sample each picture belongs to."""
        samples = len(self._batch.ids)
        if samples == 1:
            return [0] * count
        if count == samples:
            return list(range(count))
        raise AttackError(
            f"{count} pictures for {samples} questions: an attack that picks samples out of a "
            "batch has to be run one sample at a time"
        )

    def _logprobs(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        questions = tuple(self._batch.questions[row] for row in rows)
        answers = tuple(self._batch.answers[row] for row in rows)
        if self._options is not None:
            options = tuple(self._options[row] for row in rows)
            found: Tensor = self._ask(images, questions, options)
            return found
        if self._deployed:
            alone = tuple((answer,) for answer in answers)
            return two_way(self._ask(images, questions, alone).squeeze(1))
        through = self._path == "compressed"
        return two_way(
            -self._view.answer_nll(
                images, questions, answers, path=self._path, straight_through=through
            )
        )

    def _ask(
        self, images: Tensor, questions: tuple[str, ...], options: tuple[tuple[str, ...], ...]
    ) -> Any:  # noqa: ANN401 - views are checked by the meter
        if self._deployed:
            return self._view.option_scores(images, questions, options)
        return self._view.option_logprobs(
            images,
            questions,
            options,
            path=self._path,
            straight_through=self._path == "compressed",
        )

    def _watched(self, images: Tensor) -> Tensor:
        """The pictures, whose first gradient is remembered: its size says whether there is one."""
        if not images.requires_grad or self.first_slope is not None:
            return images
        alias = images.view_as(images)
        alias.register_hook(self._remember)  # type: ignore[no-untyped-call]
        return alias

    def _remember(self, gradient: Tensor) -> None:
        if self.first_slope is None:
            slopes = gradient.detach().abs().flatten(1).amax(1)
            alone = len(self._batch.ids) == 1
            self.first_slope = slopes.amax(0, keepdim=True) if alone else slopes


def two_way(log_p: Tensor) -> Tensor:
    """``[B]`` log p → ``[B, 2]`` log p and log(1 − p), finite and with a gradient up to p = 1."""
    log_p = log_p - _SHIFT
    small = log_p < -math.log(2)
    # Two forms, each exact in its half; `where` inside keeps the other's gradient finite.
    below = torch.where(small, log_p, -1.0).exp().neg().log1p()
    above = torch.where(small, -1.0, log_p).expm1().neg().log()
    return torch.stack([log_p, torch.where(small, below, above)], 1)


def closed_options(batch: Batch) -> tuple[tuple[str, ...], ...] | None:
    """The options of each sample; None if the questions are open."""
    return batch.options if batch.options and len(batch.options[0]) > 1 else None


def option_count(batch: Batch, row: int) -> int:
    """Options of a sample; 0 for an open question."""
    found = 0 if batch.options is None else len(batch.options[row])
    return found if found > 1 else 0


def _place(batch: Batch, row: int) -> int:
    """Where the right answer stands among a sample's options."""
    options = () if batch.options is None else batch.options[row]
    for same in (str.__eq__, lambda one, two: one.strip().lower() == two.strip().lower()):
        for index, option in enumerate(options):
            if same(option, batch.answers[row]):
                return index
    name = batch.ids[row]
    raise AttackError(
        f"the right answer {batch.answers[row]!r} of sample {name} is none of its options "
        f"{list(options)}; the data set has to offer it",
        sample_ids=(name,),
    )
