"""A large vision-language model under test."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from targets import loading
from targets.base import ImageView, Knowledge, Surrogate, WhiteBoxView
from targets.compression.base import Compressor, Selection
from targets.compression.session import compress
from targets.compression.trace import Forced
from targets.decoding.assembly import Asked
from targets.decoding.base import Decoding
from targets.errors import TargetError
from targets.families import family_of
from targets.families.base import Family
from targets.footprint import Footprint, footprint
from targets.pace import Pace, pace
from targets.passes import Passes
from targets.preprocessing import Layout
from targets.prompts import PromptBook
from targets.views import make_view

MAX_NEW_TOKENS = 16
"""Most tokens of an answer, unless asked for more: enough for short answers."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Answers to a batch.

    Attributes:
        texts: B answers without special tokens and surrounding space.
        kept: bool ``[B, V]``, tokens left after the last cut of the prefill; None without a
            compressor. Of merging compressors these are the ones taken over as they are.
        score: ``[B, V]``, what the first cut chose by; None without a compressor.
        seconds: wall time of the whole batch.
        left: ``[B]`` visual tokens in the last layer of the language model, merged ones included;
            None without a compressor.
        selection: B selections that `LVLM.answer` takes back as `kept`; None without a compressor.
        generated: tokens of each answer, the end token included where it came.
    """

    texts: tuple[str, ...]
    kept: Tensor | None
    score: Tensor | None
    seconds: float
    selection: tuple[Selection, ...] | None = None
    left: Tensor | None = None
    generated: tuple[int, ...] = ()


class LVLM:
    """A loaded model: answers, option scores, and the views an attack may have of it.

    Use `LVLM.load`, or give a model and a processor that are already in memory.

    Args:
        model: of a supported family; its weights are frozen and it is put into evaluation mode.
        processor: the model's own.
        identity: what exactly was loaded.

    Raises:
        TargetError: if the family is not supported, or processor and model disagree.
    """

    capabilities: frozenset[str] = frozenset(
        {"gradients", "visual_tokens", "option_scores", "generate"}
    )

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        processor: Any,  # noqa: ANN401
        identity: dict[str, str] | None = None,
    ) -> None:
        model.eval().requires_grad_(False)
        family = family_of(model)
        preprocess = family.preprocessing(processor)
        self._passes = Passes(family, preprocess, PromptBook(processor, family))
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._footprint = functools.lru_cache(maxsize=64)(self._estimate)
        self.identity: dict[str, str] = dict(identity or {"class": type(model).__name__})

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        device_map: str = "single",
        attn_implementation: str = "auto",
        trust_remote_code: bool = False,
    ) -> LVLM:
        """Load a checkpoint; safetensors only.

        Args:
            source: local folder or hub id.
            revision: commit, tag or branch of a hub id.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
            dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``.
            device_map: ``single``, ``balanced`` (over all GPUs) or ``auto``.
            attn_implementation: ``auto`` (flash_attention_2 where it runs, else sdpa), ``eager``,
                ``sdpa`` or ``flash_attention_2``.
            trust_remote_code: run code that comes with the checkpoint; off unless asked for.

        Raises:
            TargetError: if it cannot be loaded as asked; the message says why.
        """
        place = loading.resolve_device(device)
        kind = loading.resolve_dtype(dtype, place)
        attention = loading.resolve_attention(attn_implementation, place, kind)
        model, processor = loading.load(
            source,
            revision=revision,
            device=place,
            dtype=kind,
            attention=attention,
            asked=attn_implementation,
            spread=loading.spreads(device_map, source, place),
            trust_remote_code=trust_remote_code,
        )
        return cls(model, processor, loading.identity(source, model, revision))

    def around(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        identity: dict[str, str],
    ) -> LVLM:
        """Another model of the same architecture with this one's processor.

        Args:
            model: with other weights; frozen here, as in the constructor.
            identity: what it is.
        """
        return LVLM(model, self._processor, identity)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._passes.family.device

    @property
    def family(self) -> Family:
        """The adapter around the model."""
        return self._passes.family

    @property
    def passes(self) -> Passes:
        """Forward passes behind answers and views: for those who guard the model, not attackers."""
        return self._passes

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of a picture that suits the model."""
        return self._passes.family.image_size

    def layout(self, size: tuple[int, int]) -> Layout:
        """The visual tokens of a picture of this height and width."""
        return self._passes.layout(size)

    def footprint(self, size: tuple[int, int]) -> Footprint:
        """Roughly what one picture of this height and width needs of memory."""
        return self._footprint(size)

    def _estimate(self, size: tuple[int, int]) -> Footprint:
        blank = torch.zeros(1, 3, *size, device=self.device)
        with torch.no_grad():
            inputs, layout, _ = self._passes.inputs(blank)
        return footprint(self.family, inputs, layout.placeholders)

    def answer(
        self,
        images: Tensor,
        questions: Sequence[str],
        *,
        compressor: Compressor | None = None,
        kept: Forced = None,
        seeds: Sequence[int] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        decoding: Decoding | None = None,
        draws: Sequence[int] | None = None,
    ) -> Answered:
        """Answer one question about each image, greedily unless told otherwise.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B texts.
            compressor: what drops visual tokens; None for none.
            kept: a selection to impose instead of the compressor's own, bool ``[B, V]`` or the
                `selection` of an earlier answer. With a bool set VisionZip merges the other tokens
                by its own rule on *these* images; a `Selection` brings its assignment along.
            seeds: one per sample, for compressors that draw.
            max_new_tokens: most tokens of an answer, ≥ 1.
            decoding: how tokens are chosen; None is greedy decoding.
            draws: one per sample, for a decoding method that draws; None is 0 for all.

        Raises:
            TargetError: on shapes that do not fit, `kept` without a compressor, or a decoding
                method that cannot work on this model or with this compressor.
        """
        if kept is not None and compressor is None:
            raise TargetError("kept forces a compressor's selection; name the compressor too")
        started = time.perf_counter()
        session = None
        if decoding is not None:
            asked = Asked(images, questions, None, compressor, kept, seeds, draws)
            run = self._passes.decoder(decoding, asked)
            session = run.branches[0].session
            ids = self._passes.decode(run, max_new_tokens)
        else:
            if compressor is not None:
                family = self._passes.family
                with torch.no_grad():
                    compressor = self._passes.ready(images, questions, compressor, seeds)
                session = compress(family.model, compressor, family=family, kept=kept, seeds=seeds)
            with torch.no_grad():
                ids = self._passes.generate(images, questions, session, max_new_tokens, compressor)
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts = tuple(text.strip() for text in texts)
        generated = tuple(self._passes.until_end(ids).sum(1).tolist())
        seconds = time.perf_counter() - started
        if session is None or session.trace.selection is None:
            return Answered(texts, None, None, seconds, generated=generated)
        selection = session.trace.selection
        rows = tuple(selection.row(index) for index in range(len(texts)))
        trace = session.trace
        left = trace.tokens[max(trace.tokens)] if trace.tokens else None
        return Answered(texts, trace.kept, trace.score, seconds, rows, left, generated)

    def option_scores(
        self,
        images: Tensor,
        questions: Sequence[str],
        options: Sequence[str],
        *,
        compressor: Compressor | None = None,
        seeds: Sequence[int] | None = None,
        decoding: Decoding | None = None,
        draws: Sequence[int] | None = None,
    ) -> Tensor:
        """How likely each option is as the whole answer, end token included.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B texts.
            options: answers to compare; the same for all samples.
            compressor: what drops visual tokens; None for none.
            seeds: one per sample, for compressors that draw.
            decoding: the method by whose distribution; None is the model's own.
            draws: one per sample, for a method that draws.

        Returns:
            Log-probabilities ``[B, options]``.
        """
        with torch.no_grad():
            return self._passes.option_scores(
                images, questions, options, compressor, seeds, decoding, draws
            )

    def answer_logprob(
        self,
        images: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        *,
        compressor: Compressor | None = None,
        kept: Forced = None,
        seeds: Sequence[int] | None = None,
        decoding: Decoding | None = None,
        draws: Sequence[int] | None = None,
    ) -> Tensor:
        """Log-probability of an answer to each question, end token included, ``[B]``.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B texts.
            answers: B texts, teacher-forced.
            compressor: what drops visual tokens; None for none.
            kept: a selection to impose, as in `answer`.
            seeds: one per sample, for compressors that draw.
            decoding: the method by whose distribution; None is the model's own.
            draws: one per sample, for a method that draws.
        """
        with torch.no_grad():
            return self._passes.answer_logprob(
                images, questions, answers, compressor, kept, seeds, decoding, draws
            )

    def measure(
        self,
        images: Tensor,
        questions: Sequence[str],
        *,
        compressor: Compressor | None = None,
        steps: int = 8,
    ) -> Pace:
        """Time a prefill and some decoding steps, and count what they hold.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B texts.
            compressor: what drops visual tokens; None for none.
            steps: decoding steps after the prefill, ≥ 1.
        """
        return pace(self._passes, images, questions, compressor, steps)

    def view(
        self,
        knowledge: Knowledge,
        compressor: Compressor | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        decoding: Decoding | None = None,
        draw: int = 0,
    ) -> ImageView:
        """What an attacker with this knowledge may use; anything else raises `KnowledgeError`.

        Args:
            knowledge: the attack's.
            compressor: the one in use, if the attacker knows it or asks the target that has it.
                Without it a white-box view has no `rank` and no compressed path of its own.
            max_new_tokens: most tokens of an answer to `ask`.
            decoding: how answers are decoded, and by which distribution they are scored; None is
                the model's own way. What shows no answer (`encode`, `rank` …) is as without it.
            draw: of a decoding method that draws, the same for all samples.

        Raises:
            KnowledgeError: for knowledge under which nothing of this model is granted, or
                ``compressed`` without a compressor.
        """

        def ask(images: Tensor, questions: tuple[str, ...], compressed: bool) -> tuple[str, ...]:
            using = compressor if compressed else None
            return self.answer(
                images,
                questions,
                compressor=using,
                max_new_tokens=max_new_tokens,
                decoding=decoding,
                draws=None if decoding is None else [draw] * len(images),
            ).texts

        return make_view(self._passes, Knowledge(knowledge), compressor, ask, decoding, draw)

    def surrogate(self, name: str) -> Surrogate:
        """This model as another attacker's surrogate: everything it computes, no compressor."""
        view = self.view(Knowledge.WHITE_BOX)
        return Surrogate(name, len(self.family.layers), self.image_size, cast(WhiteBoxView, view))
