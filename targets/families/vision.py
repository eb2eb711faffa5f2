"""What a vision tower computed on the way to the features, captured by hooks on one instance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor

from targets.compression.scoring import attention_row, received_attention

Remove = Callable[[], None]


class FeaturesReached(Exception):
    """Raised inside the tower to skip the layers behind the feature layer."""


@dataclass(frozen=True, slots=True)
class VisionPass:
    """One pass of the vision tower over I images; every tensor is live.

    Attributes:
        hidden: ``[I, S, D]`` output of the feature layer, CLS first where there is one.
        queries: ``[I, N, S, E]`` of the feature layer's attention.
        keys: ``[I, N, S, E]`` of the same.
        scaling: factor on query · key.
        has_cls: whether row 0 is CLS; then S = V + 1, else S = V.
    """

    hidden: Tensor
    queries: Tensor
    keys: Tensor
    scaling: float
    has_cls: bool

    @property
    def patches(self) -> Tensor:
        """``[I, V, D]`` features of the patches."""
        return self.hidden[:, 1:] if self.has_cls else self.hidden

    @property
    def patch_keys(self) -> Tensor:
        """``[I, N, V, E]`` keys of the patches."""
        return self.keys[:, :, 1:] if self.has_cls else self.keys

    @property
    def query(self) -> Tensor | None:
        """``[I, N, E]`` the CLS query; None without CLS."""
        return self.queries[:, :, 0] if self.has_cls else None

    def attention(self) -> Tensor:
        """``[I, N, V]`` attention of CLS to the patches; mean attention received without CLS."""
        if not self.has_cls:
            return received_attention(self.queries, self.keys, self.scaling)
        return attention_row(self.queries[:, :, 0], self.keys, self.scaling)[:, :, 1:]


class VisionTap:
    """Hooks that capture a `VisionPass` from every run of a tower.

    Values of the first run through a layer are kept, so a replay under gradient checkpointing
    changes nothing.

    Args:
        tower: the vision tower; its start begins a new capture.
        layer: the feature layer, whose output is `hidden`.
        query: module that makes the queries of that layer, output ``[I, S, N·E]``.
        key: module that makes its keys.
        heads: N.
        scaling: factor on query · key.
        has_cls: whether the tower has a CLS token in front.
        stop: raise `FeaturesReached` behind the feature layer.
    """

    def __init__(
        self,
        tower: Any,  # noqa: ANN401 - modules of transformers are untyped
        layer: Any,  # noqa: ANN401
        query: Any,  # noqa: ANN401
        key: Any,  # noqa: ANN401
        *,
        heads: int,
        scaling: float,
        has_cls: bool,
        stop: bool = False,
    ) -> None:
        self._modules = (tower, layer, query, key)
        self._heads, self._scaling, self._has_cls, self._stop = heads, scaling, has_cls, stop
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    @property
    def latest(self) -> VisionPass | None:
        """The pass captured last; None before any."""
        if len(self._seen) < 3:
            return None
        return VisionPass(
            self._seen["hidden"],
            self._heads_of(self._seen["query"]),
            self._heads_of(self._seen["key"]),
            self._scaling,
            self._has_cls,
        )

    def __enter__(self) -> VisionTap:
        tower, layer, query, key = self._modules
        self._handles = [
            tower.register_forward_pre_hook(self._begin),
            query.register_forward_hook(self._keep("query")),
            key.register_forward_hook(self._keep("key")),
            layer.register_forward_hook(self._keep("hidden")),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, module: object, inputs: object) -> None:
        del module, inputs
        self._seen = {}

    def _keep(self, name: str) -> Callable[[object, object, Any], None]:
        def hook(module: object, inputs: object, output: Any) -> None:  # noqa: ANN401
            del module, inputs
            value = output[0] if isinstance(output, tuple) else output
            self._seen.setdefault(name, value)
            if self._stop and name == "hidden":
                raise FeaturesReached

        return hook

    def _heads_of(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], self._heads, -1).transpose(1, 2)
