"""What a vision tower computed on the way to the features, captured by hooks on one instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from targets.compression.scoring import attention_row, precise, received_attention
from targets.errors import TargetError

_TAPS = "_open_vision_taps"


class FeaturesReached(Exception):
    """Raised inside the tower to skip the layers nobody needs."""


@dataclass(frozen=True, slots=True)
class LayerPass:
    """One layer of a vision tower over G runs (pictures or tiles); every tensor is live.

    Attributes:
        hidden: ``[G, S, D]`` output of the layer, CLS first where there is one.
        queries: ``[G, N, S, E]`` of its attention.
        keys: ``[G, N, S, E]``.
        values: ``[G, N, S, E]``; None where the tap did not listen to them.
        out: the projection behind attention, ``[G, S, N·E]`` to ``[G, S, D]``; None likewise.
    """

    hidden: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor | None = None
    out: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class VisionPass:
    """One pass of the vision tower, seen token by token of the language model.

    A token stands for r patches (a pixel-shuffled block, a merged 2 × 2 group, or 1); attention and
    keys of a token are the mean over its patches, its features are theirs, one after the other.

    Attributes:
        layers: captured layers by number, the feature layer among them.
        feature_layer: the layer whose output the projector gets.
        scaling: factor on query · key.
        has_cls: whether position 0 of a run is CLS; then S = P + 1, else S = P patches.
        patches_of: long ``[I, V, r]`` patches of each token, counted over all runs (run · P +
            patch); 0 where `present` is False.
        present: bool ``[I, V]``, tokens an image really has.
        base: long ``[I]``, the run that shows the whole of each image.
        features: ``[I, V, r · D]`` what enters the projector, if it is not just the patches'
            features (a normalisation in between); None for those.
    """

    layers: dict[int, LayerPass]
    feature_layer: int
    scaling: float
    has_cls: bool
    patches_of: Tensor
    present: Tensor
    base: Tensor
    features: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """``[I, V, r · D]`` features of the tokens, as they enter the projector."""
        if self.features is not None:
            return self.features
        return self.per_token(self._bare(self.layers[self.feature_layer].hidden, 1)).flatten(2)

    @property
    def cls(self) -> Tensor | None:
        """``[I, D]`` feature of CLS in each image's base run; None without CLS."""
        return self.layers[self.feature_layer].hidden[self.base, 0] if self.has_cls else None

    @property
    def query(self) -> Tensor | None:
        """``[I, N, E]`` the CLS query of each image's base run; None without CLS."""
        if not self.has_cls:
            return None
        return self.layers[self.feature_layer].queries[self.base, :, 0]

    @property
    def patch_keys(self) -> Tensor:
        """``[I, N, V, E]`` keys of the tokens at the feature layer."""
        return self.keys()

    def keys(self, layer: int | None = None) -> Tensor:
        """``[I, N, V, E]`` keys of the tokens at a captured layer (the feature layer if None)."""
        found = self._bare(self._layer(layer).keys, 2).transpose(1, 2)
        return self.per_token(found).mean(2).transpose(1, 2)

    def hidden(
        self, layer: int | None = None, norm: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """``[I, V, D]`` a captured layer's output, mean over the patches of a token.

        Args:
            layer: the feature layer if None.
            norm: applied to every patch before.
        """
        found = self._bare(self._layer(layer).hidden, 1)
        return self.per_token(found if norm is None else norm(found)).mean(2)

    def values(
        self,
        layer: int | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
        *,
        smoothing: int = 0,
        keys: int | None = None,
    ) -> Tensor:
        """``[I, V, r · D]`` values of a captured layer behind its output projection.

        That is what a token would give if it were attended to alone.

        Args:
            layer: the feature layer if None.
            norm: applied to every patch behind the projection.
            smoothing: how often every head averages its values first, by ``softmax(k kᵀ)``.
            keys: captured layer whose keys k are; the layer itself if None.

        Raises:
            TargetError: if the family's tap does not listen to values.
        """
        here = self._layer(layer)
        if here.values is None or here.out is None:
            raise TargetError(
                "the adapter of this family does not say where its vision tower makes values "
                "(TappedLayer.value and out)"
            )
        mixed = here.values
        if smoothing:
            mixed = self._smoothed(mixed, self._layer(layer if keys is None else keys), smoothing)
        found = self._bare(here.out(mixed.transpose(1, 2).flatten(2)), 1)
        return self.per_token(found if norm is None else norm(found)).flatten(2)

    def _smoothed(self, values: Tensor, by: LayerPass, times: int) -> Tensor:
        """Values ``[G, N, S, E]`` averaged by key–key attention within each run."""
        return averaged(values, by.keys, self.scaling, times)

    def attention(self, layer: int | None = None) -> Tensor:
        """``[I, N, V]`` attention of CLS to the patches of its run; received without CLS."""
        if not self.has_cls:
            return self.received(layer)
        here = self._layer(layer)
        paid = attention_row(here.queries[:, :, 0], here.keys, self.scaling)
        return self._tokens(paid[:, :, 1:])

    def received(self, layer: int | None = None) -> Tensor:
        """``[I, N, V]`` mean attention received from all positions of the run, CLS included."""
        here = self._layer(layer)
        return self._tokens(
            self._bare(received_attention(here.queries, here.keys, self.scaling), 2)
        )

    def per_token(self, values: Tensor) -> Tensor:
        """Values ``[G, P, …]`` of patches, gathered by token: ``[I, V, r, …]``."""
        if self._is_plain(values):
            return values.unsqueeze(2)
        return values.flatten(0, 1)[self.patches_of]

    def _is_plain(self, values: Tensor) -> bool:
        """Whether token v of image i is patch v of run i; the backward of a gather is slow."""
        places = self.patches_of
        if places.shape[2] != 1 or values.shape[:2] != places.shape[:2]:
            return False
        return torch.equal(places.flatten(), torch.arange(places.numel(), device=places.device))

    def _tokens(self, values: Tensor) -> Tensor:
        return self.per_token(values.transpose(1, 2)).mean(2).transpose(1, 2)

    def _layer(self, layer: int | None) -> LayerPass:
        return self.layers[self.feature_layer if layer is None else layer]

    def _bare(self, values: Tensor, dim: int) -> Tensor:
        """Without CLS along a dimension."""
        return values.narrow(dim, 1, values.shape[dim] - 1) if self.has_cls else values


@dataclass(frozen=True, slots=True)
class TappedLayer:
    """The modules of one tower layer a tap listens to.

    Attributes:
        layer: whose output is `hidden`.
        query: module that makes the queries, output ``[G, S, N·E]``.
        key: module that makes the keys, ``[G, S, N·E]``.
        heads: N.
        value: module that makes the values, ``[G, S, N·E]``; None hides them.
        out: module that projects what attention gives, ``[G, S, N·E]`` to ``[G, S, D]``.
    """

    layer: Any
    query: Any
    key: Any
    heads: int
    value: Any = None
    out: Any = None


@dataclass(frozen=True, slots=True)
class TowerEncoder:
    """The layers of a tower that may be shortened from inside: one picture is one run, all of it.

    Attributes:
        module: what runs the layers; takes ``inputs_embeds``, ``attention_mask`` and more keyword
            arguments, which it hands on.
        blocks: the layers, each with layer_norm1, self_attn, layer_norm2 and mlp.
        feature_layer: the layer whose output the projector gets.
        has_cls: whether position 0 is CLS.
        grid: rows and columns of the patches.
    """

    module: Any
    blocks: tuple[Any, ...]
    feature_layer: int
    has_cls: bool
    grid: tuple[int, int]


class VisionTap:
    """Hooks that capture layers of a tower in every run.

    Values of the first run through a layer are kept, so a replay under gradient checkpointing
    changes nothing. One that stops lets the tower run as far as any other open tap listens.

    Args:
        tower: the vision tower; its start begins a new capture.
        layers: by number, those to capture.
        stop: raise `FeaturesReached` behind the last of them, and of those of other open taps.
    """

    def __init__(
        self,
        tower: Any,  # noqa: ANN401 - modules of transformers are untyped
        layers: dict[int, TappedLayer],
        *,
        stop: bool = False,
    ) -> None:
        self._tower, self._layers, self._stop = tower, layers, stop
        self._seen: dict[tuple[int, str], Tensor] = {}
        self._handles: list[Any] = []

    def only(self, layers: Sequence[int]) -> VisionTap:
        """Capture these of the layers and no others; before the tap is opened."""
        self._layers = {number: self._layers[number] for number in layers}
        return self

    @property
    def latest(self) -> dict[int, LayerPass] | None:
        """What was captured last; None before any run."""
        if not self._whole():
            return None
        return {number: self._pass(number, one) for number, one in self._layers.items()}

    def _whole(self) -> bool:
        """Whether every layer was passed to its end."""
        return self.covered(self._seen)

    @property
    def numbers(self) -> frozenset[int]:
        """Layers it captures."""
        return frozenset(self._layers)

    @property
    def seen(self) -> dict[tuple[int, str], Tensor]:
        """What hooks have kept so far, by layer and name, for `recall`."""
        return dict(self._seen)

    def covered(self, seen: Mapping[tuple[int, str], Tensor]) -> bool:
        """Whether what another tap of this tower has kept holds all that this one captures."""
        return all((number, "hidden") in seen for number in self._layers)

    def recall(self, seen: Mapping[tuple[int, str], Tensor]) -> None:
        """Take what another tap has kept for what the tower has computed just now."""
        self._seen = {key: value for key, value in seen.items() if key[0] in self._layers}

    def clear(self) -> None:
        """Forget what was captured."""
        self._seen = {}

    def __enter__(self) -> VisionTap:
        self._handles = [self._tower.register_forward_pre_hook(self._begin)]
        for number, one in self._layers.items():
            self._handles += [
                one.query.register_forward_hook(self._keep(number, "query")),
                one.key.register_forward_hook(self._keep(number, "key")),
                one.layer.register_forward_hook(self._keep(number, "hidden")),
            ]
            if one.value is not None:
                self._handles.append(one.value.register_forward_hook(self._keep(number, "value")))
        self._listed()
        if self._stop:
            # Registered behind everybody's hooks on that layer, which have seen it then.
            taps = open_taps(self._tower)
            every = {number: one for tap in taps for number, one in tap._layers.items()}
            self._handles.append(every[max(every)].layer.register_forward_hook(_end))
        return self

    def _listed(self) -> None:
        """Let `open_taps` know."""
        self._tower.__dict__.setdefault(_TAPS, []).append(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        taps = self._tower.__dict__.get(_TAPS, [])
        if self in taps:
            taps.remove(self)
        if not taps:
            self._tower.__dict__.pop(_TAPS, None)

    def _begin(self, module: object, inputs: object) -> None:
        del module, inputs
        self._seen = {}

    def _keep(
        self, number: int, name: str, *, last: bool = False
    ) -> Callable[[object, object, Any], None]:
        def hook(module: object, inputs: object, output: Any) -> None:  # noqa: ANN401
            del module, inputs
            value = output[0] if isinstance(output, tuple) else output
            self._seen.setdefault((number, name), value)
            if self._stop and last:
                raise FeaturesReached

        return hook

    def _pass(self, number: int, one: TappedLayer) -> LayerPass:
        def split(name: str) -> Tensor:
            found = self._seen[number, name]
            return found.view(*found.shape[:-1], one.heads, -1).transpose(1, 2)

        values = None if one.value is None else split("value")
        hidden = self._seen[number, "hidden"]
        return LayerPass(hidden, split("query"), split("key"), values, one.out)


def open_taps(tower: Any) -> list[VisionTap]:  # noqa: ANN401 - modules of transformers
    """Taps that listen to a tower now."""
    return list(tower.__dict__.get(_TAPS, ()))


def averaged(values: Tensor, keys: Tensor, scaling: float, times: int) -> Tensor:
    """Values ``[G, N, S, E]``, each replaced `times` times by a mean weighted ``softmax(k kᵀ)``."""
    weights = (precise(keys @ keys.transpose(-1, -2)) * scaling).softmax(-1)
    mixed = precise(values)
    for _ in range(times):
        mixed = weights @ mixed
    return mixed.to(values.dtype)


def _end(module: object, inputs: object, output: object) -> None:
    del module, inputs, output
    raise FeaturesReached


def whole_runs(images: int, patches: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`patches_of`, `present` and `base` where image i is run i and a token is a patch."""
    runs = torch.arange(images, device=device)
    places = runs[:, None] * patches + torch.arange(patches, device=device)
    return places[..., None], torch.ones_like(places, dtype=torch.bool), runs


def padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`patches_of` and `present` from ``[V_i, r]`` patches of the tokens of each image."""
    width = max(len(part) for part in parts)
    rows = [torch.nn.functional.pad(part, (0, 0, 0, width - len(part))) for part in parts]
    lengths = torch.tensor([len(part) for part in parts], device=parts[0].device)
    present = torch.arange(width, device=parts[0].device) < lengths[:, None]
    return torch.stack(rows), present
