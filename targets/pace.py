"""How long a prefill and a decoding step take, and what they hold in the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from targets.caches import cache_name
from targets.compression.base import Compressor
from targets.compression.session import compress
from targets.costs import Dimensions, cache_bytes, prefill_macs

if TYPE_CHECKING:
    from targets.passes import Passes


@dataclass(frozen=True, slots=True)
class Pace:
    """One measured batch.

    Attributes:
        rows: B.
        lengths: columns in each layer of the language model at prefill.
        visual: visual tokens in each layer, mean over the images.
        macs: multiply-accumulates of the language model's prefill, all rows (`costs.FORMULA`).
        prefill_seconds: vision tower, projector, ranking and language model.
        ranking_seconds: of that, scoring and selecting.
        decode_seconds: one decoding step of the batch.
        cache_bytes: keys and values right after the prefill.
    """

    rows: int
    lengths: tuple[int, ...]
    visual: tuple[float, ...]
    macs: int
    prefill_seconds: float
    ranking_seconds: float
    decode_seconds: float
    cache_bytes: int


@torch.no_grad()
def pace(
    passes: Passes,
    images: Tensor,
    questions: Sequence[str],
    compressor: Compressor | None,
    steps: int,
) -> Pace:
    """Measure one batch; see `targets.lvlm.LVLM.measure`."""
    from transformers import DynamicCache

    family = passes.family
    inputs, layout, size = passes.inputs(images, compressor)
    prompt = passes.prompts.prompt(questions, layout, size)
    cache = DynamicCache(config=family.model.config)
    arguments = {**family.cast(inputs), **family.extras(prompt.ids, prompt.mask, 0)}
    session = None if compressor is None else compress(family.model, compressor, family=family)
    with nullcontext() if session is None else session:
        started = _now(family.device)
        out = family.model(
            input_ids=prompt.ids,
            attention_mask=prompt.mask,
            use_cache=True,
            **{cache_name(): cache},
            **arguments,
        )
        prefilled = _now(family.device)
        held = cache_bytes(cache)
        decoded = _decode(family.model, out.logits[:, -1:], prompt.mask, cache, steps)
        finished = _now(family.device)
    lengths, visual = _columns(family, session, prompt.ids.shape[1], layout.tokens)
    return Pace(
        rows=len(images),
        lengths=lengths,
        visual=visual,
        macs=len(images) * prefill_macs(lengths, Dimensions.of(family.text.config)),
        prefill_seconds=prefilled - started,
        ranking_seconds=0.0 if session is None else session.trace.seconds,
        decode_seconds=(finished - prefilled) / max(1, decoded),
        cache_bytes=held,
    )


def _decode(model: Any, logits: Tensor, mask: Tensor, cache: Any, steps: int) -> int:  # noqa: ANN401
    """Greedy steps that never stop; how many were made."""
    for _ in range(steps):
        token = logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        given = {cache_name(): cache}
        out = model(input_ids=token, attention_mask=mask, use_cache=True, **given)
        logits = out.logits
    return steps


def _columns(
    family: Any,  # noqa: ANN401 - a Family
    session: Any,  # noqa: ANN401 - a session or None
    length: int,
    tokens: int,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    layers = len(family.layers)
    if session is None:
        return (length,) * layers, (float(tokens),) * layers
    trace = session.trace
    visual = [float(trace.tokens[i].double().mean()) for i in range(layers) if i in trace.tokens]
    return tuple(trace.lengths[i] for i in range(layers)), tuple(visual)


def _now(device: torch.device) -> float:
    """The clock, once everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
