"""Token Sparse Attention: each head attends among its own important tokens; none is removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.caches import cache_of
from targets.compression.base import Compressor, Cut, Scores, Seen, Stage
from targets.compression.budgets import checked_layers
from targets.compression.layout import ImageSlots
from targets.compression.raters import all_keys, compact, sight_of
from targets.compression.scoring import log_probability, top_k_mask
from targets.compression.sparse_heads import (
    Columns,
    covered_number,
    kept_by_heads,
    shares,
    short_attention,
    window_mass,
)
from targets.compression.watching import marked
from targets.errors import CompressionError
from targets.families.base import rotate

if TYPE_CHECKING:
    from targets.compression.sight import TextSight
    from targets.compression.state import TextPass
    from targets.compression.trace import CutTrace
    from targets.families.base import Family

HEADS = "heads"
"""Where the memory holds what heads kept: layer → bool ``[I, N, V]``, of the last prefill."""
_WIDTH = 0.25
"""Of the sigmoid in the relaxed count, in units of coverage."""
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class TokenSparseAttention(Compressor):
    """Let each head of some layers attend among its own important tokens, at prefill only.

    Paper: Jo et al., "Token Sparse Attention: Efficient Long-Context Inference with Interleaved
    Token Selection" (arXiv 2602.03216), an LLM method for long texts. In a sparse layer the score
    of a token is, for each head, the mean attention of the last `window` queries of the prompt,
    smoothed over neighbours. The least ones by the head-mean score, as many as together have less
    than `coverage` of it and one more, say how many are dropped; which ones, each head decides by
    its own score. Queries, keys and values of the kept tokens are gathered, attention is dense and
    causal among them, and the result is scattered back with zeros elsewhere: a dropped token passes
    on through the residual connection. The cache keeps everything, and so does the sequence; only
    the cost of attention falls. Coverage 0 is dense attention.

    What the heads kept is in ``trace.cuts[0].seen.memory["heads"]``. The trace's score is the
    head-mean one of the first sparse layer, live; its kept set are the tokens that score would keep
    there. Another kept set that is imposed is what all heads of all sparse layers keep; the
    method's own leaves each head its choice.

    Args:
        layers: sparse layers, 0-based, ascending; None is the upper half (published for
            Llama-3.1-8B: 15 … 30).
        coverage: share of the head-mean score that may be lost, in [0, 1); None is the official
            0.005 unless retention or keep_tokens is given.
        retention: instead of coverage, share of the visual tokens each head keeps in sparse layers,
            in (0, 1].
        keep_tokens: instead of coverage, how many of each image's, ≥ 1; images of a prompt share.
        variant: ``image_only`` drops visual tokens only, rated by text behind the last image;
            ``official`` drops any token in front of the window.
        window: last queries that rate, ≥ 1; None is 16, or the official 128.
        min_tokens: droppable tokens each head keeps at least, ≥ 1; None is 1, or the official 1024.
        kernel: tokens the moving average spans, odd.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: ``image_only`` and its defaults are ours, since with the official
    ones prompts of a few hundred tokens stay dense [inferred]; where no text follows the image, the
    last token rates. How the official kernel reduces the window is not public [inferred: mean].
    The sparse layers of a model are given, not profiled by the drift of its hidden states. Rows of
    a batch drop different numbers; the shorter are padded. Prompts without an image stay dense.
    Answers that are scored along with the prompt attend to everything, as decoded ones do with the
    full cache. Dropping is hard: the straight-through path adds no gradient.
    """

    name: ClassVar[str] = "token_sparse_attention"
    budget_optional: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None
    coverage: Annotated[float, Interval(ge=0, lt=1)] | None = None
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    variant: Literal["image_only", "official"] = "image_only"
    window: Annotated[int, Ge(1)] | None = None
    min_tokens: Annotated[int, Ge(1)] | None = None
    kernel: Annotated[int, Ge(1)] = 7

    def __post_init__(self) -> None:
        """Check what decides how many go, and the other options."""
        if self.retention is not None or self.keep_tokens is not None:
            super().__post_init__()
            if self.coverage is not None:
                raise CompressionError(
                    f"compressor {self.name}: coverage {self.coverage!r} finds out how many tokens "
                    "to keep; give it or retention or keep_tokens, not both"
                )
        if self.coverage is not None and not 0 <= self.coverage < 1:
            raise CompressionError(
                f"compressor {self.name}: coverage is {self.coverage!r}; it is the share of "
                "attention that may be lost, in [0, 1)"
            )
        for option in ("window", "min_tokens", "kernel"):
            value = getattr(self, option)
            if value is not None and (value < 1 or (option == "kernel" and value % 2 == 0)):
                wanted = "an odd number" if option == "kernel" else "at least 1"
                raise CompressionError(
                    f"compressor {self.name}: {option} is {value!r}; it has to be {wanted}"
                )
        if self.layers is not None:
            checked_layers(self.name, self.layers, first=0)

    @property
    def stage(self) -> Stage:
        """Inside attention layers."""
        return Stage.ATTENTION

    def sparse(self, layers: int) -> tuple[int, ...]:
        """Its sparse layers in a model of `layers`.

        Raises:
            CompressionError: if one does not exist.
        """
        found = tuple(range(layers // 2, layers)) if self.layers is None else self.layers
        if found[-1] >= layers:
            raise CompressionError(
                f"compressor {self.name}: layer {found[-1]} does not exist; the language model has "
                f"layers 0 to {layers - 1}"
            )
        return found

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One that ranks at the first sparse layer; it has no layer to shorten."""
        return (Cut(Stage.LAYER, None, self.sparse(layers)[0]),)

    def budget(self, tokens: int) -> int:
        """All: nothing is removed."""
        return tokens

    def refuses(self, family: Family) -> str | None:
        """Attention of another form than that of Llama, which is taken apart here."""
        for layer in self.sparse(len(family.layers)):
            attention = family.layers[layer].self_attn
            if not all(hasattr(attention, name) for name in (*_PROJECTIONS, "head_dim")):
                return (
                    f"it works inside attention with {', '.join(_PROJECTIONS)}, which "
                    f"{type(attention).__name__} of layer {layer} does not have"
                )
            if attention.o_proj.in_features != attention.q_proj.out_features:
                return f"the queries of {type(attention).__name__} carry more than queries"
            if family.text_softcap(layer) is not None:
                return "its attention kernel cannot cap logits, which this language model does"
        return None

    # Ranking ------------------------------------------------------------------------------------

    def score(self, seen: Seen) -> Scores:
        """Share of the window's smoothed attention, ``[I, V]``; of rating tokens, the largest."""
        text = sight_of(seen)
        columns, share = self._shares(text)
        number = self._number(share, columns, text.slots)
        best = top_k_mask(share, columns.free.sum(1) - number, columns.free) | ~columns.free
        score, free = text.gather(share), text.gather(columns.free)
        score = torch.where(free, score, share.amax(1)[text.slots.rows, None])
        score = score.masked_fill(~seen.valid, 0)
        return Scores(score, log_probability(score), chosen=text.gather(best) & seen.valid)

    @property
    def count_varies(self) -> bool:
        """Without a budget: coverage finds out how many; where it is 0, all are kept."""
        return self.retention is None and self.keep_tokens is None and self._coverage > 0

    def soft_count(self, scores: Scores, seen: Seen) -> Tensor | None:
        """Droppable columns less those whose cumulated share is below coverage, ``[I]``.

        Below is a sigmoid of ``1 − cumulated share / coverage``; `min_tokens` is left out.
        """
        del scores
        if not self.count_varies:
            return None
        columns, share = self._shares(sight_of(seen))
        rising = share.masked_fill(~columns.free, torch.inf).sort(dim=1).values
        free = rising.isfinite()
        total = rising.masked_fill(~free, 0).cumsum(1)
        gone = torch.sigmoid((1 - total / self._coverage) / _WIDTH) * free
        return (free.sum(1) - gone.sum(1))[seen.rows]

    @property
    def _coverage(self) -> float:
        return 0.005 if self.coverage is None else self.coverage

    def _shares(self, text: TextSight) -> tuple[Columns, Tensor]:
        """Which columns play which part, and each one's share of the window's attention."""
        if text.rope is None:
            raise CompressionError(f"compressor {self.name} ranks at a language-model layer")
        columns = self._columns(text.slots, text.live, text.last)
        where, _ = compact(columns.window)
        queries = text.family.text_queries(text.layer, text.hidden, text.rope, where)
        scaling = text.family.text_scaling(text.layer)
        mass = window_mass(queries, all_keys(text), scaling, columns, text.allowed, self.kernel)
        return columns, shares(mass)

    def _columns(self, slots: ImageSlots, live: Tensor, last: int) -> Columns:
        images_only = self.variant == "image_only"
        window = self.window or (16 if images_only else 128)
        return Columns.of(slots, live, last, window, images_only=images_only)

    @torch.no_grad()
    def _number(self, share: Tensor, columns: Columns, slots: ImageSlots) -> Tensor:
        """How many columns each head of a row drops, ``[B]``."""
        if self.retention is None and self.keep_tokens is None:
            number = covered_number(share, columns.free, self._coverage)
        else:
            left = [super(TokenSparseAttention, self).budget(int(n)) for n in slots.totals.tolist()]
            alive = slots.alive.sum(1)
            surplus = (alive - torch.tensor(left, device=alive.device)).clamp_min(0)
            number = torch.zeros_like(columns.free[:, 0], dtype=torch.long)
            number = number.index_add(0, slots.rows, surplus)
        least = self.min_tokens or (1 if self.variant == "image_only" else 1024)
        return torch.minimum(number, (columns.free.sum(1) - least).clamp_min(0))

    # Attention ----------------------------------------------------------------------------------

    def install(self, family: Family, memory: dict[str, Any]) -> Sequence[Any]:
        """Take over the attention of the sparse layers."""
        layers = self.sparse(len(family.layers))
        return [_Sparse(self, family, layer, memory) for layer in layers]

    def attend(
        self,
        family: Family,
        layer: int,
        state: TextPass,
        ranked: CutTrace,
        parts: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Columns] | None:
        """Columns each head keeps ``[B, N, n]``; None where all of them keep all.

        Args:
            family: the model's adapter.
            layer: a sparse one.
            state: the forward it belongs to.
            ranked: what its cut found.
            parts: queries, keys and values ``[B, N, n, E]``.
        """
        group = state.group(layer)
        text = ranked.seen.text
        if group.slots is None or text is None:
            return None
        answers = text.live.shape[1] - 1 - text.last
        last = group.mask.shape[1] - 1 - answers
        columns = self._columns(group.slots, group.mask.bool(), last)
        own = ranked.scores.chosen
        with torch.no_grad():
            if own is not None and not torch.equal(own, ranked.selection.kept):
                kept = _imposed(ranked.selection.kept, group.slots, columns, parts[0].shape[1])
            else:
                where, _ = compact(columns.window)
                wide = where[:, None, :, None].expand(-1, parts[0].shape[1], -1, parts[0].shape[3])
                mass = window_mass(
                    parts[0].gather(2, wide),
                    parts[1],
                    family.text_scaling(layer),
                    columns,
                    family.allowed(state.given, group, layer),
                    self.kernel,
                )
                number = self._number(shares(mass), columns, group.slots)
                kept = kept_by_heads(mass, columns, number)
        if bool((kept | ~columns.prompt[:, None]).all()):
            return None
        return kept, columns


def _imposed(kept: Tensor, slots: ImageSlots, columns: Columns, heads: int) -> Tensor:
    """The same visual tokens for all heads, and everything else."""
    rows, length = columns.live.shape
    gone = slots.spread((slots.alive & ~kept).long(), length, rows).bool() & columns.free
    return (columns.prompt & ~gone)[:, None].expand(-1, heads, -1)


class _Sparse:
    """An attention module whose forward has been taken over; `remove` gives it back."""

    def __init__(
        self, by: TokenSparseAttention, family: Family, layer: int, memory: dict[str, Any]
    ) -> None:
        self._by, self._family, self._layer, self._memory = by, family, layer, memory
        self._module = family.layers[layer].self_attn
        self._before = self._module.__dict__.get("forward")
        self._dense = self._module.forward
        self._module.__dict__["forward"] = self._forward

    def remove(self) -> None:
        """Leave the module as it was."""
        del self._module.__dict__["forward"]
        if self._before is not None:
            self._module.__dict__["forward"] = self._before

    def _forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the module's own
        state = marked(kwargs)
        ranked = None if state is None or not state.prefill else _ranked(self._by, state)
        if state is None or ranked is None:
            return self._dense(*args, **kwargs)
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        queries, keys, values = self._parts(hidden, kwargs["position_embeddings"])
        groups = queries.shape[1] // keys.shape[1]
        wide = [part.repeat_interleave(groups, dim=1) for part in (keys, values)]
        parts = (queries, wide[0], wide[1])
        found = self._by.attend(self._family, self._layer, state, ranked, parts)
        self._report(state, None if found is None else found[0], queries.shape[1])
        if found is None:
            return self._dense(*args, **kwargs)
        cache, module = cache_of(kwargs), self._module
        if cache is not None:
            cache.update(keys, values, module.layer_idx)
        group = state.group(self._layer)
        out = short_attention(
            parts,
            *found,
            self._family.allowed(state.given, group, self._layer),
            group.bias,
            scaling=self._family.text_scaling(self._layer),
            dropout=module.attention_dropout if module.training else 0.0,
        )
        return module.o_proj(out.transpose(1, 2).flatten(2)), None

    def _parts(self, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, N, n, E]``, keys and values (grouped as they are) of a normed input."""
        module = self._module
        found = [
            getattr(module, name)(hidden).unflatten(-1, (-1, module.head_dim))
            for name in _PROJECTIONS[:3]
        ]
        for place, norm in enumerate(("q_norm", "k_norm")):
            if hasattr(module, norm):
                found[place] = getattr(module, norm)(found[place])
        queries, keys, values = (part.transpose(1, 2) for part in found)
        cosine, sine = (part.unsqueeze(1) for part in rope)
        return rotate(queries, cosine, sine), rotate(keys, cosine, sine), values

    def _report(self, state: TextPass, kept: Tensor | None, heads: int) -> None:
        """Note what the heads kept: in the memory of this pass, which a replay leaves alone."""
        slots, name = state.group(self._layer).slots, id(self._by)
        own = state.memories.get(name, {})
        if own is self._memory:
            own = state.memories[name] = {HEADS: {}}
            self._memory[HEADS] = own[HEADS]
        if slots is None or self._layer in own[HEADS]:
            return
        alive = slots.alive[:, None].expand(-1, heads, -1)
        if kept is not None:
            alive = alive & slots.gather(kept.transpose(1, 2)).transpose(1, 2)
        own[HEADS][self._layer] = alive


def _ranked(one: TokenSparseAttention, state: TextPass) -> CutTrace | None:
    """What its cut found in this forward; None where there is no image."""
    return next((made for cut, made in state.chosen.items() if cut.by is one), None)
