"""CATP: prune the images of an in-context prompt by their text, by one another and by the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression import samples
from targets.compression.base import Compressor, Cut, Scores, Seen, Stage, numbered
from targets.compression.budgets import final_for_average
from targets.compression.coverage import chosen_greedily, gain_when_chosen
from targets.compression.divprune import marked
from targets.compression.raters import precise, sight_of
from targets.compression.scoring import standardised, top_k_mask
from targets.errors import CompressionError

_LAYER, _DEPTH = 6, 32
"""K of LLaVA-NeXT-7B."""
_INPUT, _BEFORE, _AT, _CONTEXT, _QUERY = range(5)
"""Its cuts by number; `_BEFORE` and `_AT` only look."""
_REMEMBERED: Final = ("attention before K", "attention at K")


@dataclass(frozen=True, kw_only=True)
class CATP(Compressor):
    """Keep tokens that cover their image and fit its text, then those that matter to the query.

    Paper: "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal
    In-Context Learning" (AAAI 2026, arXiv 2508.07871). A prompt is (I_1, T_1) … (I_n, T_n),
    (I_q, T_q). With R the dropped share of all tokens, each of two stages drops R / 2.

    Stage 1, projected tokens of each image: greedily maximise
    ``Σ_x max_{y ∈ Y} s(y, x) + alignment · Σ_{y ∈ Y} s(y, mean T_i)`` with |Y| = ⌊S_i (1 − R/2)⌋
    and s the cosine rescaled to [0, 1]. Stage 2a, behind layer K: tokens of all context images
    together are ranked by ``max(0, A_K − A_{K−1}) + relevance · cos(h, v_q)``, A the head-mean
    attention of the last prompt token and v_q the mean hidden state of the query sample. Stage 2b,
    one layer later: tokens of the query image are ranked by ``cos(h, v_c)``, v_c the mean hidden
    state of what is left of the context.

    A prompt with one image has no context; it gets stages 1 and 2b, with its text as context.

    Args:
        layer: K, 0-based, ≥ 1, with two layers behind it; None is layer 6 of 32, in proportion to
            the model's depth (published: 6 for 7B and 8B models, 10 for 13B).
        retention: kept ÷ all visual tokens at the end, in (0, 1] (the paper's R is *dropped*).
        keep_tokens: tokens kept of each image, ≥ 1, instead of retention; context images share
            theirs.
        budget_is: ``final`` means what the last stage leaves, ``average`` the mean over all layers
            of the language model.
        alignment: weight of the text in stage 1, ≥ 0.
        relevance: weight of the query in stage 2a, ≥ 0.
        positions: ``keep`` the position ids, or ``reindex`` them.

    Raises:
        CompressionError: for an option outside its range, or a model of fewer than four layers.

    *Differs from the paper in …*: a reconstruction in part, there is no public code. How stage 2
    divides its quota is unknown; context and query lose in proportion to their tokens [inferred],
    and each context image keeps at least one token (ours). The position mode is unknown [inferred:
    keep]. "Hidden state at layer K" is its output, so tokens go at the inputs of K + 1 and K + 2
    [inferred]. The rescaled cosine is (1 + cos) / 2 [inferred]. The last image of a row is the
    query; a text T_i is what stands between its image and the next, and where nothing does it is
    all text of the row (ours), as when several pictures stand in front of one question. The
    context of v_c begins at the first image, so that the sink at the start of the prompt does not
    drown it [inferred]. The score of stage 1 is a token's gain when it was chosen, or would be
    chosen next; it is live, the greedy order is not.
    """

    name: ClassVar[str] = "catp"

    layer: Annotated[int, Ge(1)] | None = None
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    budget_is: Literal["final", "average"] = "final"
    alignment: Annotated[float, Ge(0)] = 0.7
    relevance: Annotated[float, Ge(0)] = 0.6
    positions: Literal["keep", "reindex"] = "keep"

    def __post_init__(self) -> None:
        """Check the budget, the layer and the weights."""
        super().__post_init__()
        least = {"layer": 1, "alignment": 0, "relevance": 0}
        for option, low in least.items():
            value = getattr(self, option)
            if value is not None and value < low:
                raise CompressionError(f"compressor catp: {option} is {value!r}; at least {low}")

    @property
    def stage(self) -> Stage:
        """First before the language model."""
        return Stage.INPUT

    def middle(self, layers: int) -> int:
        """K in a model of `layers`.

        Raises:
            CompressionError: if there are no two layers behind it, or none before.
        """
        wanted = self.layer
        if wanted is None:
            wanted = min(max(1, int(_LAYER * layers / _DEPTH + 0.5)), layers - 3)
        if wanted < 1 or wanted + 2 >= layers:
            raise CompressionError(
                f"compressor catp: with layer {wanted} it needs layers {wanted - 1} to "
                f"{wanted + 2}; the language model has layers 0 to {layers - 1}"
            )
        return wanted

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """Before the model, two looks at attention, context images, query images."""
        at = self.middle(layers)
        return numbered(
            (
                Cut(Stage.INPUT),
                Cut(Stage.LAYER, at - 1, attends=True, drops=False),
                Cut(Stage.LAYER, at, attends=True, drops=False),
                Cut(Stage.LAYER, at + 1),
                Cut(Stage.LAYER, at + 2),
            )
        )

    def count(self, cut: Cut, tokens: int, layers: int) -> int:
        """The most tokens left of an image; context images share what stage 2a leaves."""
        final = self.final(tokens, layers)
        return final if cut.number == _QUERY else (tokens + final) // 2

    def final(self, tokens: int, layers: int) -> int:
        """Tokens an image of `tokens` has in the end, context images on average."""
        final = self.budget(tokens)
        if self.budget_is == "final" or final == tokens:
            return final
        return final_for_average(
            self.name,
            lambda one: ((tokens + one) // 2, one),
            (0, self.middle(layers) + 2),
            layers,
            tokens,
            final,
        )

    # Ranking ------------------------------------------------------------------------------------

    def look(self, seen: Seen) -> None:
        """Remember the attention of the last prompt token at layers K − 1 and K."""
        if seen.attention is None:
            raise CompressionError("catp needs the attention of the last prompt token")
        seen.memory[_REMEMBERED[seen.cut.number - _BEFORE]] = seen.attention.mean(1)

    def score(self, seen: Seen) -> Scores:
        """Gain when chosen before the model, later how much a token matters, ``[I, V]``."""
        if seen.cut.number == _INPUT:
            return self._covering(seen)
        text = sight_of(seen)
        if seen.cut.number == _CONTEXT:
            rise = self._rise(seen)
            score = rise + self.relevance * samples.cosine(seen, samples.query_mean(text))
            chosen = samples.shared(score.detach(), self._quota(seen), seen)
        else:
            score = samples.cosine(seen, samples.context_mean(text))
            query = samples.is_query(seen.rows)[:, None]
            best = top_k_mask(score, self._quota(seen), seen.valid)
            chosen = torch.where(query, best, seen.valid)
        score = score.masked_fill(~seen.valid, 0)
        return Scores(score, standardised(score, seen.valid), chosen=chosen)

    def _covering(self, seen: Seen) -> Scores:
        features = precise(seen.features).masked_fill(~seen.valid[..., None], 0)
        unit = torch.nn.functional.normalize(features, dim=-1)
        both = seen.valid[:, :, None] & seen.valid[:, None]
        alike = ((1 + unit @ unit.transpose(1, 2)) / 2).masked_fill(~both, 0)
        fits = (1 + samples.cosine(seen, samples.text_means(sight_of(seen)))) / 2
        extra = (self.alignment * fits).masked_fill(~seen.valid, 0)
        order = chosen_greedily(alike, extra, seen.counts, seen.valid)
        score = gain_when_chosen(alike, extra, order, seen.counts, seen.valid)
        chosen = marked(order, seen.counts, seen.valid)
        return Scores(score, standardised(score, seen.valid), chosen=chosen)

    def _rise(self, seen: Seen) -> Tensor:
        """By how much attention grew at K, 0 where it fell."""
        if any(name not in seen.memory for name in _REMEMBERED):
            raise CompressionError("catp has not looked at the attention of layers K − 1 and K")
        before, at = (seen.memory[name] for name in _REMEMBERED)
        rise: Tensor = (at - before).to(seen.features.device).relu()
        return rise

    def _quota(self, seen: Seen) -> Tensor:
        """Tokens of each image in the end, were they not shared, ``[I]``."""
        left = [self.final(int(total), seen.deepest) for total in seen.totals.tolist()]
        return torch.minimum(torch.tensor(left, device=seen.valid.device), seen.valid.sum(1))
