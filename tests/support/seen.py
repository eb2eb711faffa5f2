"""What a compressor sees, built by hand for tests that call it without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from targets.compression.base import Cut, Seen, Stage
from targets.compression.layout import Lattice
from targets.families.vision import LayerPass, VisionPass, padded, whole_runs
from targets.preprocessing.layout import Layout


def seen(
    features: Tensor,
    counts: int | Sequence[int] | Tensor,
    *,
    valid: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    layouts: Sequence[Layout] | None = None,
    stage: Stage = Stage.INPUT,
    **more: Any,
) -> Seen:
    """What is seen of images with tokens ``features [I, V, D]``.

    Args:
        features: tokens.
        counts: tokens to keep, of each image or of all.
        valid: places that hold a token; all if None.
        seeds: of the images; zeros if None.
        layouts: of the images; if None, squares where the number of tokens is one, else rows, as
            long as the last valid place.
        stage: where it is.
        more: other fields of `Seen`.
    """
    images, width = features.shape[:2]
    if valid is None:
        valid = torch.ones(images, width, dtype=torch.bool)
    if layouts is None:
        layouts = [grid(int(row.nonzero().amax()) + 1 if bool(row.any()) else 1) for row in valid]
    if isinstance(counts, int):
        counts = [counts] * images
    fields: dict[str, Any] = {
        "features": features,
        "counts": torch.as_tensor(counts),
        "seeds": tuple(seeds) if seeds is not None else (0,) * images,
        "valid": valid,
        "totals": torch.tensor([one.tokens for one in layouts]),
        "cut": Cut(stage),
        "lattice": lattice(layouts, width),
        "rows": torch.arange(images),
    }
    return Seen(**{**fields, **more})


def grid(tokens: int) -> Layout:
    """One tile: a square if it can be one, else a row."""
    side = round(tokens**0.5)
    return Layout.grid((side, side) if side * side == tokens else (1, tokens))


def tiled(*shapes: tuple[int, int]) -> Layout:
    """Tiles one after the other; the first shows the whole picture."""
    parts = [Layout.grid(shape) for shape in shapes]
    tile = torch.cat([torch.full((one.tokens,), index) for index, one in enumerate(parts)])
    count = len(tile)
    return Layout(
        torch.cat([one.boxes for one in parts]),
        tile,
        torch.cat([one.row for one in parts]),
        torch.cat([one.column for one in parts]),
        shapes,
        0,
        torch.arange(count),
        count,
    )


def lattice(layouts: Sequence[Layout], width: int) -> Lattice:
    """The lattice of the layouts over `width` places."""
    found = Lattice.of(layouts, torch.device("cpu"))
    pad = (0, width - found.tile.shape[1])
    parts = [torch.nn.functional.pad(part, pad) for part in (found.tile, found.row, found.column)]
    return Lattice(*parts, found.layouts)


def vision_pass(
    hidden: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    has_cls: bool = True,
    scaling: float | None = None,
    tiles: Sequence[int] | None = None,
    layers: dict[int, LayerPass] | None = None,
    feature_layer: int = 0,
) -> VisionPass:
    """A pass of a tower over G runs of S positions: ``hidden [G, S, D]``, ``queries [G, N, S, E]``.

    Args:
        hidden: of the feature layer.
        queries: of its attention.
        keys: of its attention.
        has_cls: whether position 0 is CLS.
        scaling: factor on query · key; E^−½ if None.
        tiles: runs of each image, one after the other, every patch a token; None is one each.
        layers: further layers.
        feature_layer: number of the one given.
    """
    runs, length = hidden.shape[:2]
    patches = length - int(has_cls)
    if tiles is None:
        patches_of, present, base = whole_runs(runs, patches, hidden.device)
    else:
        ends = torch.tensor([0, *tiles]).cumsum(0)
        spans = zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        parts = [torch.arange(a * patches, b * patches)[:, None] for a, b in spans]
        patches_of, present = padded(parts)
        base = ends[:-1]
    here = LayerPass(hidden, queries, keys)
    scaling = queries.shape[-1] ** -0.5 if scaling is None else scaling
    return VisionPass(
        {feature_layer: here, **(layers or {})},
        feature_layer,
        scaling,
        has_cls,
        patches_of,
        present,
        base,
    )


def seen_by_tower(vision: VisionPass, counts: int | Sequence[int] | Tensor, **more: Any) -> Seen:
    """What a compressor at Stage.VISION that wants attention sees of a pass."""
    fields: dict[str, Any] = {
        "valid": vision.present,
        "stage": Stage.VISION,
        "attention": vision.attention(),
        "query": vision.query,
        "keys": vision.patch_keys,
        "vision": vision,
    }
    return seen(vision.patches, counts, **{**fields, **more})


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_pass(
    runs: int,
    patches: int,
    *,
    seed: int = 0,
    heads: int = 2,
    width: int = 6,
    depth: int = 3,
    feature_layer: int = 1,
    tiles: Sequence[int] | None = None,
    has_cls: bool = True,
) -> VisionPass:
    """A pass of random layers, loud enough that attention is far from flat."""
    length = patches + int(has_cls)

    def layer(number: int) -> LayerPass:
        start = 1000 * seed + 10 * number
        hidden = normal(runs, length, heads * width, seed=start)
        queries, keys = (normal(runs, heads, length, width, seed=start + i) * 2 for i in (1, 2))
        return LayerPass(hidden, queries, keys)

    every = {number: layer(number) for number in range(depth)}
    here = every[feature_layer]
    return vision_pass(
        here.hidden,
        here.queries,
        here.keys,
        has_cls=has_cls,
        tiles=tiles,
        layers=every,
        feature_layer=feature_layer,
    )


def prefix(lengths: Sequence[int], width: int) -> Tensor:
    """Which of `width` places images of these lengths have, bool ``[I, width]``."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def alone(one: Seen, image: int) -> Seen:
    """One image of what is seen, as if it were the only one, without places it does not have."""
    width = one.lattice.layouts[image].tokens
    here = slice(image, image + 1)

    def part(values: Tensor | None, dim: int = 1) -> Tensor | None:
        return None if values is None else values[here].narrow(dim, 0, width)

    vision = one.vision
    if vision is not None:
        vision = replace(
            vision,
            patches_of=vision.patches_of[here, :width],
            present=vision.present[here, :width],
            base=vision.base[here],
        )
    return replace(
        one,
        features=part(one.features),
        counts=one.counts[here],
        seeds=one.seeds[here],
        valid=part(one.valid),
        totals=one.totals[here],
        lattice=lattice(one.lattice.layouts[here], width),
        rows=one.rows[:1] * 0,
        attention=part(one.attention, 2),
        query=None if one.query is None else one.query[here],
        keys=part(one.keys, 2),
        projected=part(one.projected),
        vision=vision,
        memory={},
    )


def spoiled(one: Seen) -> Seen:
    """The same with garbage wherever no token is."""
    gone = ~one.valid

    def part(values: Tensor | None, dim: int = 1) -> Tensor | None:
        if values is None:
            return None
        where = gone.reshape(len(gone), *[1] * (dim - 1), -1, *[1] * (values.dim() - dim - 1))
        return values.masked_fill(where, torch.nan)

    return replace(
        one,
        features=part(one.features),
        attention=part(one.attention, 2),
        keys=part(one.keys, 2),
        projected=part(one.projected),
    )


def places(kept: Tensor) -> set[int]:
    """Indices of True."""
    return set(kept.nonzero().flatten().tolist())
