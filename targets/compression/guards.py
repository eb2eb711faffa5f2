"""What a compression session refuses, each with a reason, before it could give wrong numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from targets.compression.base import Compressor, Cut, Merged, Stage
from targets.compression.layout import ImageSlots
from targets.errors import CompressionError
from targets.families.base import Family

_OWNER = "_open_compression_session"


def check(
    family: Family, parts: Sequence[Compressor], cuts: Sequence[Cut], relax: float | None
) -> None:
    """Refuse compressors that do not fit a model.

    Raises:
        CompressionError: with the option at fault.
    """
    layers = len(family.layers)
    for cut in cuts:
        for layer in (cut.looks_at, cut.layer):
            if layer is not None and not 0 <= layer < layers:
                raise CompressionError(
                    f"compressor {owner(cut).name}: layer {cut.layer} does not exist; the "
                    f"language model has layers 0 to {layers - 1}"
                )
    fixed = family.fixed_tokens()
    for one in parts:
        if fixed and one.keep_tokens is not None and one.keep_tokens > fixed:
            raise CompressionError(
                f"compressor {one.name}: keep_tokens is {one.keep_tokens}, but an image has "
                f"{fixed} visual tokens"
            )
        reason = one.refuses(family) or family.refuses(one)
        if reason:
            raise CompressionError(f"compressor {one.name}: {reason}")
    implementation = str(getattr(family.text.config, "_attn_implementation", ""))
    if relax is not None and implementation not in ("sdpa", "eager"):
        raise CompressionError(
            f"the straight-through path needs a mask with a gradient, which {implementation} does "
            "not take; load the model with attn_implementation sdpa or eager"
        )


def check_tower(parts: Sequence[Compressor], mode: str) -> None:
    """Refuse what does not go with a tower that is shortened from inside.

    Raises:
        CompressionError: in mode ``observe``, and beside others that read the tower's patches.
    """
    inside = [one.name for one in parts if one.stage is Stage.TOWER]
    if not inside:
        return
    if mode == "observe":
        raise CompressionError(
            f"compressor {inside[0]} drops tokens inside the vision tower, so its ranking cannot "
            "be had while the tower is left as it is; use mode rank, and a pass without "
            "compression for the full answer"
        )
    others = [one.name for one in parts if one.sees_tower and one.stage is not Stage.TOWER]
    if len(inside) + len(others) > 1:
        raise CompressionError(
            f"compressors {', '.join([*inside, *others])} cannot follow each other: behind "
            f"{inside[0]} the vision tower has no whole grid of patches left to rank or merge; "
            "follow it with one that acts in the language model"
        )


def check_emerged(cut: Cut, emerged: Merged | None, slots: ImageSlots) -> None:
    """Refuse to cut where the tower has not run, or for other pictures.

    Raises:
        CompressionError: naming the compressor.
    """
    if emerged is None or len(emerged.valid) != len(slots.rows):
        raise CompressionError(
            f"compressor {owner(cut).name} works inside the vision tower, which has not run inside "
            "this session for these pictures; pass pixel_values, not encoder outputs made before"
        )


def owner(cut: Cut) -> Compressor:
    """The compressor a cut belongs to."""
    if cut.by is None:
        raise CompressionError("this cut belongs to no compressor")
    return cut.by


def changes_tower(model: Any) -> bool:  # noqa: ANN401 - transformers is untyped
    """Whether an open session shortens this model's vision tower from inside."""
    session, _ = model.__dict__.get(_OWNER, (None, None))
    return session is not None and bool(session.in_tower)


def acquire(model: Any, session: object) -> None:  # noqa: ANN401 - transformers is untyped
    """Mark a model as taken and guard its `generate`.

    Raises:
        CompressionError: if another session is open, or the model is compiled.
    """
    if hasattr(model, "_orig_mod"):
        raise CompressionError(
            "the model is compiled by torch.compile, which traces around hooks; compress the "
            "original model"
        )
    if _OWNER in model.__dict__:
        raise CompressionError(
            "this model is already inside a compression session; close that one first"
        )
    original = model.generate
    model.__dict__[_OWNER] = (session, model.__dict__.get("generate"))

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - signature of transformers
        config = kwargs.get("generation_config")
        check_generation(config if config is not None else model.generation_config, kwargs)
        return original(*args, **kwargs)

    model.__dict__["generate"] = generate


def release(model: Any, session: object) -> None:  # noqa: ANN401 - transformers is untyped
    """Undo `acquire`; does nothing for a model another session holds."""
    owner, before = model.__dict__.get(_OWNER, (None, None))
    if owner is not session:
        return
    del model.__dict__[_OWNER], model.__dict__["generate"]
    if before is not None:
        model.__dict__["generate"] = before


def check_generation(config: Any, kwargs: dict[str, Any]) -> None:  # noqa: ANN401
    """Refuse ways of decoding that reorder, crop or preallocate the cache.

    Raises:
        CompressionError: for beams, assisted decoding, or a cache that is not dynamic.
    """

    def option(name: str) -> Any:  # noqa: ANN401
        return kwargs.get(name, getattr(config, name, None))

    if (option("num_beams") or 1) > 1:
        raise CompressionError(
            f"beam search (num_beams {option('num_beams')}) is not supported under compression, "
            "because beams reorder rows behind the session's back; use num_beams=1"
        )
    helpers = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
    used = [name for name in helpers if option(name) is not None]
    if used:
        raise CompressionError(
            f"assisted decoding ({', '.join(used)}) is not supported under compression, because "
            "it crops caches whose layers have different lengths; leave it out"
        )
    cache = option("cache_implementation")
    if cache not in (None, "dynamic"):
        raise CompressionError(
            f"cache_implementation {cache!r} is not supported under compression; use a dynamic "
            "cache (leave the option out)"
        )


def check_cache(cache: Any) -> None:  # noqa: ANN401 - transformers is untyped
    """Refuse caches whose layers cannot differ in length.

    Raises:
        CompressionError: for static, sliding or encoder-decoder caches.
    """
    if cache is None:
        return
    sliding = any(getattr(cache, "is_sliding", ()) or ())
    if getattr(cache, "is_compileable", False) or sliding or not hasattr(cache, "layers"):
        raise CompressionError(
            f"cache {type(cache).__name__} is not supported under compression: its layers have "
            "one fixed length; use transformers.DynamicCache"
        )


def check_length(mask: Tensor, cache: Any, layer: int, steps: int) -> None:  # noqa: ANN401
    """Refuse a cache that was changed behind the session's back.

    Raises:
        CompressionError: if a layer's cache and the columns known for it differ in number.
    """
    held = 0 if cache is None else int(cache.get_seq_length(layer))
    if held + steps != mask.shape[1]:
        raise CompressionError(
            f"layer {layer} holds {held} cached and {steps} new columns, but the session knows of "
            f"{mask.shape[1]}; the cache was cropped or reused from another prompt"
        )


def columns_of(
    kwargs: dict[str, Any], embeds: Tensor, outer: Tensor | None
) -> tuple[Tensor, Tensor, Any]:
    """The 2-D mask and position ids of a prefill; ones and 0 … L−1 where absent.

    Args:
        kwargs: arguments of the language model.
        embeds: ``[B, L, D]``.
        outer: the mask the whole model was given.

    Returns:
        The mask ``[B, L]``, position ids ``[…, B, L]``, and the mask the language model was given
        if that is another form made from it, else None.

    Raises:
        CompressionError: for masks that cannot be traced back to a 2-D one.
    """
    rows, length = embeds.shape[:2]
    given = kwargs.get("attention_mask")
    flat = given if isinstance(given, Tensor) and given.dim() == 2 else outer
    if flat is None:
        # Families that make their own masks do so without a 2-D one where nothing is padded.
        flat = torch.ones(rows, length, dtype=torch.long, device=embeds.device)
    if not isinstance(flat, Tensor) or flat.shape != (rows, length):
        form = list(flat.shape) if isinstance(flat, Tensor) else type(flat).__name__
        raise CompressionError(
            f"the language model was given a mask of form {form}; compression needs one of "
            f"[{rows}, {length}]"
        )
    if isinstance(given, Tensor) and given.dim() == 2:
        given = None
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=embeds.device)[None]
    return flat.long(), positions.expand(*positions.shape[:-2], rows, length), given
