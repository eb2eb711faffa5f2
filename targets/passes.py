"""Forward passes of a loaded model: what answers and views are made of.

The vision tower runs once per call, and no module runs that the result does not need.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from targets.base import (
    Continuation,
    Generation,
    PathMargins,
    Ranking,
    TowerLayer,
    VisionOutput,
)
from targets.compression.base import Compressor, Stage
from targets.compression.pipeline import parts_of
from targets.compression.session import CompressionSession, Mode, RankingReached, compress
from targets.compression.trace import Forced
from targets.decoding.assembly import Asked, assemble
from targets.decoding.base import Decoding
from targets.decoding.run import DecodingRun
from targets.decoding.search import Ends
from targets.errors import TargetError
from targets.families.base import Family
from targets.families.vision import VisionPass
from targets.preprocessing import Layout, Preprocessing
from targets.prompts import Dialogue, Prompt, PromptBook, Size
from targets.soundness import FiniteLogits, without_nan

RELAX = 1.0
"""Temperature of the straight-through relaxation, in units of the log-score."""


class Passes:
    """Everything that runs a model.

    Args:
        family: the adapter around the model.
        preprocess: pixels to the tower's input.
        prompts: texts to ids.
    """

    def __init__(self, family: Family, preprocess: Preprocessing, prompts: PromptBook) -> None:
        self.family, self.preprocess, self.prompts = family, preprocess, prompts
        self._layout = functools.lru_cache(maxsize=64)(preprocess.layout)

    def inputs(
        self, images: Tensor, compressor: Compressor | None = None
    ) -> tuple[dict[str, Tensor], Layout, Size]:
        """What the model takes of pictures, how its tokens lie in them, and their size.

        A compressor that acts on pixels acts here.
        """
        images = images.to(self.family.device)
        for one in () if compressor is None else parts_of(compressor):
            images = one.shrink(images)
        size = (images.shape[-2], images.shape[-1])
        return self.preprocess.inputs(images), self.layout(size), size

    def layout(self, size: Size) -> Layout:
        """The visual tokens of a picture of this height and width."""
        return self._layout(size)  # attacks ask at every step

    def encode(self, images: Tensor) -> VisionOutput:
        """Patch features and the head-mean attention that marks them."""
        inputs, layout, _ = self.inputs(images)
        vision = self.family.encode(inputs, [layout] * len(images))
        return VisionOutput(vision.patches, vision.attention().mean(1))

    def tower_layers(
        self, images: Tensor, numbers: Sequence[int], *, normalised: bool = False
    ) -> tuple[TowerLayer, ...]:
        """Layers of the vision tower, −1 the last; see `targets.base.EncoderView`."""
        wanted = self._tower_numbers(numbers)
        vision = self._tower(images, wanted)
        norm = self.family.final_norm() if normalised else None
        found = {
            number: TowerLayer(vision.hidden(number, norm), vision.attention(number).mean(1))
            for number in set(wanted)
        }
        return tuple(found[number] for number in wanted)

    def tower_values(
        self,
        images: Tensor,
        numbers: Sequence[int],
        *,
        normalised: bool = False,
        smoothing: int = 0,
        keys: int = -1,
    ) -> tuple[Tensor, ...]:
        """Value features of layers of the tower; see `targets.base.EncoderView`."""
        wanted = self._tower_numbers(numbers)
        by = self._tower_numbers([keys])[0]
        vision = self._tower(images, [*wanted, by] if smoothing else wanted)
        norm = self.family.final_norm() if normalised else None
        return tuple(vision.values(number, norm, smoothing=smoothing, keys=by) for number in wanted)

    def _tower(self, images: Tensor, layers: Sequence[int]) -> VisionPass:
        """The tower, run as far as these layers go."""
        inputs, layout, _ = self.inputs(images)
        layouts = [layout] * len(images)
        return self.family.encode(inputs, layouts, sorted(set(layers)), features=False)

    def _tower_numbers(self, numbers: Sequence[int]) -> list[int]:
        """Layers of the tower counted from 0."""
        depth = self.family.tower_depth
        wrong = [number for number in numbers if not -depth <= number < depth]
        if wrong or not numbers:
            raise TargetError(
                f"vision tower layers are {list(numbers)}; this tower has {depth}, so they are "
                f"from {-depth} to {depth - 1}, at least one"
            )
        return [number % depth for number in numbers]

    def project(self, features: Tensor) -> Tensor:
        """Token features ``[B, V, r · D]`` to the width of the language model."""
        return self.family.project_tokens(features.to(self.family.dtype))

    def concepts(self, texts: Sequence[str]) -> Tensor:
        """Mean unit input embedding of each text's tokens, ``[n, D]``."""
        table = self.family.model.get_input_embeddings()
        rows = []
        with torch.no_grad():
            for text in texts:
                ids = torch.tensor(self.prompts.words(text), device=self.family.device)
                rows.append(torch.nn.functional.normalize(table(ids).float(), dim=-1).mean(0))
        return torch.stack(rows)

    def rank(
        self,
        images: Tensor,
        questions: Sequence[str],
        compressor: Compressor,
        seeds: Sequence[int] | None = None,
    ) -> Ranking:
        """Rank the visual tokens, running nothing behind the ranking point."""
        _one_each(images, questions)
        compressor = self.ready(images, questions, compressor, seeds)
        session = self._session(compressor, "rank", seeds)
        with session, contextlib.suppress(RankingReached):
            inputs, layout, size = self.inputs(images, compressor)
            self._run(self.prompts.prompt(questions, layout, size), inputs)
        return session.trace.ranking()

    def ready(
        self,
        images: Tensor,
        questions: Sequence[str],
        compressor: Compressor,
        seeds: Sequence[int] | None = None,
    ) -> Compressor:
        """The compressor as a session on these pictures needs it; see `Compressor.foresee`."""
        own = (0,) * len(images) if seeds is None else tuple(seeds)
        layout = self.layout((images.shape[-2], images.shape[-1]))
        return compressor.foresee(_Preview(self, questions, own, layout), images, own)

    def answer_logprobs(
        self,
        images: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        compressor: Compressor | None = None,
        *,
        seeds: Sequence[int] | None = None,
        relax: float | None = None,
        kept: Forced = None,
        decoding: Decoding | None = None,
        draws: Sequence[int] | None = None,
    ) -> tuple[Tensor, Dialogue]:
        """Teacher-forced log-probabilities ``[B, A, vocabulary]`` and the tokens they are for.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B prompts.
            answers: B answers.
            compressor: None for all visual tokens.
            seeds: one per sample.
            relax: see `targets.compression.session.compress`.
            kept: see there.
            decoding: a method whose distribution is wanted; None for the model's own.
            draws: one per sample, for a method that draws.
        """
        _one_each(images, questions)
        if decoding is not None:
            asked = Asked(images, questions, answers, compressor, kept, seeds, draws, relax)
            run = assemble(self, decoding, asked)
            return run.forced(), run.dialogue
        inputs, layout, size = self.inputs(images, compressor)
        talk = self.prompts.dialogue(questions, answers, layout, size)
        if compressor is None:
            return self._logprobs(self._run(talk, inputs), talk), talk
        compressor = self.ready(images, questions, compressor, seeds)
        with self._session(compressor, "hard", seeds, talk, relax, kept):
            hidden = self._run(talk, inputs)
        return self._logprobs(hidden, talk), talk

    def answer_logprob(
        self,
        images: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        compressor: Compressor | None,
        kept: Forced,
        seeds: Sequence[int] | None,
        decoding: Decoding | None = None,
        draws: Sequence[int] | None = None,
    ) -> Tensor:
        """Log-probability of each whole answer, ``[B]``."""
        logprobs, talk = self.answer_logprobs(
            images,
            questions,
            answers,
            compressor,
            seeds=seeds,
            kept=kept,
            decoding=decoding,
            draws=draws,
        )
        return without_nan(_of_targets(logprobs, talk), "the log-probability of an answer")

    def nll(
        self,
        images: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        compressor: Compressor | None = None,
        *,
        straight_through: bool = False,
        decoding: Decoding | None = None,
        draws: Sequence[int] | None = None,
    ) -> Tensor:
        """Mean negative log-likelihood of the answer's tokens, ``[B]``."""
        relax = RELAX if straight_through and compressor is not None else None
        logprobs, talk = self.answer_logprobs(
            images, questions, answers, compressor, relax=relax, decoding=decoding, draws=draws
        )
        return -_of_targets(logprobs, talk) / talk.real.sum(1)

    def full_and_rank(
        self,
        images: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        compressor: Compressor,
        decoding: Decoding | None = None,
        draws: Sequence[int] | None = None,
    ) -> tuple[Tensor, Dialogue, Ranking]:
        """`answer_logprobs` with all tokens and `rank`, from one forward pass.

        Two, where a compressor works inside the vision tower (its ranking needs another tower), and
        where the model decodes in some way.
        """
        _one_each(images, questions)
        inside = any(one.stage is Stage.TOWER for one in parts_of(compressor))
        if inside or decoding is not None:
            logprobs, talk = self.answer_logprobs(
                images, questions, answers, decoding=decoding, draws=draws
            )
            return logprobs, talk, self.rank(images, questions, compressor)
        inputs, layout, size = self.inputs(images)
        talk = self.prompts.dialogue(questions, answers, layout, size)
        compressor = self.ready(images, questions, compressor)
        session = self._session(compressor, "observe", None, talk)
        with session:
            hidden = self._run(talk, inputs)
        return self._logprobs(hidden, talk), talk, session.trace.ranking()

    def path_margins(
        self,
        images: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        compressor: Compressor,
        *,
        full_gradient: bool = True,
        decoding: Decoding | None = None,
        draws: Sequence[int] | None = None,
    ) -> PathMargins:
        """Margins with all tokens and compressed; see `targets.base.WhiteBoxView`.

        The paths share the vision tower, unless the compressor changes what it sees or does, or the
        model decodes in some way.
        """
        _one_each(images, questions)
        apart = any(one.stage in (Stage.PIXELS, Stage.TOWER) for one in parts_of(compressor))
        if apart or decoding is not None:
            how: dict[str, Any] = {"decoding": decoding, "draws": draws}
            with torch.set_grad_enabled(full_gradient and torch.is_grad_enabled()):
                full = answer_margin(*self.answer_logprobs(images, questions, answers, **how))
            through = self.answer_logprobs(
                images, questions, answers, compressor, relax=RELAX, **how
            )
            return PathMargins(full, answer_margin(*through))
        inputs, layout, size = self.inputs(images)
        talk = self.prompts.dialogue(questions, answers, layout, size)

        def run(encoded: Any) -> Tensor:  # noqa: ANN401 - of transformers
            steps = talk.targets.shape[1] - 1
            hidden = self.family.run(talk.ids, talk.mask, encoded, inputs, steps)
            return answer_margin(self._logprobs(hidden, talk), talk)

        compressor = self.ready(images, questions, compressor)
        with self._session(compressor, "hard", None, talk, RELAX):
            encoded = self.family.encoded(inputs)
            compressed = run(encoded)
        with torch.set_grad_enabled(full_gradient and torch.is_grad_enabled()):
            return PathMargins(run(encoded), compressed)

    def option_scores(
        self,
        images: Tensor,
        questions: Sequence[str],
        options: Sequence[str],
        compressor: Compressor | None,
        seeds: Sequence[int] | None,
        decoding: Decoding | None = None,
        draws: Sequence[int] | None = None,
    ) -> Tensor:
        """Log-probability of each option as the whole answer, ``[B, options]``."""
        if not options:
            raise TargetError("option_scores needs at least one option")
        columns = []
        for option in options:
            answers = (option,) * len(questions)
            logprobs, talk = self.answer_logprobs(
                images,
                questions,
                answers,
                compressor,
                seeds=seeds,
                decoding=decoding,
                draws=draws,
            )
            columns.append(_of_targets(logprobs, talk))
        return without_nan(torch.stack(columns, 1), "the score of an option")

    def option_logprobs(
        self,
        images: Tensor,
        questions: Sequence[str],
        options: Sequence[Sequence[str]],
        compressor: Compressor | None = None,
        *,
        straight_through: bool = False,
        decoding: Decoding | None = None,
        draws: Sequence[int] | None = None,
    ) -> Tensor:
        """Log-probability of each sample's own options, live; see `targets.base.WhiteBoxView`."""
        counts = {len(one) for one in options}
        if len(options) != len(questions) or len(counts) != 1 or 0 in counts:
            raise TargetError(
                f"{len(questions)} questions with options of {sorted(counts)} answers; every "
                "sample needs options, and all the same number"
            )
        relax = RELAX if straight_through and compressor is not None else None
        columns = list(zip(*options, strict=True))
        first, told = self._first_tokens(images, questions, columns, compressor)
        whole: list[Tensor] = []
        for column in columns:
            logprobs, talk = self.answer_logprobs(
                images, questions, column, compressor, relax=relax, decoding=decoding, draws=draws
            )
            if not whole:
                short = logprobs[:, 0].gather(1, first)
            if bool(told.all()):
                return short
            whole.append(_of_targets(logprobs, talk))
        return torch.where(told.to(short.device)[:, None], short, torch.stack(whole, 1))

    def option_passes(
        self,
        images: Tensor,
        questions: Sequence[str],
        options: Sequence[Sequence[str]],
        compressor: Compressor | None = None,
    ) -> int:
        """How many passes `option_logprobs` takes of these: one for all options, or for each."""
        columns = list(zip(*options, strict=True))
        _, told = self._first_tokens(images, questions, columns, compressor)
        return 1 if bool(told.all()) else len(columns)

    def _first_tokens(
        self,
        images: Tensor,
        questions: Sequence[str],
        columns: Sequence[Sequence[str]],
        compressor: Compressor | None,
    ) -> tuple[Tensor, Tensor]:
        """First token of each option ``[B, O]``, and whether they tell its options apart ``[B]``.

        Decided row by row, so that a sample's scores do not depend on its neighbours. A single
        option is taken whole: there is nothing to tell it apart from.
        """
        size, layout = self._shape(images, compressor)
        talks = [self.prompts.dialogue(questions, column, layout, size) for column in columns]
        first = torch.stack([talk.targets[:, 0] for talk in talks], 1)
        return first, torch.tensor([1 < len(set(row)) == len(row) for row in first.tolist()])

    def _shape(self, images: Tensor, compressor: Compressor | None) -> tuple[Size, Layout]:
        """Size and layout of pictures behind a compressor that acts on pixels."""
        with torch.no_grad():
            for one in () if compressor is None else parts_of(compressor):
                images = one.shrink(images)
        size = (images.shape[-2], images.shape[-1])
        return size, self.layout(size)

    def generate(
        self,
        images: Tensor,
        questions: Sequence[str],
        session: CompressionSession | None,
        max_new_tokens: int,
        compressor: Compressor | None = None,
    ) -> Tensor:
        """Greedy answers as ids ``[B, ≤ max_new_tokens]``, inside a session if one is given.

        Raises:
            NonFiniteError: if a token would have been chosen by NaN or infinity.
        """
        from transformers import GenerationConfig

        _one_each(images, questions)
        inputs, layout, size = self.inputs(images, compressor)
        prompt = self.prompts.prompt(questions, layout, size)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(self.ends),
            pad_token_id=self.prompts.pad,
        )
        finite = FiniteLogits()

        def run() -> Tensor:
            ids: Tensor = self.family.model.generate(
                input_ids=prompt.ids,
                attention_mask=prompt.mask,
                generation_config=config,
                logits_processor=[finite],
                **self.family.cast(inputs),
                **self.family.extras(prompt.ids, prompt.mask, 0),
            )
            return ids[:, prompt.ids.shape[1] :]

        ids = _inside(session, run)
        finite.require()
        return ids

    def decoder(self, method: Decoding, asked: Asked) -> DecodingRun:
        """A method about to answer; see `decode`."""
        _one_each(asked.images, asked.questions)
        return assemble(self, method, asked)

    def decode(self, run: DecodingRun, max_new_tokens: int) -> Tensor:
        """Answers of a decoding method as ids ``[B, ≤ max_new_tokens]``."""
        return run.generate(Ends(tuple(sorted(self.ends)), self.prompts.pad, max_new_tokens))

    def continuation(
        self,
        images: Tensor,
        questions: Sequence[str],
        length: int,
        compressor: Compressor | None = None,
        decoding: Decoding | None = None,
        draws: Sequence[int] | None = None,
    ) -> Continuation:
        """What the model says greedily, or as it decodes, at most `length` tokens of it."""
        if decoding is None:
            with torch.no_grad():
                session = None
                if compressor is not None:
                    compressor = self.ready(images, questions, compressor)
                    session = self._session(compressor, "hard", None)
                ids = self.generate(images, questions, session, length, compressor)
        else:
            asked = Asked(images, questions, compressor=compressor, draws=draws)
            ids = self.decode(self.decoder(decoding, asked), length)
        real = self.until_end(ids)
        # The model may say its own placeholder for pictures; what follows that cannot be forced.
        holder = (ids == self.family.image_token_id).long()
        return Continuation(ids, real & (holder.cumsum(1) - holder == 0))

    def until_end(self, ids: Tensor) -> Tensor:
        """Which of the generated ids ``[B, A]`` count: all up to the first end token, bool."""
        ended = torch.isin(ids, torch.tensor(sorted(self.ends), device=ids.device)).long()
        return ended.cumsum(1) - ended == 0

    def generation(
        self,
        images: Tensor,
        questions: Sequence[str],
        said: Continuation,
        compressor: Compressor | None = None,
        *,
        straight_through: bool = False,
    ) -> Generation:
        """Distributions and hidden states at each token said; see `targets.base.WhiteBoxView`."""
        _one_each(images, questions)
        inputs, layout, size = self.inputs(images, compressor)
        prompt = self.prompts.prompt(questions, layout, size)
        ids = said.ids.masked_fill(said.ids == self.family.image_token_id, self.prompts.pad)
        talk = Dialogue.of(prompt, ids, said.real)
        relax = RELAX if straight_through and compressor is not None else None
        session = None
        if compressor is not None:
            compressor = self.ready(images, questions, compressor)
            session = self._session(compressor, "hard", None, talk, relax, None)
        hidden = _inside(session, lambda: self._run(talk, inputs))
        hidden = hidden[:, hidden.shape[1] - said.ids.shape[1] :]
        logprobs = self.family.logits(hidden).float().log_softmax(-1)
        end = logprobs[..., sorted(self.ends)].logsumexp(-1)
        return Generation(logprobs, end, hidden, said.real)

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """Tokens at which an answer ends."""
        configured = self.family.model.generation_config.eos_token_id
        more = configured if isinstance(configured, list) else [configured]
        return frozenset({self.prompts.end, *more} - {None})

    def _run(self, prompt: Prompt, inputs: dict[str, Tensor]) -> Tensor:
        encoded = self.family.encoded(inputs)
        answers = prompt.targets.shape[1] - 1 if isinstance(prompt, Dialogue) else 0
        return self.family.run(prompt.ids, prompt.mask, encoded, inputs, answers)

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
        kept: Forced = None,
    ) -> CompressionSession:
        return compress(
            self.family.model,
            compressor,
            family=self.family,
            mode=mode,
            seeds=seeds,
            answer_columns=0 if talk is None else talk.targets.shape[1] - 1,
            relax=relax,
            kept=kept,
        )


@dataclass(frozen=True, slots=True)
class _Preview:
    """See `targets.compression.base.Preview`."""

    passes: Passes
    questions: Sequence[str]
    seeds: Sequence[int]
    layout: Layout

    def rank(self, images: Tensor, compressor: Compressor) -> Ranking:
        """Rank the tokens of n pictures of each sample."""
        times = len(images) // max(1, len(self.questions))
        questions, seeds = tuple(self.questions) * times, tuple(self.seeds) * times
        return self.passes.rank(images, questions, compressor, seeds)


def _inside(session: CompressionSession | None, run: Callable[[], Tensor]) -> Tensor:
    if session is None:
        return run()
    with session:
        return run()


def answer_margin(logprobs: Tensor, talk: Dialogue) -> Tensor:
    """Smallest lead of an answer's tokens over the likeliest other token, ``[B]``.

    Args:
        logprobs: ``[B, A, vocabulary]``.
        talk: the answers.
    """
    targets = talk.targets[..., None]
    others = logprobs.scatter(2, targets, -torch.inf).amax(2)
    lead = logprobs.gather(2, targets).squeeze(2) - others
    return lead.masked_fill(~talk.real, torch.inf).amin(1)


def _of_targets(logprobs: Tensor, talk: Dialogue) -> Tensor:
    """Summed log-probability of the answer's tokens, ``[B]``."""
    each = logprobs.gather(2, talk.targets[..., None]).squeeze(2)
    return (each * talk.real).sum(1)


def _one_each(images: Tensor, questions: Sequence[str]) -> None:
    if len(images) != len(questions):
        raise TargetError(
            f"{len(images)} images with {len(questions)} questions; give one question an image"
        )
