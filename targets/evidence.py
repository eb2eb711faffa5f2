"""Which visual tokens carry an answer, layer by layer, and the layer behind which none does.

Tokens are really removed (`targets.compression`), never set to zero or to a mean: a removed column
leaves the others' distribution as it is, which a filled-in one does not. (The same is argued for
convolutional networks by Balasubramanian and Feizi, "Towards Improved Input Masking for
Convolutional Neural Networks", ICCV 2023.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from targets.compression.base import Selection
from targets.compression.drop_all import DropAll
from targets.compression.random import Random

if TYPE_CHECKING:
    from targets.lvlm import LVLM


@dataclass(frozen=True, slots=True)
class EvidenceMap:
    """What each visual token of one picture does for one answer, from a layer on.

    Attributes:
        layer: tokens are removed at its input.
        full: probability of the answer with all tokens.
        none: with no visual token from that layer on.
        only: ``[V]`` with only token k, minus `none`: its information.
        without: `full` minus the probability with all but token k, ``[V]``: its necessity.
    """

    layer: int
    full: float
    none: float
    only: Tensor
    without: Tensor


@torch.no_grad()
def evidence_map(
    target: LVLM, image: Tensor, question: str, answer: str, *, layer: int = 0, batch: int = 32
) -> EvidenceMap:
    """The evidence map of one sample (Information-Horizon, arXiv 2512.07580, its diagnostic).

    Args:
        target: the model.
        image: ``[1, 3, H, W]`` in [0, 1].
        question: the text.
        answer: whose probability is followed, end token included.
        layer: tokens are removed at its input, 0-based.
        batch: sets of tokens worked on at a time.
    """
    tokens = target.layout((image.shape[-2], image.shape[-1])).tokens
    each = torch.eye(tokens, dtype=torch.bool, device=target.device)

    def probability(sets: Tensor) -> Tensor:
        parts = torch.split(sets, batch)
        return torch.cat([_probability(target, image, question, answer, layer, s) for s in parts])

    full = target.answer_logprob(image, [question], [answer]).exp()
    none = target.answer_logprob(image, [question], [answer], compressor=DropAll(layer=layer)).exp()
    # Without its only token a picture has none.
    rest = probability(~each) if tokens > 1 else none
    return EvidenceMap(layer, float(full), float(none), probability(each) - none, full - rest)


def _probability(
    target: LVLM, image: Tensor, question: str, answer: str, layer: int, sets: Tensor
) -> Tensor:
    """Probability of the answer with each set of tokens ``[S, V]`` from a layer on: ``[S]``."""
    count = len(sets)
    # Whatever it would choose, the sets are imposed; it only says where.
    carrier = Random(layer=layer, retention=1.0, positions="keep")
    logprobs = target.answer_logprob(
        image.expand(count, -1, -1, -1),
        [question] * count,
        [answer] * count,
        compressor=carrier,
        kept=Selection(sets),
    )
    return logprobs.exp()


@dataclass(frozen=True, slots=True)
class Horizon:
    """How much the answer loses when all visual tokens are removed at a layer.

    Attributes:
        loss: mean drop of the answer's log-probability at each layer's input, ``[layers]``.
        layer: first layer from which on every drop is at most the tolerance; the number of layers
            if there is none.
        tolerance: in nats.
        samples: n.
    """

    loss: tuple[float, ...]
    layer: int
    tolerance: float
    samples: int


@torch.no_grad()
def find_horizon(
    target: LVLM,
    batches: Sequence[tuple[Tensor, Sequence[str], Sequence[str]]],
    *,
    tolerance: float = 0.01,
) -> Horizon:
    """The layer behind which visual tokens no longer matter to the answers.

    The cheap form of the diagnostic in arXiv 2512.07580 [inferred]: instead of every token alone,
    all are removed together at each layer, and the mean drop of the answer's log-probability is
    taken.

    Args:
        target: the model.
        batches: images ``[B, 3, H, W]``, questions and right answers; B ≥ 1 in all.
        tolerance: largest mean drop that counts as none, in nats, ≥ 0.
    """
    layers = len(target.family.layers)
    total, count = torch.zeros(layers, dtype=torch.float64), 0
    for images, questions, answers in batches:
        full = target.answer_logprob(images, questions, answers)
        count += len(images)
        for layer in range(layers):
            cut = DropAll(layer=layer)
            blind = target.answer_logprob(images, questions, answers, compressor=cut)
            total[layer] += float((full - blind).sum())
    loss = (total / max(1, count)).tolist()
    late = [layer for layer in range(layers) if max(loss[layer:]) <= tolerance]
    return Horizon(tuple(loss), late[0] if late else layers, tolerance, count)
