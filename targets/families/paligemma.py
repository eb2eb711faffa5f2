"""PaliGemma and PaliGemma 2: SigLIP tower, linear projector, Gemma or Gemma 2 over a prefix."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from targets.compression.base import Compressor
from targets.errors import TargetError
from targets.families.gemma import GemmaFamily
from targets.families.llava import encoder_of
from targets.preprocessing.gemma import GemmaPreprocessing
from targets.preprocessing.layout import Layout


class PaliGemma(GemmaFamily):
    """Adapter for `PaliGemmaForConditionalGeneration`.

    The prompt is a prefix: image and question attend to each other in both directions, answers are
    causal. The prefix is what has token type 0. Position ids start at 1. Gemma 2 caps attention
    logits, which sdpa cannot, so PaliGemma 2 is loaded with eager attention.

    Raises:
        TargetError: for a tower, text model or attention implementation it is not written for.
    """

    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)
    texts: ClassVar[tuple[str, ...]] = ("gemma", "gemma2")

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
        super().__init__(model)
        self.encoder = encoder_of(self.tower, self.feature_layer, False, self.grid)
        self._begin = ""
        self._end: int | None = None

    def _token_grid(self) -> tuple[int, int]:
        return self.patches, self.patches

    def refuses(self, compressor: Compressor) -> str | None:
        """Nothing: one picture is one run of a tower without windows."""
        del compressor
        return None

    def preprocessing(self, processor: Any) -> GemmaPreprocessing:  # noqa: ANN401 - untyped
        """The whole picture, resampled to one square; also learns how prompts begin and end."""
        made = super().preprocessing(processor)
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is not None:
            self._begin = str(tokenizer.bos_token)
            ends = tokenizer("\n", add_special_tokens=False)["input_ids"]
            self._end = int(ends[-1]) if ends else None
        return made

    def expand(self, text: str, image: str, layout: Layout) -> str:
        """Image, begin of sequence, question, newline, as the processor writes a prompt."""
        before, _, question = text.partition(image)
        prompt = f"{image * layout.placeholders}{self._begin}{question.removeprefix(' ')}"
        return f"{before}{prompt}\n"

    def positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Position ids from 1."""
        return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0) + 1}

    def extras(self, ids: Tensor, mask: Tensor, answers: int | None = None) -> dict[str, Tensor]:
        """Token types: 0 for the prefix, 1 for answers.

        Args:
            ids: ``[B, L]``.
            mask: ``[B, L]``.
            answers: trailing columns that are answers; None to go by the newline that ends a
                prompt.

        Raises:
            TargetError: without `answers`, if more than that newline stands behind the image.
        """
        del mask
        length = ids.shape[1]
        if answers is None:
            answers = length - 1 - self._last_of_prompt(ids)
        types = torch.zeros_like(ids)
        types[:, length - answers :] = 1
        return {"token_type_ids": types}

    def _last_of_prompt(self, ids: Tensor) -> int:
        found = (ids == self._end).nonzero() if self._end is not None else ids.new_zeros(0, 2)
        columns = torch.unique(found[:, 1])
        if len(found) != len(ids) or len(columns) != 1:
            raise TargetError(
                "paligemma: rows hold "
                f"{torch.bincount(found[:, 0], minlength=len(ids)).tolist()} newlines, in columns "
                f"{columns.tolist()}; the prompt ends at its one newline and answers, which it may "
                "not see, begin behind it: leave newlines out of questions and answers"
            )
        return int(columns[0])

    def project_tokens(self, features: Tensor) -> Tensor:
        """Through the linear layer."""
        projected: Tensor = self.projector(features)
        return projected

    def logits(self, hidden: Tensor) -> Tensor:
        """With Gemma 2's cap."""
        logits = super().logits(hidden)
        cap = getattr(self.text.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap
