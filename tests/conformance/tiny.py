"""Tiny LLaVA models with random weights, and their processors; nothing comes from a hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import weights
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from targets.caches import cache_name
from targets.compression import (
    CATP,
    AttentiveRemoval,
    CDPruner,
    DivPrune,
    Explainability,
    FasterVLM,
    FastV,
    Grid,
    HiPrune,
    HiRED,
    InformationHorizon,
    Pool,
    PruMerge,
    PyramidDrop,
    QueCC,
    Random,
    SparseVLM,
    Sparsifiner,
    TokenFLEX,
    ToMe,
    TransPrune,
    Uniform,
    VASparse,
    VisionDrop,
    VisionZip,
    VisPruner,
    ZooPrune,
)
from targets.compression.base import Compressor

SIZE, PATCH = 48, 8
TOKENS = (SIZE // PATCH) ** 2
_SENTENCE = (
    "<pad> <s> </s> <unk> <image> is there a red blue circle square what colour the how many ? "
    "yes no one two three green sign says on left right USER ASSISTANT :"
)
WORDS = _SENTENCE.split()
QUESTIONS = ("is there a red circle ?", "what colour is the square ?", "how many ?")
ANSWERS = ("yes", "blue", "two three")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
QUARTER = TOKENS // 4

COMPRESSORS: dict[str, Compressor] = {
    "random at the first layer": Random(layer=0, keep_tokens=QUARTER, positions="reindex"),
    "fastv": FastV(layer=2, keep_tokens=QUARTER),
    "fastv reindexed": FastV(layer=1, keep_tokens=QUARTER, positions="reindex"),
    "visionzip": VisionZip(keep_tokens=QUARTER),
    "visionzip kept": VisionZip(keep_tokens=QUARTER, positions="keep"),
    "divprune": DivPrune(keep_tokens=QUARTER),
    "divprune kept": DivPrune(keep_tokens=QUARTER, positions="keep"),
    "random": Random(keep_tokens=QUARTER),
    "random inside": Random(layer=2, keep_tokens=QUARTER),
    "uniform": Uniform(keep_tokens=QUARTER),
    "grid": Grid(keep_tokens=QUARTER),
    "pool": Pool(keep_tokens=QUARTER),
    "pool max kept": Pool(keep_tokens=QUARTER, kind="max", positions="keep"),
    "fastervlm": FasterVLM(keep_tokens=QUARTER),
    "vispruner": VisPruner(keep_tokens=QUARTER),
    "vispruner kept": VisPruner(keep_tokens=QUARTER, important=0.75, positions="keep"),
    "prumerge": PruMerge(keep_tokens=QUARTER),
    "prumerge plus kept": PruMerge(keep_tokens=QUARTER, plus=True, positions="keep"),
    "hired": HiRED(keep_tokens=QUARTER),
    "hiprune": HiPrune(keep_tokens=QUARTER, alpha=0.6, object_layer=0),
    "cdpruner": CDPruner(keep_tokens=QUARTER),
    "zoo_prune": ZooPrune(keep_tokens=QUARTER, directions=4, seed=2),
    "zoo_prune exact": ZooPrune(keep_tokens=QUARTER, directions=4, seed=2, estimate="jvp"),
    "pyramiddrop": PyramidDrop(keep_tokens=QUARTER),
    "pyramiddrop kept": PyramidDrop(keep_tokens=QUARTER, positions="keep"),
    "sparsevlm": SparseVLM(keep_tokens=QUARTER),
    "sparsevlm kept": SparseVLM(keep_tokens=QUARTER, positions="keep"),
    "sparsevlm plus": SparseVLM(keep_tokens=QUARTER, variant="v2.0"),
    "transprune": TransPrune(keep_tokens=QUARTER),
    "visiondrop": VisionDrop(keep_tokens=QUARTER),
    "visiondrop kept": VisionDrop(keep_tokens=QUARTER, positions="keep"),
    "catp": CATP(keep_tokens=QUARTER),
    "catp reindexed": CATP(keep_tokens=QUARTER, positions="reindex"),
    "vasparse": VASparse(keep_tokens=QUARTER),
    "vasparse summed": VASparse(keep_tokens=QUARTER, aggregate="sum", positions="reindex"),
    "information_horizon": InformationHorizon(keep_tokens=QUARTER),
    "information_horizon reindexed": InformationHorizon(
        keep_tokens=QUARTER, layer=1, early_retention=0.7, positions="reindex"
    ),
    "explainability": Explainability(keep_tokens=QUARTER, weights=weights.folder("explainability")),
    "quecc": QueCC(keep_tokens=QUARTER, weights=weights.folder("quecc")),
    "quecc untrained": QueCC(keep_tokens=QUARTER, weights="none", positions="keep"),
    "tokenflex": TokenFLEX(keep_tokens=QUARTER, weights=weights.folder("tokenflex")),
    "tome": ToMe(keep_tokens=QUARTER),
    "tome spatial": ToMe(
        keep_tokens=QUARTER, schedule="decreasing", order="spatial", positions="keep"
    ),
    "tome post": ToMe(keep_tokens=QUARTER, variant="post"),
    "attentive_removal": AttentiveRemoval(keep_tokens=QUARTER),
    "attentive_removal kept": AttentiveRemoval(keep_tokens=QUARTER, positions="keep"),
    "sparsifiner": Sparsifiner(keep_tokens=QUARTER),
    "tokenflex untrained": TokenFLEX(keep_tokens=QUARTER, weights="none", positions="keep"),
}


BLIND = ("random", "uniform", "grid", "pool", "quecc", "tokenflex", "drop_all")
"""Compressors whose scores do not depend on the image."""


def build_processor(template: str | None = TEMPLATE) -> Any:
    """A word-level processor for 48 × 48 pictures, 36 tokens each."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", WORDS.index("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=template,
    )


def build_model(
    attention: str = "sdpa",
    *,
    layers: int = 4,
    vision_layers: int = 3,
    feature_layer: int = -1,
    seed: int = 0,
    kv_heads: int = 2,
) -> Any:
    """A random LLaVA, loud enough that attention is far from flat."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=WORDS.index("<image>"),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS,
        pad_token_id=0,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 * 1.5)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def pictures(count: int = 3, seed: int = 0, size: int = SIZE) -> Tensor:
    """Random 8-bit pictures with coarse structure, ``[count, 3, size, size]`` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    fine = torch.rand(count, 3, size, size, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size, mode="bilinear") * 0.7 + fine * 0.3
    return (images * 255).round() / 255


def greedy(
    model: Any, ids: Tensor, mask: Tensor, pixels: Tensor | None, steps: int, positions: Tensor
) -> Tensor:
    """Cached greedy decoding by hand, never stopping; logits ``[B, steps, vocabulary]``."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        pixel_values=pixels,
        **{cache_name(): cache},
        use_cache=True,
    )
    logits = [out.logits[:, -1]]
    last = positions[:, -1:]
    for _ in range(steps - 1):
        token = logits[-1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        last = last + 1
        out = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=last,
            **{cache_name(): cache},
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
    model.last_cache = cache
    return torch.stack(logits, 1)


def texts(count: int) -> Sequence[str]:
    """`count` questions of different lengths."""
    return tuple(QUESTIONS[i % len(QUESTIONS)] for i in range(count))


def prompt(questions: Sequence[str], images: int = 1) -> Any:
    """Left-padded prompts, each with `images` pictures in front."""
    rows = [rendered(question, images) for question in questions]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)


def rendered(question: str, images: int = 1) -> list[int]:
    """Ids of one prompt, pictures first."""
    image = WORDS.index("<image>")
    return [1, *[image] * TOKENS * images, *(WORDS.index(word) for word in question.split())]


def normalised(images: Tensor) -> Tensor:
    """CLIP's normalisation, written out."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return (images - mean) / std


def whole(compressor: Compressor) -> Compressor:
    """The same compressor, allowed to keep everything."""
    from dataclasses import replace

    return replace(compressor, keep_tokens=None, retention=1.0)  # type: ignore[type-var]
