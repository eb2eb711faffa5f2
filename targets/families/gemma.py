"""What PaliGemma and Gemma 3 share: a SigLIP tower, and attention that is not causal everywhere.

Both make their masks before the language model starts (a prefix, or blocks of image tokens, attend
in both directions), one for each type of layer. Under compression rows and columns of these very
masks are taken; none is made anew for the prompt.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from targets.caches import cache_name, cache_of
from targets.errors import TargetError
from targets.families.base import Family, alike
from targets.families.llava import clip_layers, tapped
from targets.families.vision import LayerPass, VisionPass, VisionTap, padded
from targets.preprocessing.gemma import GemmaPreprocessing
from targets.preprocessing.layout import Layout

if TYPE_CHECKING:
    from targets.compression.layout import Group

_ATTENTION = ("sdpa", "eager")


class GemmaFamily(Family):
    """Adapter to models of a SigLIP tower and a Gemma language model.

    A sliding window counts columns of the uncompressed sequence, as if dropped tokens were only
    hidden: compression never lets a layer look further back than the model would. This holds for
    kept and for reindexed positions. [inferred] (Counting what is left instead would let layers
    see more text than they were trained on, and differently before and behind a cut.) Caches of
    sliding layers forget by number of entries, so a session exchanges them for ones that forget
    nothing; the mask does the sliding. That costs memory for prompts longer than the window only.

    Attributes:
        texts: text models it is written for.
        grid: rows and columns of the visual tokens of one run of the tower.
        patches: patches along one side of a run.

    Raises:
        TargetError: for a tower, text model or attention implementation it is not written for.
    """

    texts: ClassVar[tuple[str, ...]]
    grid: tuple[int, int]

    @classmethod
    def attention(cls, config: Any) -> str | None:  # noqa: ANN401 - of transformers
        """Eager where logits are capped, which sdpa cannot; flash attention takes no 4-D mask."""
        return "eager" if config.text_config.model_type == "gemma2" else "sdpa"

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
        config = model.config
        vision, text = config.vision_config, config.text_config
        self._refuse("vision tower", vision.model_type, ("siglip_vision_model",))
        self._refuse("text model", text.model_type, self.texts)
        # Flash attention takes no 4-D mask: it would forget the prefix and the image blocks.
        self._refuse("attn_implementation", _implementation(text), _ATTENTION)
        self.model, self.core = model, model.model
        self.tower, self.projector = self.core.vision_tower, self.core.multi_modal_projector
        self.text, self.layers = self.core.language_model, self.core.language_model.layers
        self.image_token_id = int(config.image_token_id)
        self.tower_depth = int(vision.num_hidden_layers)
        self.feature_layer = self.tower_depth - 1
        self.patches = vision.image_size // vision.patch_size
        self.grid = self._token_grid()
        self._columns: int | None = None  # of the prompt that was prefilled last, uncut

    @abstractmethod
    def _token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of one run of the tower."""

    def _refuse(self, what: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise TargetError(
                f"{self.model_types[0]}: {what} {value!r} is not supported; one of "
                f"{', '.join(allowed)}"
            )

    # Pictures -----------------------------------------------------------------------------------

    def fixed_tokens(self) -> int:
        """The grid."""
        return self.grid[0] * self.grid[1]

    def preprocessing(self, processor: Any) -> GemmaPreprocessing:  # noqa: ANN401 - untyped
        """The whole picture, resampled to one square."""
        return GemmaPreprocessing.of(processor, self.model.config)

    def images(self, placeholders: Tensor, inputs: dict[str, Any]) -> Sequence[Layout]:
        """Every run of the tower has one grid of tokens."""
        del inputs
        return alike(placeholders, Layout.grid(self.grid))

    # Vision tower -------------------------------------------------------------------------------

    def tap(self, layers: Sequence[int] = (), *, stop: bool = False) -> VisionTap:
        """Hooks at the last layer and others."""
        blocks = clip_layers(self.tower)
        wanted = sorted({self.feature_layer, *layers})
        return VisionTap(self.tower, {n: tapped(blocks[n]) for n in wanted}, stop=stop)

    def arrange(
        self, captured: dict[int, LayerPass], layouts: Sequence[Layout], inputs: dict[str, Any]
    ) -> VisionPass:
        """A token is a square of patches; a normalisation lies between tower and projector."""
        del inputs
        hidden = captured[self.feature_layer].hidden
        runs = torch.arange(len(hidden), device=hidden.device)[:, None, None]
        places = self._patches_of(hidden.device) + runs * hidden.shape[1]
        # All runs of an image stand one after the other, the one of the whole picture first.
        counts = [len(one.shapes) for one in layouts]
        patches_of, present = padded([part.flatten(0, 1) for part in torch.split(places, counts)])
        ends = torch.tensor(counts, device=hidden.device)
        base = ends.cumsum(0) - ends
        features = self._tower_norm(hidden).flatten(0, 1)[patches_of].flatten(2)
        scaling = float(clip_layers(self.tower)[self.feature_layer].self_attn.scale)
        return VisionPass(
            captured, self.feature_layer, scaling, False, patches_of, present, base, features
        )

    def _tower_norm(self, hidden: Tensor) -> Tensor:
        normed: Tensor = getattr(self.tower, "vision_model", self.tower).post_layernorm(hidden)
        return normed

    def _patches_of(self, device: torch.device) -> Tensor:
        """Patches of each token of one run, long ``[V, r]``, both row by row."""
        rows, columns = self.grid
        numbers = torch.arange(self.patches**2, device=device).view(self.patches, self.patches)
        high, wide = self.patches // rows, self.patches // columns
        blocks = numbers.view(rows, high, columns, wide).transpose(1, 2)
        return blocks.reshape(rows * columns, high * wide)

    # Language model -----------------------------------------------------------------------------

    def prompt_state(self) -> object:
        """Columns of the uncut prompt, by which the window slides."""
        return self._columns

    def resume(self, state: object) -> None:
        """Slide by an earlier prompt again."""
        self._columns = state if isinstance(state, int) else None

    def layer_type(self, layer: int) -> str:
        """``full_attention`` or ``sliding_attention``."""
        types = getattr(self.text.config, "layer_types", None)
        return "full_attention" if types is None else str(types[layer])

    def form(self, layer: int) -> object:
        """Its type."""
        return self.layer_type(layer)

    def window(self, layer: int) -> int | None:
        """Columns a layer looks back, itself included; None for all."""
        if self.layer_type(layer) != "sliding_attention":
            return None
        return int(self.text.config.sliding_window)

    def allowed(self, given: Any, group: Group, layer: int) -> Tensor | None:  # noqa: ANN401
        """Rows and columns of the model's own mask, bool ``[B, n, n]``."""
        mask = self._given(given, layer)
        if mask is None:
            rows, length = group.mask.shape
            every = torch.ones(length, length, dtype=torch.bool, device=group.mask.device)
            # Without a mask sdpa goes by the module: PaliGemma's attends everywhere.
            causal = bool(self.layers[layer].self_attn.is_causal)
            return (every.tril() if causal else every).expand(rows, length, length)
        mask = (mask if mask.dtype == torch.bool else mask == 0).squeeze(1)
        mask = mask.expand(len(group.mask), -1, -1)
        if group.index is None:
            return mask
        index = group.index
        mask = mask.gather(1, index[:, :, None].expand(-1, -1, mask.shape[2]))
        return mask.gather(2, index[:, None].expand(-1, index.shape[1], -1))

    def layer_mask(
        self,
        hidden: Tensor,
        group: Group,
        cache: Any,  # noqa: ANN401 - a cache of transformers
        layer: int,
        given: Any,  # noqa: ANN401 - its form depends on the model
        *,
        explicit: bool = False,
    ) -> Tensor | None:
        """At prefill the model's own mask, cut; when decoding, everything the window reaches."""
        steps = hidden.shape[1]
        if group.mask.shape[1] != steps:
            allowed = self._decoding(group, cache, layer, steps)
            wide = self._spans(allowed.shape[2], layer)
            skip = steps == 1 and bool(allowed.all()) and not wide
            return None if skip and not explicit else self._formed(allowed, hidden.dtype)
        return self._prefill_mask(group, layer, given, hidden.dtype, explicit=explicit)

    def attach(self, current: Any) -> Sequence[Any]:  # noqa: ANN401 - a function without arguments
        """Caches that forget nothing, and windows of shortened prompts when decoding."""
        before = self.text.register_forward_pre_hook(self._before_text, with_kwargs=True)
        hooks = [
            self.core.register_forward_pre_hook(self._before_core, with_kwargs=True),
            before,
        ]
        for layer, module in enumerate(self.layers):
            if self.window(layer) is not None:
                hook = self._slide(layer, current)
                hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return hooks

    def _before_core(
        self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Exchange an empty cache before the model sizes its masks by it."""
        del module
        from transformers import DynamicCache

        cache, use = cache_of(kwargs), kwargs.get("use_cache")
        use = self.text.config.use_cache if use is None else use
        if cache is None and use and not self.text.training:
            return args, {**kwargs, cache_name(): DynamicCache()}
        if isinstance(cache, DynamicCache) and cache.get_seq_length() == 0:
            cache.layers = [
                _unbounded() if getattr(one, "is_sliding", False) else one for one in cache.layers
            ]
        return args, kwargs

    def _before_text(self, module: object, args: object, kwargs: dict[str, Any]) -> None:
        del module, args
        cache = cache_of(kwargs)
        if cache is None or cache.get_seq_length() == 0:
            self._columns = int(kwargs["inputs_embeds"].shape[1])

    def _slide(self, layer: int, current: Any) -> Any:  # noqa: ANN401 - a hook of torch
        """The model slides over what is left of a prompt; make it slide over what there was."""

        def hook(
            module: object, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            del module
            state = current()
            if state is None or state.prefill or state.group(layer).index is None:
                return None
            cache = cache_of(kwargs)
            mask = self.layer_mask(args[0], state.group(layer), cache, layer, None)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    def plain_mask(self, given: Any, group: Group) -> Any:  # noqa: ANN401 - form of the model
        """The masks of all types of layer, cut."""
        dtype = self.text.get_input_embeddings().weight.dtype
        if not isinstance(given, dict):
            # Left out, the model would take gaps in position ids for a packed sequence.
            gaps = group.index is not None
            return self._prefill_mask(group, 0, given, dtype, explicit=gaps)
        kinds = {self.layer_type(layer): layer for layer in range(len(self.layers))}
        return {
            kind: self._prefill_mask(group, layer, given, dtype) for kind, layer in kinds.items()
        }

    def _prefill_mask(
        self,
        group: Group,
        layer: int,
        given: Any,  # noqa: ANN401
        dtype: torch.dtype,
        *,
        explicit: bool = False,
    ) -> Tensor | None:
        own = self.allowed(given, group, layer)
        if own is None:
            raise TargetError("the mask of a Gemma model is never left to the kernel")
        allowed = own & group.mask.bool()[:, None]
        if bool((allowed == own).all()):
            mask = self._given(given, layer)
            # Nothing is hidden beyond what the model hides: hand on its own mask, or none.
            if mask is None and not explicit:
                return None
            if mask is not None and group.index is None:
                return mask
        return self._formed(allowed, dtype)

    def _decoding(self, group: Group, cache: Any, layer: int, steps: int) -> Tensor:  # noqa: ANN401
        """What new columns may attend to among those a layer's cache returns: ``[B, steps, m]``."""
        columns = group.mask.shape[1]
        order = torch.arange(columns, device=group.mask.device)
        allowed = (order <= order[-steps:, None]) & group.mask.bool()[:, None]
        window = self.window(layer)
        if window is not None:
            places = self._places(group)
            allowed = allowed & (places[:, None] > places[:, -steps:, None] - window)
        held, _ = cache.get_mask_sizes(steps, layer)
        return allowed[:, :, columns - held :]

    def _places(self, group: Group) -> Tensor:
        """Where the columns of a group would stand in the uncompressed sequence, ``[B, n]``."""
        rows, columns = group.mask.shape
        if group.index is None:
            return torch.arange(columns, device=group.mask.device).expand(rows, columns)
        # Without a session the prompt's last column stands for its length; it is always kept.
        length = int(group.index.amax()) + 1 if self._columns is None else self._columns
        new = torch.arange(columns - group.index.shape[1], device=group.mask.device) + length
        return torch.cat([group.index, new.expand(rows, -1)], 1)

    def _spans(self, columns: int, layer: int) -> bool:
        """Whether the model itself makes a mask for so many columns without padding."""
        window = self.window(layer)
        return window is not None and columns >= window

    def _given(self, given: Any, layer: int) -> Tensor | None:  # noqa: ANN401
        mask = given.get(self.layer_type(layer)) if isinstance(given, dict) else given
        if mask is not None and mask.dim() != 4:
            raise TargetError(
                f"{self.model_types[0]}: the language model was given a mask of shape "
                f"{list(mask.shape)} instead of one for pairs of columns; load the model with "
                f"attn_implementation {' or '.join(_ATTENTION)}"
            )
        return mask

    def _formed(self, allowed: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask ``[B, 1, q, k]`` as the attention implementation takes it."""
        mask = allowed[:, None]
        if _implementation(self.text.config) == "sdpa":
            return mask
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        return torch.where(mask, zero, torch.finfo(dtype).min)


def _implementation(config: Any) -> str:  # noqa: ANN401 - a configuration of transformers
    return str(getattr(config, "_attn_implementation", None))


def _unbounded() -> Any:  # noqa: ANN401 - of transformers
    from transformers.cache_utils import DynamicLayer

    return DynamicLayer()
