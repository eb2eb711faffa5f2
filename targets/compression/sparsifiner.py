"""Sparsifiner: sparse attention in the vision tower, and fewer tokens by the attention of CLS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression import trained
from targets.compression.base import Scores
from targets.compression.budgets import checked_layers, scaled_layers
from targets.compression.flow import Step, removal
from targets.compression.inside import InsideTower, TowerRun, in_heads, padding
from targets.compression.scoring import attention_row, log_probability, precise, top_k_mask
from targets.compression.sparsifiner_net import Connectivity, connected
from targets.errors import CompressionError

if TYPE_CHECKING:
    from targets.families.base import Family

_OFFICIAL, _DEPTH = (3, 6, 9), 12


@dataclass(frozen=True, kw_only=True)
class Sparsifiner(InsideTower):
    """Drop patches at some layers of the vision tower; each query of a layer attends to few keys.

    Paper: Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient
    Vision Transformers" (CVPR 2023, arXiv 2303.13755). A small predictor approximates the attention
    of each layer, ``softmax(q' k'ᵀ / √E) B`` of low rank (`sparsifiner_net`); each query attends to
    the ``ceil(connections · S)`` keys it names, CLS to all. At the pruning layers the patches with
    the least attention of CLS (mean over heads) go, the same share of those left each time. The
    masks cost what dense attention costs: without sparse kernels only dropped tokens save time.

    Args:
        layers: 0-based layers of the tower in which patches are dropped, between attention and
            perceptron; None is 3, 6, 9 of 12, moved in proportion to the depth of the feature
            layer.
        connections: share of keys each query attends to, in (0, 1]; 1 is dense attention and needs
            no predictor. The official examples have 0.25.
        weights: trained predictor, by the name of the scenes model it is shipped with
            (``scenes-a``) or as a folder; ``none`` is the untrained one, with starting values from
            seed 0. Only read if `connections` is below 1.
        retention: kept ÷ all visual tokens, in (0, 1]; 1 drops nothing, whatever `connections`.
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        positions: whether kept tokens get contiguous position ids.

    Raises:
        CompressionError: for an option outside its range, or weights that cannot be read.

    *Differs from the paper in …*: which layers drop tokens, where in the layer, that the last one
    leaves exactly the budget, the threshold of B at inference and the scaling √E are [inferred]. A
    tower without CLS drops by the mean attention received [inferred]. The shipped predictor was
    taught the attention of the frozen dense tower only; its tower is not fine-tuned with it, as the
    paper's is. Once patches are gone their columns of the learned projections are left out
    [inferred]. The score is the attention at the pruning layers, mean over them, 0 once a patch is
    gone; masks are never differentiated, as in the paper. A set that is imposed is reached by the
    last pruning layer.
    """

    name: ClassVar[str] = "sparsifiner"

    layers: tuple[Annotated[int, Ge(0)], ...] | None = None
    connections: Annotated[float, Interval(gt=0, le=1)] = 1.0
    weights: str = "scenes-a"
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "reindex"

    def __post_init__(self) -> None:
        """Check budget, layers and connections."""
        super().__post_init__()
        if self.layers is not None:
            checked_layers(self.name, self.layers, first=0)
        if not 0 < self.connections <= 1:
            raise CompressionError(
                f"compressor {self.name}: connections is {self.connections!r}; it is the share of "
                "keys a query attends to, in (0, 1]"
            )

    def refuses(self, family: Family) -> str | None:
        """Layers there are not, and a predictor for another tower."""
        reason, encoder = super().refuses(family), family.encoder
        if reason or encoder is None:
            return reason
        deepest = encoder.feature_layer
        if self.layers is not None and self.layers[-1] > deepest:
            return (
                f"layers are {list(self.layers)}, but the features come out of layer {deepest} of "
                "the vision tower; name none behind it"
            )
        if self.connections < 1:
            return trained.misfit(self.name, self.weights, family) or self._stranger(family)
        return None

    def _stranger(self, family: Family) -> str | None:
        tokens = family.fixed_tokens() + int(getattr(family.encoder, "has_cls", False))
        if self.weights == trained.UNTRAINED or self._network.tokens == tokens:
            return None
        return (
            f"its weights {self.weights!r} are for {self._network.tokens} tokens of the vision "
            f"tower, this one has {tokens}; train some for this model, or say weights: "
            f"{trained.UNTRAINED}"
        )

    def prunes_in(self, deepest: int) -> tuple[int, ...]:
        """The pruning layers of a tower whose feature layer is `deepest`."""
        if self.layers is not None:
            return self.layers
        return scaled_layers(_OFFICIAL, _DEPTH, deepest + 1) if deepest else (0,)

    def stages(self, tokens: int, stages: int) -> tuple[int, ...]:
        """Patches left after each pruning layer."""
        final, left, counts = self.budget(tokens), tokens, []
        share = (final / tokens) ** (1 / stages)
        for _ in range(stages):
            left = max(final, math.ceil(share * left - 1e-6))
            counts.append(left)
        return (*counts[:-1], final)

    def mask(self, run: TowerRun, layer: int, normed: Tensor) -> Tensor | None:
        """Nothing but the connections of each query."""
        tokens, block = run.tokens[layer], run.encoder.blocks[layer]
        hidden = padding(tokens, run.encoder)
        if self.connections == 1 or layer > run.encoder.feature_layer:
            return hidden
        with torch.no_grad():
            attention = block.self_attn
            queries, keys = (
                in_heads(precise(one(normed)), attention)
                for one in (attention.q_proj, attention.k_proj)
            )
            alive = tokens.alive
            network = self._fitting(run, queries.shape[-1]).to(queries.device, queries.dtype)
            index = (tokens.place + run.lead).clamp_min(0)
            guess = network(layer, queries, keys, index, alive)
            open_ = connected(guess, self.connections, alive, run.encoder.has_cls)
        shut = torch.zeros(open_.shape, dtype=normed.dtype, device=normed.device)
        return shut.masked_fill(~open_, torch.finfo(normed.dtype).min)

    def between(
        self, run: TowerRun, layer: int, hidden: Tensor, queries: Tensor, keys: Tensor
    ) -> Tensor:
        """Drop patches, if this is a pruning layer."""
        tokens, places = run.tokens[layer], self.prunes_in(run.encoder.feature_layer)
        if layer not in places:
            run.tokens.setdefault(layer + 1, tokens)
            return hidden
        score = asked(run, layer, queries, keys)
        run.scores.setdefault(layer, tokens.at_places(score))
        if layer + 1 not in run.tokens:
            step = self._step(run, layer, places, run.scores[layer].detach())
            if step is not None:
                run.steps[layer] = step
            run.tokens[layer + 1] = tokens if step is None else step.after
        return run.steps[layer].picked(hidden) if layer in run.steps else hidden

    def _step(
        self, run: TowerRun, layer: int, places: tuple[int, ...], score: Tensor
    ) -> Step | None:
        """Remove all but the best, of a forced set nothing."""
        tokens, number = run.tokens[layer], places.index(layer)
        here = tokens.survivors()
        planned = self.stages(run.patches, len(places))[number]
        count = torch.full_like(tokens.count, planned)
        if run.forced is not None:
            wanted = run.forced.kept.sum(1)
            last = number == len(places) - 1
            count = wanted if last else torch.maximum(count, wanted)
            score = score.masked_fill(run.forced.kept, torch.inf)
        count = torch.minimum(count, here.sum(1))
        kept = top_k_mask(score, count, here)
        return None if torch.equal(kept, here) else removal(tokens, kept, run.lead)

    def judge(self, run: TowerRun) -> Scores:
        """Attention at the pruning layers, ``[I, V]``."""
        score = torch.stack([*run.scores.values()]).mean(0)
        return Scores(score, log_probability(score), chosen=run.final.survivors())

    def _fitting(self, run: TowerRun, width: int) -> Connectivity:
        """The predictor; the untrained one is made as large as the tower."""
        if self.weights != trained.UNTRAINED:
            return self._network
        arguments = {
            "layers": run.encoder.feature_layer + 1,
            "tokens": run.patches + run.lead,
            "width": width,
        }
        made: Any = trained.seeded(Connectivity, arguments)
        network: Connectivity = made.eval().requires_grad_(False)
        return network

    @cached_property
    def _network(self) -> Connectivity:
        found = trained.read(self.name, self.weights)
        network: Any = trained.seeded(Connectivity, found.network)
        found.fill(network, self.name)
        made: Connectivity = network
        return made


def asked(run: TowerRun, layer: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Head-mean attention of CLS to each token, ``[I, S]``, live; received without CLS."""
    scaling = float(run.encoder.blocks[layer].self_attn.scale)
    alive = run.tokens[layer].alive
    if run.lead:
        return attention_row(queries[:, :, 0], keys, scaling, visible=alive).mean(1)
    logits = precise(queries @ keys.transpose(-1, -2)) * scaling
    low = torch.finfo(logits.dtype).min
    paid = logits.masked_fill(~alive[:, None, None], low).softmax(-1)
    paid = paid * alive[:, None, :, None]
    return paid.mean(1).sum(1) / alive.sum(1, keepdim=True)
