"""TokenFLEX: a projector that makes any number of tokens of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval

from targets.compression import cells, trained
from targets.compression.base import Compressor, Merged, Scores, Seen, Selection, Stage
from targets.compression.scoring import precise, standardised
from targets.compression.tokenflex_net import FlexProjector, centres, pooled
from targets.errors import CompressionError

if TYPE_CHECKING:
    from targets.families.base import Family


@dataclass(frozen=True, kw_only=True)
class TokenFLEX(Compressor):
    """Pool the tower's features to n × n and project them with a projector trained for many n.

    Paper: "TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference" (arXiv
    2504.03154).
    ``tokens = W3 (silu(W1 x) · W2 x)`` with ``x = LN(adaptive average pool(features))``; any n may
    be used at inference. It is trained: without weights of its own for a model it is plain
    adaptive pooling of the model's projected tokens, the baseline `pool`.

    Args:
        retention: tokens made ÷ all visual tokens, in (0, 1]; n² is the largest square not more.
        keep_tokens: at most so many tokens, ≥ 1, instead of retention.
        weights: trained weights, by the name of the scenes model they are shipped with
            (``scenes-a``) or as a folder; ``none`` is the untrained mode.
        positions: new tokens have contiguous position ids; with ``keep`` each has the position of
            the patch in the middle of its cell.

    Raises:
        CompressionError: for an option outside its range, or weights that cannot be read.

    Nothing is selected: the score is the same for all patches and has no gradient, features carry
    all of it. The whole budget (1) leaves the model and its own projector as they are.

    *Differs from the paper in …*: where the norm stands is [unknown] there and before the
    perceptron here [inferred]. Language model and tower were frozen in the training of the shipped
    weights (three stages with a growing share of the model there), and their sizes in training are
    n = 4, 6, 8 of a grid of 12 (8, 12, 16 of 27 there). Square grids only, one picture one grid.
    """

    name: ClassVar[str] = "tokenflex"

    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    weights: str = "scenes-a"
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """In place of the projector."""
        return Stage.VISION

    @property
    def merges(self) -> bool:
        """All its tokens are new."""
        return True

    def refuses(self, family: Family) -> str | None:
        """Pictures that are no square grid, and weights of another model."""
        return cells.refusal(family) or trained.misfit(self.name, self.weights, family)

    def budget(self, tokens: int) -> int:
        """n²."""
        return cells.side_of(super().budget(tokens)) ** 2

    def score(self, seen: Seen) -> Scores:
        """The same for all, ``[I, V]``."""
        score = torch.ones(seen.valid.shape, device=seen.features.device)
        return Scores(score, standardised(score, seen.valid))

    @torch.no_grad()
    def select(self, scores: Scores, seen: Seen) -> Selection:
        """The patch in the middle of every cell."""
        del scores
        side, count = self._shape(seen)
        kept = torch.zeros_like(seen.valid)
        kept[:, centres((side, side), count).to(kept.device)] = True
        return Selection(kept & (seen.counts > 0)[:, None])

    def merge(self, selection: Selection, seen: Seen) -> Merged:
        """A token for each cell; with a forced selection, for cells whose middle is kept."""
        side, count = self._shape(seen)
        shape = (side, side)
        sources = centres(shape, count).to(seen.features.device)
        left = cells.pick(selection, sources)
        network = self._network
        if network is None:
            if seen.projected is None:
                raise CompressionError("tokenflex needs the projected tokens in its untrained mode")
            tokens = pooled(seen.projected, shape, count)
        else:
            features = precise(seen.features)
            network.to(features.device, features.dtype)
            tokens = network(features, shape, count).to(seen.features.dtype)
        return cells.merged(tokens, sources, left, projected=True)

    def _shape(self, seen: Seen) -> tuple[int, int]:
        """Side of the grid, and n."""
        return cells.grid_of(seen, self.name), cells.side_of(int(seen.counts.amax()))

    @cached_property
    def _network(self) -> FlexProjector | None:
        """The trained network; None in the untrained mode."""
        if self.weights == trained.UNTRAINED:
            return None
        found = trained.read(self.name, self.weights)
        network: Any = trained.seeded(FlexProjector, found.network)
        found.fill(network, self.name)
        made: FlexProjector = network
        return made
