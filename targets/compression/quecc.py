"""QueCC: a few tokens, down to one, that read the picture with the question in mind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression import cells, trained
from targets.compression.aside import question_state
from targets.compression.base import Compressor, Merged, Scores, Seen, Selection, Stage
from targets.compression.quecc_net import QueryCompressor, windows
from targets.compression.scoring import log_probability, precise
from targets.errors import CompressionError

if TYPE_CHECKING:
    from targets.families.base import Family

_LEVELS: Final = (12, 16, 22)
"""Hidden states that make keys and values besides the features, which are number 23."""
_FEATURES: Final = 23


@dataclass(frozen=True, kw_only=True)
class QueCC(Compressor):
    """Make one token of every window of s × s patches, by attention that knows the question.

    Paper: Li et al., "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters" (ICLR
    2025, arXiv 2411.03312). With x the features, x' the features of several tower layers and t the
    language model's last hidden state for the question alone: ``x ← x + LN(W t)``; queries are an
    MLP of x under a depthwise convolution with kernel and stride s; keys and values are MLPs of x';
    each query attends to its own window only; the result goes through a projector trained with it.
    It acts between vision tower and projector and is trained: without weights of its own for a
    model it is average pooling.

    Args:
        retention: tokens made ÷ all visual tokens, in (0, 1]: the largest (side / s)² that is not
            more, with s a divisor of the side of the grid that the weights know; of 12 × 12 tokens
            36, 16, 9, 4 or 1. The smallest one is used where all are more.
        keep_tokens: at most so many tokens, ≥ 1, instead of retention.
        weights: trained weights, by the name of the scenes model they are shipped with
            (``scenes-a``) or as a folder; ``none`` is the untrained mode: every token is the mean
            of its window's features, through the model's own projector; no question is asked.
        positions: new tokens have contiguous position ids; with ``keep`` each has the position of
            the patch in the middle of its window.

    Raises:
        CompressionError: for an option outside its range, or weights that cannot be read.

    The score of a patch is the attention its window's token pays it (head mean; each window sums to
    1); nothing is selected by it. The whole budget (1) leaves the model as it is.

    *Differs from the paper in …*: one network serves all window sizes, with a convolution for each
    (there: one a size). The shipped weights add the window's mean feature to what is read (a
    residual, ``"residual": false`` in their config.json is the official form), so that training
    begins with average pooling; language model and tower were frozen in their training. Keys and
    values come from hidden states 12, 16, 22 and 23 of CLIP's 24 layers there, from the layers in
    proportion (without repetitions) here. The question is the text behind the last image, the end
    of the chat template included; the official code cuts it out of the prompt by its words.
    Input and output maps of the attention are [inferred], and so are window sizes other than 4.
    Square grids only, one picture one grid.
    """

    name: ClassVar[str] = "quecc"

    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    weights: str = "scenes-a"
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """Before the projector."""
        return Stage.VISION

    @property
    def merges(self) -> bool:
        """All its tokens are new."""
        return True

    def tower_layers(self, layers: int, feature_layer: int) -> tuple[int, ...]:
        """Those keys and values are made from."""
        del layers
        return levels_of(feature_layer)

    def refuses(self, family: Family) -> str | None:
        """Pictures that are no square grid, and weights of another model."""
        return cells.refusal(family) or trained.misfit(self.name, self.weights, family)

    def budget(self, tokens: int) -> int:
        """(side / s)²; all tokens where the whole budget is given."""
        most, side = super().budget(tokens), cells.side_of(tokens)
        if most >= tokens:
            return tokens
        return (side // self.stride(side, most)) ** 2

    def stride(self, side: int, most: int) -> int:
        """The smallest known window of a grid that makes at most so many tokens; else the largest.

        Raises:
            CompressionError: if the weights know no window that divides the grid.
        """
        known = range(2, side + 1) if self._network is None else self._strides
        fitting = sorted(s for s in known if side % s == 0)
        if not fitting:
            raise CompressionError(
                f"compressor quecc: the weights {self.weights!r} know windows of "
                f"{', '.join(map(str, known))}, none of which divides a grid of {side} × {side}"
            )
        return next((s for s in fitting if (side // s) ** 2 <= most), fitting[-1])

    def score(self, seen: Seen) -> Scores:
        """What each patch gives to its window's token, ``[I, V]``; 1/s² untrained."""
        side, stride = self._shape(seen)
        if self._network is None:
            paid = torch.full(seen.valid.shape, stride**-2.0, device=seen.features.device)
        else:
            paid = self._read(seen, side, stride)[1].flatten(1)
        return Scores(paid, log_probability(paid))

    @torch.no_grad()
    def select(self, scores: Scores, seen: Seen) -> Selection:
        """The patch in the middle of every window."""
        del scores
        kept = torch.zeros_like(seen.valid)
        kept[:, self._centres(*self._shape(seen)).to(kept.device)] = True
        return Selection(kept & (seen.counts > 0)[:, None])

    def merge(self, selection: Selection, seen: Seen) -> Merged:
        """A token for each window; with a forced selection, for windows whose middle is kept."""
        side, stride = self._shape(seen)
        sources = self._centres(side, stride).to(seen.features.device)
        left = cells.pick(selection, sources)
        if self._network is None:
            mean = windows(_grid(seen.features, side), stride).mean(3).flatten(1, 2)
            return cells.merged(mean, sources, left, projected=False)
        tokens = self._read(seen, side, stride)[0].to(seen.features.dtype)
        return cells.merged(tokens, sources, left, projected=True)

    def _shape(self, seen: Seen) -> tuple[int, int]:
        side = cells.grid_of(seen, self.name)
        most = int(seen.counts.amax())
        return side, self.stride(side, most)

    @staticmethod
    def _centres(side: int, stride: int) -> Tensor:
        middle = torch.arange(side // stride) * stride + stride // 2
        return (middle[:, None] * side + middle).flatten()

    def _read(self, seen: Seen, side: int, stride: int) -> tuple[Tensor, Tensor]:
        """Tokens and attention of the network, at least in float32; once for score and merge."""
        found: tuple[Tensor, Tensor, Tensor] | None = seen.memory.get("read")
        if found is None or found[0] is not seen.features:
            found = seen.features, *self._reads(seen, side, stride)
            seen.memory["read"] = found
        return found[1], found[2]

    def _reads(self, seen: Seen, side: int, stride: int) -> tuple[Tensor, Tensor]:
        network = self._network
        if network is None or seen.vision is None or seen.text is None:
            raise CompressionError("quecc needs to see the vision tower run, and the prompt")
        if "question" not in seen.memory:
            seen.memory["question"] = question_state(seen.text)
        question: Tensor = seen.memory["question"]
        levels = [seen.vision.hidden(layer) for layer in levels_of(seen.vision.feature_layer)]
        features = _grid(precise(seen.features), side)
        joined = _grid(torch.cat(levels, -1).to(features.dtype), side)
        asked = question[seen.rows].to(features.dtype)
        network.to(features.device, features.dtype)
        tokens, paid = network(features, joined, asked, stride)
        return tokens, paid

    @property
    def _strides(self) -> tuple[int, ...]:
        network = self._network
        return () if network is None else tuple(int(s) for s in network.shrink)

    @cached_property
    def _network(self) -> QueryCompressor | None:
        """The trained network; None in the untrained mode."""
        if self.weights == trained.UNTRAINED:
            return None
        found = trained.read(self.name, self.weights)
        network: Any = trained.seeded(QueryCompressor, found.network)
        found.fill(network, self.name)
        made: QueryCompressor = network
        return made


def levels_of(feature_layer: int) -> tuple[int, ...]:
    """Tower layers (0-based) of keys and values, in the paper's proportion; the last the features'.

    Args:
        feature_layer: the layer whose output the projector gets, 0-based.
    """
    depth = feature_layer + 1
    chosen = {max(1, round(level * depth / _FEATURES)) - 1 for level in _LEVELS}
    return tuple(sorted({*chosen, feature_layer}))


def _grid(values: Tensor, side: int) -> Tensor:
    """``[I, side², D]`` as ``[I, side, side, D]``."""
    return values.reshape(len(values), side, side, -1)
