"""Forward passes of a loaded model: what answers and views are made of.

The vision tower runs once per call, and no module runs that the result does not need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from targets.base import Ranking, VisionOutput
from targets.compression.base import Compressor, Seen, Stage
from targets.compression.session import CompressionSession, Mode, RankingReached, compress
from targets.compression.trace import choose, ranking_of
from targets.errors import TargetError
from targets.families.base import Family
from targets.preprocessing import Preprocessor
from targets.prompts import Dialogue, Prompt, PromptBook

RELAX = 1.0
"""Temperature of the straight-through relaxation, in units of the log-score."""


class Passes:
    """Everything that runs a model.

    Args:
        family: the adapter around the model.
        preprocess: pixels to the tower's input.
        prompts: texts to ids.
    """

    def __init__(self, family: Family, preprocess: Preprocessor, prompts: PromptBook) -> None:
        self.family, self.preprocess, self.prompts = family, preprocess, prompts

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised input of the tower, on the model's device."""
        return self.preprocess(images.to(self.family.device))

    def encode(self, images: Tensor) -> VisionOutput:
        """Patch features and the head-mean attention that marks them."""
        vision = self.family.encode(self.pixels(images))
        return VisionOutput(vision.patches, vision.attention().mean(1))

    def rank(
        self,
        images: Tensor,
        questions: Sequence[str],
        compressor: Compressor,
        seeds: Sequence[int] | None = None,
    ) -> Ranking:
        """Rank the visual tokens, running nothing behind the ranking point."""
        _one_each(images, questions)
        family = self.family
        if compressor.stage is not Stage.LAYER:
            return self._rank_before_text(images, compressor, seeds)
        projected = family.project(family.encode(self.pixels(images)))
        session = self._session(compressor, "rank", seeds)
        with session, contextlib.suppress(RankingReached):
            self._run(self.prompts.prompt(questions), projected)
        return session.trace.ranking()

    def _rank_before_text(
        self, images: Tensor, compressor: Compressor, seeds: Sequence[int] | None
    ) -> Ranking:
        family = self.family
        vision = family.encode(self.pixels(images))
        projected = family.project(vision)
        count = compressor.budget(projected.shape[1])
        rows = (0,) * len(images) if seeds is None else tuple(seeds)
        seen = Seen(projected, count, rows)
        if compressor.stage is Stage.VISION:
            seen = replace(
                seen,
                attention=vision.attention(),
                query=vision.query,
                keys=vision.patch_keys,
                vision=vision,
            )
        return ranking_of(*choose(compressor, seen), seen)

    def answer_logprobs(
        self,
        images: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        compressor: Compressor | None = None,
        *,
        seeds: Sequence[int] | None = None,
        relax: float | None = None,
    ) -> tuple[Tensor, Dialogue]:
        """Teacher-forced log-probabilities ``[B, A, vocabulary]`` and the tokens they are for.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B prompts.
            answers: B answers.
            compressor: None for all visual tokens.
            seeds: one per sample.
            relax: see `targets.compression.session.compress`.
        """
        _one_each(images, questions)
        talk = self.prompts.dialogue(questions, answers)
        if compressor is None:
            return self._logprobs(self._run(talk, self._projected(images)), talk), talk
        with self._session(compressor, "hard", seeds, talk, relax):
            hidden = self._run(talk, self._projected(images))
        return self._logprobs(hidden, talk), talk

    def nll(
        self,
        images: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        compressor: Compressor | None = None,
        *,
        straight_through: bool = False,
    ) -> Tensor:
        """Mean negative log-likelihood of the answer's tokens, ``[B]``."""
        relax = RELAX if straight_through and compressor is not None else None
        logprobs, talk = self.answer_logprobs(images, questions, answers, compressor, relax=relax)
        return -_of_targets(logprobs, talk) / talk.real.sum(1)

    def full_and_rank(
        self,
        images: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        compressor: Compressor,
    ) -> tuple[Tensor, Dialogue, Ranking]:
        """`answer_logprobs` with all tokens and `rank`, from one forward pass."""
        _one_each(images, questions)
        talk = self.prompts.dialogue(questions, answers)
        session = self._session(compressor, "observe", None, talk)
        with session:
            hidden = self._run(talk, self._projected(images))
        return self._logprobs(hidden, talk), talk, session.trace.ranking()

    def option_scores(
        self,
        images: Tensor,
        questions: Sequence[str],
        options: Sequence[str],
        compressor: Compressor | None,
        seeds: Sequence[int] | None,
    ) -> Tensor:
        """Log-probability of each option as the whole answer, ``[B, options]``."""
        if not options:
            raise TargetError("option_scores needs at least one option")
        columns = []
        for option in options:
            answers = (option,) * len(questions)
            logprobs, talk = self.answer_logprobs(
                images, questions, answers, compressor, seeds=seeds
            )
            columns.append(_of_targets(logprobs, talk))
        return torch.stack(columns, 1)

    def generate(
        self,
        images: Tensor,
        questions: Sequence[str],
        session: CompressionSession | None,
        max_new_tokens: int,
    ) -> Tensor:
        """Greedy answers as ids ``[B, ≤ max_new_tokens]``, inside a session if one is given."""
        from transformers import GenerationConfig

        _one_each(images, questions)
        prompt = self.prompts.prompt(questions)
        ends = {self.prompts.end}
        configured = self.family.model.generation_config.eos_token_id
        ends |= set(configured if isinstance(configured, list) else [configured]) - {None}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(ends),
            pad_token_id=self.prompts.pad,
        )

        def run() -> Tensor:
            ids: Tensor = self.family.model.generate(
                input_ids=prompt.ids,
                attention_mask=prompt.mask,
                pixel_values=self.pixels(images).to(self.family.dtype),
                generation_config=config,
            )
            return ids[:, prompt.ids.shape[1] :]

        return _inside(session, run)

    def _projected(self, images: Tensor) -> Tensor:
        return self.family.project(self.family.encode(self.pixels(images)))

    def _run(self, prompt: Prompt, projected: Tensor) -> Tensor:
        return self.family.run(prompt.ids, prompt.mask, prompt.positions, projected)

    def _logprobs(self, hidden: Tensor, talk: Dialogue) -> Tensor:
        tail = hidden[:, hidden.shape[1] - talk.targets.shape[1] :]
        return self.family.logits(tail).float().log_softmax(-1)

    def _session(
        self,
        compressor: Compressor,
        mode: Mode,
        seeds: Sequence[int] | None,
        talk: Dialogue | None = None,
        relax: float | None = None,
    ) -> CompressionSession:
        return compress(
            self.family.model,
            compressor,
            family=self.family,
            mode=mode,
            seeds=seeds,
            answer_columns=0 if talk is None else talk.targets.shape[1] - 1,
            relax=relax,
        )


def _inside(session: CompressionSession | None, run: Callable[[], Tensor]) -> Tensor:
    if session is None:
        return run()
    with session:
        return run()


def _of_targets(logprobs: Tensor, talk: Dialogue) -> Tensor:
    """Summed log-probability of the answer's tokens, ``[B]``."""
    each = logprobs.gather(2, talk.targets[..., None]).squeeze(2)
    return (each * talk.real).sum(1)


def _one_each(images: Tensor, questions: Sequence[str]) -> None:
    if len(images) != len(questions):
        raise TargetError(
            f"{len(images)} images with {len(questions)} questions; give one question an image"
        )
