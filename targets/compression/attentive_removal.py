"""Attentive token removal: look once, then run the vision tower on the patches worth it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Cut, Scores
from targets.compression.flow import removal
from targets.compression.inside import InsideTower, TowerRun, in_heads
from targets.compression.scoring import (
    attention_row,
    log_probability,
    received_attention,
    top_k_mask,
)

if TYPE_CHECKING:
    from targets.families.base import Family


@dataclass(frozen=True, kw_only=True)
class AttentiveRemoval(InsideTower):
    """Remove the patches CLS attends to least over all layers, before the first layer.

    Paper: Yang et al., "Attentive Mask CLIP" (ICCV 2023, arXiv 2212.08653). A first pass of the
    tower gives the attention of CLS to each patch, mean over all layers and heads; a second pass
    sees the best patches only, with their position embeddings, and CLS. There the first pass is by
    a moving average of the weights and removal is for training (half of 14 × 14 patches, in blocks
    of 2 × 2, averaged bilinearly); here both passes use the model's own weights and the projector
    gets the patches left, in reading order. The tower costs a whole pass and a shorter one.

    Args:
        retention: kept ÷ all visual tokens, in (0, 1]; the paper's is 0.5.
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        block: side of the squares of patches that stay or go together, ≥ 1; the official code's
            is 2. The budget is rounded down to whole blocks, at least one.
        positions: whether kept tokens get contiguous position ids.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: its use at inference in front of a language model, `block` 1 and
    contiguous positions are [inferred]; a tower without CLS is scored by the mean attention
    received [inferred]. The official code keeps one block more than the share says.
    """

    name: ClassVar[str] = "attentive_removal"

    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    block: Annotated[int, Ge(1)] = 1
    positions: Literal["keep", "reindex"] = "reindex"

    def refuses(self, family: Family) -> str | None:
        """Grids that blocks do not tile."""
        grid = None if family.encoder is None else family.encoder.grid
        if grid is not None and any(side % self.block for side in grid):
            return (
                f"blocks of {self.block} × {self.block} patches do not tile the vision tower's "
                f"grid of {grid[0]} × {grid[1]}; choose another block"
            )
        return super().refuses(family)

    def count(self, cut: Cut, tokens: int, layers: int) -> int:
        """Whole blocks."""
        del cut, layers
        return self._kept(tokens)

    def _kept(self, tokens: int) -> int:
        area = self.block**2
        return max(1, self.budget(tokens) // area) * area

    def enter(self, run: TowerRun, hidden: Tensor) -> Tensor:
        """Look, and remove."""
        score = self._blocks(run, first_look(run, hidden))
        run.scores[0] = score
        kept = self._best(run, score) if run.forced is None else run.forced.kept
        if bool(kept.all()):
            return hidden
        step = removal(run.tokens[0], kept, run.lead)
        run.steps[0], run.tokens[0] = step, step.after
        return step.picked(hidden)

    def judge(self, run: TowerRun) -> Scores:
        """Attention in the first pass, ``[I, V]``."""
        return Scores(run.scores[0], log_probability(run.scores[0]), chosen=run.final.survivors())

    def _blocks(self, run: TowerRun, score: Tensor) -> Tensor:
        """The mean over each patch's block."""
        if self.block == 1:
            return score
        grid = score.view(-1, 1, *run.encoder.grid)
        pooled = torch.nn.functional.avg_pool2d(grid, self.block)
        return self._spread(pooled).flatten(1)

    def _spread(self, blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(self.block, -1).repeat_interleave(self.block, -2)

    def _best(self, run: TowerRun, score: Tensor) -> Tensor:
        """The best blocks, bool ``[I, V]``."""
        grid = score.detach().view(-1, *run.encoder.grid)[:, :: self.block, :: self.block]
        number = self._kept(run.patches) // self.block**2
        best = top_k_mask(grid.flatten(1), number)
        return self._spread(best.view(grid.shape)).flatten(1)


def first_look(run: TowerRun, hidden: Tensor) -> Tensor:
    """Attention to each patch in a whole pass, mean over layers and heads: ``[I, V]``, live.

    Modules inside the layers are called one by one: whoever listens to the layers hears only the
    pass that counts.
    """
    found = []
    for block in run.encoder.blocks:
        normed, attention = block.layer_norm1(hidden), block.self_attn
        scaling = float(attention.scale)
        keys = in_heads(attention.k_proj(normed), attention)
        asking = normed[:, :1] if run.lead else normed
        queries = in_heads(attention.q_proj(asking), attention)
        if run.lead:
            paid = attention_row(queries[:, :, 0], keys, scaling)
        else:
            paid = received_attention(queries, keys, scaling)
        found.append(paid.mean(1)[:, run.lead :])
        hidden = hidden + attention(hidden_states=normed, attention_mask=None)[0]
        hidden = hidden + block.mlp(block.layer_norm2(hidden))
    return torch.stack(found).mean(0)
