"""Forward passes of training: the library's modules, with packing, dropping and late reading.

Training needs what inference does not (several questions behind one image, blocked reading, dense
losses), so the layers are called one by one here. Inference never uses this file: it goes through
the unchanged `LlavaForConditionalGeneration`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from targets.families.base import rotate
from targets.scenes import build, world
from targets.scenes.packing import IGNORE, Packed

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

Drop = Literal["none", "evidence", "cls", "random", "merged", "ranked", "random_late"]
"""How visual tokens are dropped: before the LLM by objects + random, by CLS rank, at random, or by
CLS rank with the rest merged (CLS first, contiguous positions: the input VisionZip makes); or at
layer `late` by the ranking attention or at random."""


@dataclass(frozen=True, slots=True)
class Options:
    """One forward pass: how many visual tokens stay, chosen how, whether early reading is cut."""

    keep: int = world.GRID**2
    drop: Drop = "none"
    blocked: bool = False


def pixels(images: Tensor) -> Tensor:
    """Uint8 or [0, 1] float images to the tower's normalised input."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    mean = torch.tensor(build.MEAN, device=x.device).view(1, 3, 1, 1)
    std = torch.tensor(build.STD, device=x.device).view(1, 3, 1, 1)
    return (x - mean) / std


@dataclass(frozen=True, slots=True)
class Seen:
    """What the vision tower gives.

    Attributes:
        hidden: output of the last layer, ``[B, 1 + V, D]``, CLS first.
        cls: head-mean CLS attention of that layer to the patches, ``[B, V]``.
        keys: head-mean keys of that layer, ``[B, V, E]``.
    """

    hidden: Tensor
    cls: Tensor
    keys: Tensor


def see(model: LlavaForConditionalGeneration, images: Tensor) -> Seen:
    """Run the vision tower on uint8 or [0, 1] images ``[B, 3, 96, 96]``."""
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels(images)))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    last = tower.encoder.layers[-1]
    normed = last.layer_norm1(hidden)
    attention = last.self_attn
    split = (len(hidden), -1, attention.num_heads, attention.head_dim)
    q = attention.q_proj(normed[:, :1]).view(split).transpose(1, 2)
    k = attention.k_proj(normed).view(split).transpose(1, 2)
    row = (q @ k.transpose(-1, -2) * attention.scale).softmax(-1).mean(1)[:, 0, 1:]
    return Seen(last(hidden, None), row, k.mean(1)[:, 1:])


@dataclass(frozen=True, slots=True)
class Read:
    """What `read` returns.

    Attributes:
        logits: next-token logits of the text, ``[B, PACK, vocabulary]``.
        ranking: head-mean attention of each question's last prompt token to the visual tokens that
            reached layer late - 1, ``[B, QUESTIONS, V']``, over all keys it may see.
        kept: which visual tokens reached that layer, ``[B, V']``; -1 for CLS and mixtures.
    """

    logits: Tensor
    ranking: Tensor
    kept: Tensor


def read(
    model: LlavaForConditionalGeneration,
    seen: Seen,
    batch: Packed,
    options: Options,
    late: int,
    generator: torch.Generator,
) -> Read:
    """Language model over a packed batch, see the module's text and `Options`."""
    kept = _choose(seen.cls, batch, options, generator)
    text_model = model.model.language_model
    if options.drop == "merged":
        features, kept = _merge(seen, options.keep)
        places = torch.arange(options.keep, device=kept.device).expand_as(kept)
        text_places = batch.positions - (world.GRID**2 - options.keep)
    else:
        features = seen.hidden[:, 1:].gather(1, _wide(kept, seen.hidden.shape[-1]))
        places, text_places = kept, batch.positions
    image = model.model.multi_modal_projector(features)
    start = text_model.embed_tokens(torch.ones_like(kept[:, :1]))
    text = text_model.embed_tokens(batch.tokens)
    hidden = torch.cat([start, image, text], dim=1)
    positions = torch.cat([torch.zeros_like(kept[:, :1]), places + 1, text_places], dim=1)
    rotary = text_model.rotary_emb(hidden, positions)
    visible = _visible(batch.block, kept.shape[1])
    early = _block_reading(visible, kept.shape[1]) if options.blocked else visible
    reached = kept
    for i, layer in enumerate(text_model.layers):
        if i == late - 1:
            ranking = _ranking(layer, hidden, rotary, visible, batch.asks, kept.shape[1])
        if i == late and options.drop in ("ranked", "random_late") and options.keep < kept.shape[1]:
            scores = _late_scores(ranking, batch.asks, options, generator)
            hidden, rotary, visible = _drop_late(hidden, rotary, visible, scores, options.keep)
        mask = _additive(early if i < late else visible, hidden.dtype)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    out = text_model.norm(hidden[:, -batch.tokens.shape[1] :])
    return Read(model.lm_head(out), ranking, reached)


def answer_loss(logits: Tensor, batch: Packed) -> Tensor:
    """Cross-entropy over answer and end tokens."""
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE
    )


def ranking_loss(reading: Read, batch: Packed, band: tuple[float, float] | None = None) -> Tensor:
    """-log of the ranking attention's mass on the evidence, over questions that have evidence.

    With a band (low, high) the log mass is only pulled into it, from below and from above:
    attention with all its mass on the evidence is nothing a large model does, and hard to attack.
    """
    places = reading.kept[:, None].expand(-1, batch.evidence.shape[1], -1)
    evidence = batch.evidence.gather(2, places.clamp(min=0)) & (places >= 0)
    mass = (reading.ranking * evidence).sum(-1)
    asked = (batch.asks >= 0) & evidence.any(-1)
    log_mass = (mass[asked] + 1e-6).log()
    if band is None:
        return -log_mass.mean()
    low, high = (math.log(x) for x in band)
    return ((low - log_mass).relu() + (log_mass - high).relu()).mean()


def correct(logits: Tensor, batch: Packed) -> Tensor:
    """Whether every token of each answer is the arg max, bool ``[B, QUESTIONS]``."""
    right = (logits.argmax(-1) == batch.targets) | (batch.targets == IGNORE)
    questions = torch.arange(batch.asks.shape[1], device=logits.device)
    inside = batch.block[:, None] == questions[None, :, None]
    return (right[:, None] | ~inside).all(-1)


# ------------------------------------------------------------------------------------ the details


def _choose(cls: Tensor, batch: Packed, options: Options, generator: torch.Generator) -> Tensor:
    """Sorted indices ``[B, keep]`` of the visual tokens that enter the language model."""
    count = cls.shape[1]
    if options.drop in ("none", "ranked", "random_late") or options.keep >= count:
        return torch.arange(count, device=cls.device).expand(len(cls), -1)
    noise = torch.rand(cls.shape, generator=generator).to(cls.device)
    if options.drop == "cls":
        priority = cls.detach()
    elif options.drop == "evidence":
        priority = noise + (batch.patches > 0).any(-1)
    else:
        priority = noise
    return priority.topk(options.keep, dim=1).indices.sort(dim=1).values


def _wide(index: Tensor, width: int) -> Tensor:
    return index[..., None].expand(-1, -1, width)


def _merge(seen: Seen, keep: int) -> tuple[Tensor, Tensor]:
    """CLS, the dominant tokens in raster order, and mixtures of the rest, 10 of 64 of them."""
    patches = seen.hidden[:, 1:]
    batch, count, width = patches.shape
    mixed = round(keep * 10 / 64)
    order = seen.cls.detach().argsort(dim=1, descending=True, stable=True)
    dominant = order[:, : keep - mixed - 1].sort(dim=1).values
    rest = order[:, keep - mixed - 1 :].sort(dim=1).values
    targets = rest[:, :: rest.shape[1] // mixed][:, :mixed]
    keys = nn.functional.normalize(seen.keys.detach(), dim=-1)
    chosen = keys.gather(1, _wide(targets, keys.shape[-1]))
    member = nn.functional.one_hot((keys @ chosen.transpose(1, 2)).argmax(2), mixed).float()
    # Dominant tokens and the targets themselves are merged into nothing.
    taken = torch.zeros(batch, count, device=patches.device)
    taken = taken.scatter(1, torch.cat([dominant, targets], dim=1), 1.0)
    member = (member * (1 - taken)[..., None]).transpose(1, 2)
    mean = member @ patches / member.sum(2, keepdim=True).clamp_min(1)
    mixture = patches.gather(1, _wide(targets, width)) + mean
    own = patches.gather(1, _wide(dominant, width))
    features = torch.cat([seen.hidden[:, :1], own, mixture], dim=1)
    unknown = torch.full_like(targets, -1)
    return features, torch.cat([unknown[:, :1], dominant, unknown], dim=1)


def _visible(block: Tensor, image_tokens: int) -> Tensor:
    """Who sees whom, bool ``[B, L, L]``: causal, the image by all, text within its question."""
    prefix = torch.zeros(len(block), 1 + image_tokens, dtype=block.dtype, device=block.device) - 2
    group = torch.cat([prefix, block], dim=1)
    length = group.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=block.device).tril()
    same = (group[:, :, None] == group[:, None, :]) & (group[:, None, :] != -1)
    own = torch.eye(length, dtype=torch.bool, device=block.device)
    return (causal & (same | (group[:, None, :] == -2))) | own


def _block_reading(visible: Tensor, image_tokens: int) -> Tensor:
    """The same without text looking at image tokens."""
    out = visible.clone()
    out[:, 1 + image_tokens :, 1 : 1 + image_tokens] = False
    return out


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )[:, None]


def _ranking(
    layer: Any,  # noqa: ANN401 - a decoder layer; transformers is untyped
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    visible: Tensor,
    asks: Tensor,
    image_tokens: int,
) -> Tensor:
    """Head-mean attention of the questions' last tokens to image tokens, reading not blocked."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    rows = 1 + image_tokens + asks.clamp(min=0)
    heads = (len(hidden), -1, attention.config.num_attention_heads, attention.head_dim)
    index = rows[..., None].expand(-1, -1, hidden.shape[-1])
    cos, sin = rotary
    pick = rows[..., None].expand(-1, -1, cos.shape[-1])
    cos_all, sin_all = cos.expand(len(hidden), -1, -1), sin.expand(len(hidden), -1, -1)
    q = attention.q_proj(normed.gather(1, index)).view(heads).transpose(1, 2)
    q = rotate(q, cos_all.gather(1, pick)[:, None], sin_all.gather(1, pick)[:, None])
    k = attention.k_proj(normed).view(heads).transpose(1, 2)
    k = rotate(k, cos[:, None], sin[:, None])
    seen = visible.gather(1, rows[..., None].expand(-1, -1, visible.shape[-1]))
    scores = (q @ k.transpose(-1, -2)) * attention.scaling
    weights = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).softmax(-1)
    ranking: Tensor = weights.mean(1)[:, :, 1 : 1 + image_tokens]
    return ranking


def _late_scores(
    ranking: Tensor, asks: Tensor, options: Options, generator: torch.Generator
) -> Tensor:
    """Which image tokens to keep at layer `late`, mean over the packed questions."""
    if options.drop == "random_late":
        noise = torch.rand(ranking[:, 0].shape, generator=generator)
        return noise.to(ranking.device)
    asked = (asks >= 0)[..., None]
    return (ranking.detach() * asked).sum(1)


def _drop_late(
    hidden: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor, scores: Tensor, keep: int
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Remove image tokens from the residual stream, keeping their positions."""
    image = scores.topk(keep, dim=1).indices.sort(dim=1).values + 1
    total, image_tokens = hidden.shape[1], scores.shape[1]
    text = torch.arange(1 + image_tokens, total, device=hidden.device).expand(len(hidden), -1)
    index = torch.cat([torch.zeros_like(image[:, :1]), image, text], dim=1)

    def gather(x: Tensor) -> Tensor:
        x = x.expand(len(hidden), -1, -1)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

    rows = gather(visible)
    columns = rows.gather(2, index[:, None].expand(-1, rows.shape[1], -1))
    return gather(hidden), (gather(rotary[0]), gather(rotary[1])), columns
