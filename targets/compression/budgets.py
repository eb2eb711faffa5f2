"""Budgets of compressors that drop tokens in several stages: at which layers, and how many stay.

"192 tokens" of a method inside the language model is sometimes what is left at the end and
sometimes the mean over its layers. Both are offered; this module turns one into the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from targets.errors import CompressionError

_ROUNDING = 1e-6
"""Shares such as 0.125^(1/3) must not lose a token to the last binary digit."""


def scaled_layers(official: Sequence[int], depth: int, layers: int) -> tuple[int, ...]:
    """Layers of a model of another depth that lie where the official ones do.

    Args:
        official: 0-based, ascending, ≥ 1.
        depth: layers of the model they are meant for.
        layers: layers of this model.

    Returns:
        As many layers, ``round(l · layers / depth)``, moved apart until they are distinct, ≥ 1 and
        below `layers`; all from 1 on where there are not that many.

    Raises:
        CompressionError: if this model has no layer but layer 0.
    """
    if layers < 2:
        raise CompressionError(
            "a language model of one layer has no layer at whose input tokens could be dropped by "
            "its attention"
        )
    if len(official) >= layers:
        return tuple(range(1, layers))
    found: list[int] = []
    for place, layer in enumerate(official):
        wanted = math.floor(layer * layers / depth + 0.5)
        least = found[-1] + 1 if found else 1
        most = layers - (len(official) - place)
        found.append(min(max(wanted, least), most))
    return tuple(found)


def checked_layers(name: str, layers: Sequence[int], first: int = 1) -> None:
    """Refuse layer options that are not ascending from `first` on.

    Raises:
        CompressionError: naming the compressor.
    """
    ascending = all(a < b for a, b in itertools.pairwise(layers))
    if not layers or layers[0] < first or not ascending:
        raise CompressionError(
            f"compressor {name}: layers are {list(layers)}; give one or more 0-based layers of the "
            f"language model, ascending, the first at least {first}"
        )


def checked_shares(name: str, shares: Sequence[float] | None, stages: int) -> None:
    """Refuse shares that are not one for each stage but the last, descending within (0, 1].

    Raises:
        CompressionError: naming the compressor.
    """
    if shares is None:
        return
    falling = all(a >= b for a, b in itertools.pairwise(shares))
    if len(shares) != stages - 1 or not falling or not all(0 < one <= 1 for one in shares):
        raise CompressionError(
            f"compressor {name}: shares are {list(shares)}; give {stages - 1} of them, one for "
            "each stage but the last, in (0, 1], none larger than the one before"
        )


def power_stages(shares: Sequence[float], tokens: int, final: int) -> tuple[int, ...]:
    """Counts after each stage, in proportions that follow official ones.

    With s_1 … s_S the official shares of all tokens and r = final ÷ tokens, stage i keeps
    ``r ** (ln s_i / ln s_S)``: the official shares where r = s_S, and everything where r = 1. For
    shares λ, λ², …, λ^S these are the powers of r^(1/S).

    Args:
        shares: official, descending, the last in (0, 1).
        tokens: of the image before any stage.
        final: to be left after the last stage, 1 ≤ final ≤ tokens.

    Returns:
        Descending counts, rounded down, the last is `final`.
    """
    retention = final / tokens
    powers = [math.log(share) / math.log(shares[-1]) for share in shares[:-1]]
    return descending([tokens * retention**power for power in powers], tokens, final)


def fixed_stages(shares: Sequence[float], tokens: int, final: int, number: int) -> tuple[int, ...]:
    """Counts after each of `number` stages for given shares of all but the last one.

    Raises:
        CompressionError: if there are more or fewer stages.
    """
    if len(shares) != number - 1:
        raise CompressionError(
            f"{len(shares)} shares were given, but this model has {number} stages; give "
            f"{number - 1} of them, or name the layers"
        )
    return descending([tokens * share for share in shares], tokens, final)


def table_stages(
    table: Sequence[tuple[float, Sequence[int]]], whole: int, tokens: int, wanted: float
) -> list[float]:
    """Counts after each stage, interpolated between the rows of a published table.

    Below the last row the counts shrink with its name in proportion; above the first they approach
    `whole` at every stage.

    Args:
        table: rows of a name (a number of tokens) and counts; names descend.
        whole: tokens of the images the table is for.
        tokens: of this image.
        wanted: name of the row wanted, for this image.
    """
    name = wanted * whole / tokens
    stages = len(table[0][1])
    rows = [(whole, [whole] * stages), *table, (0, [0] * stages)]
    upper, lower = next((a, b) for a, b in itertools.pairwise(rows) if name >= b[0])
    share = (name - lower[0]) / (upper[0] - lower[0])
    mixed = [low + share * (high - low) for high, low in zip(upper[1], lower[1], strict=True)]
    return [one * tokens / whole for one in mixed]


def descending(earlier: Sequence[float], tokens: int, final: int) -> tuple[int, ...]:
    """Whole counts that never grow from stage to stage, each rounded down, and `final` at last."""
    counts: list[int] = []
    for one in earlier:
        most = counts[-1] if counts else tokens
        counts.append(min(max(int(one + _ROUNDING), final), most))
    return (*counts, final)


def layer_average(counts: Sequence[int], starts: Sequence[int], layers: int, tokens: int) -> float:
    """Mean over the language model's layers of an image's tokens.

    Args:
        counts: left after each stage.
        starts: layer at whose input each stage acts, ascending; 0 is before the model.
        layers: of the language model.
        tokens: of the image before any stage.
    """
    ends = [*starts[1:], layers]
    spans = zip(counts, starts, ends, strict=True)
    held = sum(count * (end - start) for count, start, end in spans)
    return (tokens * starts[0] + held) / layers


def final_for_average(
    name: str,
    stages: Callable[[int], Sequence[int]],
    starts: Sequence[int],
    layers: int,
    tokens: int,
    wanted: int,
) -> int:
    """Final count whose stages have, as nearly as whole tokens allow, a given layer average.

    Args:
        name: of the compressor.
        stages: counts after each stage for a final count; grows with it.
        starts: layer at whose input each stage acts.
        layers: of the language model.
        tokens: of the image.
        wanted: mean over the layers of the tokens of this image.

    Raises:
        CompressionError: if even one token at the end leaves more than `wanted` on average.
    """

    def average(final: int) -> float:
        return layer_average(stages(final), starts, layers, tokens)

    low, high = 1, tokens
    if average(low) > wanted + 0.5:
        raise CompressionError(
            f"compressor {name}: {wanted} of {tokens} tokens on average over {layers} layers is "
            f"below {average(low):.1f}, what dropping at layers {list(starts)} reaches; drop at "
            "earlier layers (option layers) or keep more"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if average(middle) <= wanted else (low, middle)
    return min((low, high), key=lambda final: (abs(average(final) - wanted), final))
