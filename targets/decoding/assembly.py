"""Put the branches of a decoding method together for a batch of questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from targets.compression.base import Compressor, Stage
from targets.compression.pipeline import parts_of
from targets.compression.session import CompressionSession, compress
from targets.compression.trace import Forced
from targets.decoding.base import Decoding, View
from targets.decoding.branch import Branch
from targets.decoding.run import DecodingRun
from targets.errors import TargetError
from targets.families.base import Family
from targets.prompts import Dialogue, Prompt

if TYPE_CHECKING:
    from targets.passes import Passes


@dataclass(frozen=True, slots=True)
class Asked:
    """A batch of questions to a model that decodes in some way.

    Attributes:
        images: ``[B, 3, H, W]`` in [0, 1].
        questions: B texts.
        answers: B texts to be scored; None to have them generated.
        compressor: None for all visual tokens.
        kept: a selection to impose on every pass over the images as they are; disturbed ones are
            ranked anew.
        seeds: one per sample, for the compressor.
        draws: one per sample, for the decoding method; None is 0 for all.
        relax: see `targets.compression.session.compress`.
    """

    images: Tensor
    questions: Sequence[str]
    answers: Sequence[str] | None = None
    compressor: Compressor | None = None
    kept: Forced = None
    seeds: Sequence[int] | None = None
    draws: Sequence[int] | None = None
    relax: float | None = None


def assemble(passes: Passes, method: Decoding, asked: Asked) -> DecodingRun:
    """Branches in front of their prompts, the main one first; a dialogue has answers to score.

    Raises:
        TargetError: if the method cannot work on the model or with the compressor, or was given
            another number of draws than samples.
    """
    check(method, passes.family, asked.compressor)
    method = method.foresee(passes)
    if asked.compressor is not None:
        ready = passes.ready(asked.images, asked.questions, asked.compressor, asked.seeds)
        asked = dataclasses.replace(asked, compressor=ready)
    number = len(asked.images)
    draws = (0,) * number if asked.draws is None else tuple(asked.draws)
    if len(draws) != number:
        raise TargetError(f"decoding {method.name}: {number} images but {len(draws)} draws")
    inputs, layout, size = passes.inputs(asked.images, asked.compressor)
    talk = None
    if asked.answers is not None:
        talk = passes.prompts.dialogue(asked.questions, asked.answers, layout, size)
    branches = []
    for view in (None, *method.views()):
        questions = asked.questions
        if view is not None and view.question is not None:
            questions = [view.question(question) for question in questions]
        prompt = passes.prompts.prompt(questions, layout, size)
        if view is not None and not view.image:
            prompt = bare(prompt, passes.family.image_token_id, passes.prompts.pad)
        if talk is not None:
            prompt = Dialogue.of(prompt, talk.targets, talk.real)
        given = inputs if view is None else disturbed(inputs, view, draws)
        branches.append(_branch(passes.family, method, asked, view, prompt, given))
    return DecodingRun(method, passes.family, branches, draws)


def _branch(
    family: Family,
    method: Decoding,
    asked: Asked,
    view: View | None,
    prompt: Prompt,
    inputs: dict[str, Tensor],
) -> Branch:
    if view is None:
        depths = method.depths(len(family.layers))
        session = _session(family, asked, prompt, asked.kept)
        rule = method.attention()
        return Branch(family, prompt, inputs, session, rule, depths, method.looks_at_entry)
    rule = None if view.attention is None else view.attention()
    if not view.image:
        return Branch(family, prompt, None, None, rule)
    kept = asked.kept if view.disturb is None else None
    return Branch(family, prompt, inputs, _session(family, asked, prompt, kept), rule)


def _session(
    family: Family, asked: Asked, prompt: Prompt, kept: Forced
) -> CompressionSession | None:
    if asked.compressor is None:
        return None
    answers = prompt.targets.shape[1] - 1 if isinstance(prompt, Dialogue) else 0
    return compress(
        family.model,
        asked.compressor,
        family=family,
        kept=kept,
        seeds=asked.seeds,
        answer_columns=answers,
        relax=asked.relax,
    )


def check(method: Decoding, family: Family, compressor: Compressor | None = None) -> None:
    """Refuse what a method cannot do on a model, before anything runs.

    Raises:
        TargetError: naming the method.
    """
    reason, depth = method.refuses(family), len(family.layers)
    wrong = [one for one in method.depths(depth) if not 0 <= one <= depth]
    if reason is None and wrong:
        reason = (
            f"it looks at depths {wrong}, but the language model has depths 0 (its input) to "
            f"{depth} (its last layer)"
        )
    if reason is None and method.beams < 1:
        reason = f"beams is {method.beams}; give 1 for greedy decoding, or more"
    if reason is None and compressor is not None:
        reason = taken(method, compressor)
    if reason is not None:
        raise TargetError(f"decoding {method.name}: {reason}")


def taken(method: Decoding, compressor: Compressor) -> str | None:
    """Why a method cannot change attention because a compressor does; None if it can."""
    inside = [one.name for one in parts_of(compressor) if one.stage is Stage.ATTENTION]
    rules = (method.attention(), *(one.attention for one in method.views()))
    if not inside or all(rule is None for rule in rules):
        return None
    return (
        f"it changes the attention of the language model, which compressor {inside[0]} has taken "
        "over; use another compressor"
    )


def disturbed(inputs: dict[str, Tensor], view: View, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Image arguments with their pixels changed, each sample by its own seed."""
    if view.disturb is None:
        return inputs
    made = dict(inputs)
    for name, value in inputs.items():
        # Tiles and patches of a sample stand together, and samples have equally many.
        if name.startswith("pixel_values") and value.is_floating_point():
            apart = value.reshape(len(seeds), -1, *value.shape[1:])
            made[name] = view.disturb(apart, seeds).to(value.dtype).reshape(value.shape)
    return made


def bare(prompt: Prompt, holder: int, pad: int) -> Prompt:
    """The same prompts without their image tokens, left-padded.

    Words that a processor writes around a picture stay.

    Args:
        prompt: B prompts.
        holder: id of the placeholders.
        pad: id of padding.
    """
    keep = (prompt.ids != holder) & prompt.mask.bool()
    width = int(keep.sum(1).amax())
    # A stable sort: what is left keeps its order, behind what only evens the rows out.
    index = keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - width :]
    real = keep.gather(1, index)
    return Prompt(prompt.ids.gather(1, index).masked_fill(~real, pad), real.long())
