"""Compressors that shorten a vision tower while it runs, and how they get into its layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from targets.compression.base import Compressor, Merged, Scores, Seen, Selection, Stage
from targets.compression.flow import Step, Tokens
from targets.compression.scoring import gather_rows
from targets.compression.trace import forced_at
from targets.errors import CompressionError

if TYPE_CHECKING:
    from targets.families.base import Family
    from targets.families.vision import TowerEncoder

RUN: Final = "run"
"""Where a compressor's memory holds the run of the tower."""
FORCED: Final = "forced"
"""Where the session leaves a selection that is imposed."""
_KEY = "redteam_tower"


@dataclass(slots=True)
class TowerRun:
    """One run of the tower; travels through the layers' keyword arguments.

    A replay under gradient checkpointing finds the run it belongs to, whatever has run since.

    Attributes:
        encoder: of the tower.
        patches: V, those of a picture.
        forced: a selection imposed from outside.
        tokens: at the input of each layer.
        steps: what was done in a layer, where anything was.
        scores: ``[I, S]`` or ``[I, V]`` of a layer, live, as the method makes them.
        left: tokens as they enter the projector, CLS included where there is one.
    """

    encoder: TowerEncoder
    patches: int
    forced: Selection | None
    tokens: dict[int, Tokens]
    steps: dict[int, Step] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    left: Tokens | None = None

    @property
    def lead(self) -> int:
        """Tokens in front of the patches: CLS."""
        return int(self.encoder.has_cls)

    @property
    def final(self) -> Tokens:
        """Behind the feature layer."""
        return self.tokens[self.encoder.feature_layer + 1]


@dataclass(frozen=True, kw_only=True)
class InsideTower(Compressor):
    """Base of compressors at `Stage.TOWER`.

    Subclasses change tokens before the first layer (`enter`), or between attention and perceptron
    of a layer (`between`), and may add to the attention logits (`mask`).
    """

    retention: float | None = None
    keep_tokens: int | None = None

    @property
    def stage(self) -> Stage:
        """Inside the vision tower."""
        return Stage.TOWER

    def refuses(self, family: Family) -> str | None:
        """Towers whose attention takes no mask with numbers in it."""
        implementation = str(getattr(family.tower.config, "_attn_implementation", ""))
        if self.stage is Stage.TOWER and implementation not in ("sdpa", "eager"):
            return (
                f"it adds to the attention logits of the vision tower, which {implementation} does "
                "not take; load the model with attn_implementation sdpa or eager"
            )
        return None

    # What a method does -------------------------------------------------------------------------

    def enter(self, run: TowerRun, hidden: Tensor) -> Tensor:
        """Change the tokens ``[I, S, D]`` before the first layer; `run.tokens[0]` follows."""
        del run
        return hidden

    def mask(self, run: TowerRun, layer: int, normed: Tensor) -> Tensor | None:
        """What is added to the attention logits of a layer; None is nothing.

        Args:
            run: of the tower.
            layer: of the tower, 0-based.
            normed: ``[I, S, D]`` what its queries and keys are made of.
        """
        del normed
        return padding(run.tokens[layer], run.encoder)

    def between(
        self, run: TowerRun, layer: int, hidden: Tensor, queries: Tensor, keys: Tensor
    ) -> Tensor:
        """Change the tokens ``[I, S, D]`` between attention and perceptron of a layer.

        Args:
            run: its `tokens` of the next layer have to be filled in where they change.
            layer: of the tower, no deeper than the feature layer.
            hidden: behind the attention and its residual.
            queries: ``[I, N, S, E]`` of the layer.
            keys: ``[I, N, S, E]``.
        """
        del queries, keys
        run.tokens.setdefault(layer + 1, run.tokens[layer])
        return hidden

    @abstractmethod
    def judge(self, run: TowerRun) -> Scores:
        """Scores of the patches ``[I, V]``, with `chosen`, once the tower has run."""

    # Installing it ------------------------------------------------------------------------------

    def install(self, family: Family, memory: dict[str, Any]) -> Sequence[Any]:
        """Begin a run where the encoder starts, and take over the layers' forward."""
        encoder = family.encoder
        if encoder is None:
            raise CompressionError(f"compressor {self.name}: {family.refuses(self)}")

        def begin(
            module: object, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            del module
            hidden = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]
            lead = int(encoder.has_cls)
            patches = hidden.shape[1] - lead
            forced = imposed(memory.get(FORCED), len(hidden), patches, hidden.device)
            first = Tokens.whole(len(hidden), patches, lead, hidden.device)
            run = memory[RUN] = TowerRun(encoder, patches, forced, {0: first})
            kwargs = {**kwargs, "inputs_embeds": self.enter(run, hidden), _KEY: run}
            return args[1:], kwargs

        handles: list[Any] = [
            encoder.module.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
        ]
        for layer in range(len(encoder.blocks)):
            handles.append(_Taken(self, encoder.blocks[layer], layer))
        return handles

    def run_block(
        self,
        block: Any,  # noqa: ANN401 - modules of transformers are untyped
        layer: int,
        run: TowerRun,
        caught: dict[str, Tensor],
        hidden: Tensor,
    ) -> Tensor:
        """A layer of the tower, with what the method does in it."""
        normed = block.layer_norm1(hidden)
        mask = self.mask(run, layer, normed)
        attended = block.self_attn(hidden_states=normed, attention_mask=mask)[0]
        hidden = hidden + attended
        if layer <= run.encoder.feature_layer:
            parts = [in_heads(caught[name], block.self_attn) for name in "qk"]
            hidden = self.between(run, layer, hidden, parts[0], parts[1])
        else:
            run.tokens.setdefault(layer + 1, run.tokens[layer])
        made: Tensor = hidden + block.mlp(block.layer_norm2(hidden))
        return made

    # What came out ------------------------------------------------------------------------------

    def emerge(self, features: Tensor, memory: dict[str, Any]) -> Merged:
        """The tokens ``[I, S, D]`` that reached the feature layer, without CLS."""
        run = _run_of(memory, self.name)
        run.left = run.final
        place, real = (part[:, run.lead :] for part in (run.left.place, run.left.alive))
        return Merged(features, real, place.clamp_min(0), real)

    def unmerge(self, features: Tensor, memory: dict[str, Any]) -> Tensor:
        """For each patch ``[I, V, D]`` the token it went into; zero where it is gone."""
        run = _run_of(memory, self.name)
        where = (run.left or run.final).where - run.lead
        return gather_rows(features, where.clamp_min(0)) * (where >= 0)[..., None]

    def score(self, seen: Seen) -> Scores:
        """Scores of the patches; see `judge`."""
        return self.judge(_run_of(seen.memory, self.name))


class _Taken:
    """A layer whose forward a compressor has taken over; `remove` gives it back."""

    def __init__(self, by: InsideTower, block: Any, layer: int) -> None:  # noqa: ANN401
        self._block, self._before = block, block.__dict__.get("forward")
        caught: dict[str, Tensor] = {}

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
            del args
            body = partial(by.run_block, block, layer, kwargs[_KEY], caught)
            # The class's own forward would do this, but an instance's comes before it.
            if getattr(block, "gradient_checkpointing", False) and block.training:
                again: Tensor = block._gradient_checkpointing_func(body, hidden_states)
                return again
            return body(hidden_states)

        def keep(name: str) -> Any:  # noqa: ANN401 - a hook of torch
            def hook(module: object, inputs: object, output: Tensor) -> None:
                del module, inputs
                caught[name] = output

            return hook

        attention = block.self_attn
        self._hooks = [
            attention.q_proj.register_forward_hook(keep("q")),
            attention.k_proj.register_forward_hook(keep("k")),
        ]
        block.__dict__["forward"] = forward

    def remove(self) -> None:
        """Leave the layer as it was."""
        for hook in self._hooks:
            hook.remove()
        del self._block.__dict__["forward"]
        if self._before is not None:
            self._block.__dict__["forward"] = self._before


def in_heads(values: Tensor, attention: Any) -> Tensor:  # noqa: ANN401
    """Queries or keys ``[I, S, N·E]`` of an attention as ``[I, N, S, E]``."""
    heads = int(attention.num_heads)
    return values.view(*values.shape[:2], heads, -1).transpose(1, 2)


def padding(tokens: Tokens, encoder: TowerEncoder) -> Tensor | None:
    """A mask ``[I, 1, 1, S]`` that hides what only evens images out; None where nothing does."""
    alive = tokens.alive
    if bool(alive.all()):
        return None
    dtype = encoder.blocks[0].layer_norm1.weight.dtype
    hidden = torch.zeros(alive.shape, dtype=dtype, device=alive.device)
    return hidden.masked_fill(~alive, torch.finfo(dtype).min)[:, None, None]


def imposed(forced: Any, images: int, patches: int, device: torch.device) -> Selection | None:  # noqa: ANN401
    """The selection imposed on a tower, in its shape.

    Raises:
        CompressionError: if it has another shape, or keeps no patch of some picture.
    """
    if forced is None:
        return None
    found = forced_at(forced, 0)
    if found.kept.shape[0] != images or found.kept.shape[1] > patches:
        raise CompressionError(
            f"the forced selection is {list(found.kept.shape)}, but the vision tower has "
            f"{[images, patches]} images × patches to choose from"
        )
    wide = (0, patches - found.kept.shape[1])
    kept = torch.nn.functional.pad(found.kept.to(device), wide).bool()
    if bool((~kept.any(1)).any()):
        raise CompressionError("the forced selection keeps no token of some image; keep at least 1")
    targets = None if found.targets is None else found.targets.to(device)
    assignment = found.assignment
    if assignment is not None:
        assignment = torch.nn.functional.pad(assignment.to(device), wide, value=-1)
    return Selection(kept, targets, assignment)


def _run_of(memory: dict[str, Any], name: str) -> TowerRun:
    run = memory.get(RUN)
    if run is None:
        raise CompressionError(
            f"compressor {name} works inside the vision tower, which has not run inside this "
            "session; pass pixel_values, not encoder outputs made before"
        )
    found: TowerRun = run
    return found
