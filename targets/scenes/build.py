"""An untrained scenes LVLM: a genuine LLaVA checkpoint, small, with starting values that learn.

Why the starting values matter (each was needed for shape recognition to leave chance level on a
CPU budget): sine-cosine positions loud enough to survive the patch embedding, attention heads that
begin by looking at one neighbour each (the idea of ConViT, arXiv 2103.10697), a patch embedding
that begins as whitened principal components of foreground patches, and language-model matrices
three times the library's default, which is meant for much wider models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from targets.scenes import world

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

MEAN: Final = (0.5, 0.5, 0.5)
STD: Final = (0.25, 0.25, 0.25)
_NEIGHBOURS: Final = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1))
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a scenes LVLM.

    Attributes:
        width: of vision tower and language model alike; divisible by `heads`.
        mlp: hidden width of every feed-forward block.
        heads: attention heads everywhere.
        vision_layers: of the CLIP tower.
        text_layers: of the Llama model.
        late: text does not read the image in the first `late` language-model layers (training
            device, see `train`); FastV at layer K = late is the intended compression.
    """

    width: int = 128
    mlp: int = 256
    heads: int = 4
    vision_layers: int = 4
    text_layers: int = 6
    late: int = 2


def vocabulary() -> tuple[str, ...]:
    """Every token of the word-level tokenizer, in id order."""
    words: dict[str, None] = dict.fromkeys(("<pad>", "<s>", "</s>", "<unk>", "<image>"))
    fixed = "is there a ? what colour is the what shape is how many shapes are there does sign say"
    for group in (fixed.split(), world.SHAPES, world.COLOURS, world.NUMBERS, ("yes", "no")):
        words.update(dict.fromkeys(group))
    words.update(dict.fromkeys(world.CHARACTERS))
    return tuple(words)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer over `vocabulary`; left-padding."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """The processor of every scenes checkpoint: 96 × 96 images, 144 image tokens a picture."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    image_processor = CLIPImageProcessor(
        size={"shortest_edge": world.SIZE},
        crop_size={"height": world.SIZE, "width": world.SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        image_processor,
        build_tokenizer(),
        patch_size=world.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(shape: Shape, seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA of this shape with starting values from `seed`; float32, training mode."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    words = vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.heads,
        image_size=world.SIZE,
        patch_size=world.PATCH,
        hidden_act="gelu",
        projection_dim=shape.width,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=512,
        pad_token_id=words.index("<pad>"),
        bos_token_id=words.index("<s>"),
        eos_token_id=words.index("</s>"),
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=words.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=world.GRID**2,
        tie_word_embeddings=True,
        pad_token_id=words.index("<pad>"),
    )
    with torch.random.fork_rng(devices=[]):
        # transformers draws starting values from the global generator; it is put back after.
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _start_values(model, shape)
    return model.train()


@torch.no_grad()
def _start_values(model: LlavaForConditionalGeneration, shape: Shape) -> None:
    """Overwrite the default starting values as the module's text explains."""
    core = model.model
    for module in (*core.language_model.modules(), *core.multi_modal_projector.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.mul_(3.0)
    tower = core.vision_tower
    frequencies = torch.logspace(math.log10(2.0), math.log10(0.12), shape.width // 4)
    positions = _positions(frequencies)
    tower.embeddings.position_embedding.weight[1:] = 0.45 * positions
    tower.embeddings.patch_embedding.weight.copy_(_whitened_patches(shape.width))
    for i, layer in enumerate(tower.encoder.layers[:2]):
        _look_at_neighbours(layer.self_attn, frequencies, first=i * shape.heads)


def _positions(frequencies: Tensor) -> Tensor:
    """Sine-cosine features of every patch, ``[V, 4 F]``: sin x, cos x, sin y, cos y."""
    cells = torch.arange(world.GRID, dtype=torch.float32)
    y, x = torch.meshgrid(cells, cells, indexing="ij")
    waves = [f(a.reshape(-1, 1) * frequencies) for a in (x, y) for f in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=1)


def _look_at_neighbours(attention: Any, frequencies: Tensor, *, first: int) -> None:  # noqa: ANN401 - transformers is untyped
    """Set q and k so that head h looks at neighbour ``first + h`` through the position features.

    Keys copy a selection of the waves; queries copy them rotated by the offset, so that their
    product peaks at the wanted neighbour.
    """
    count, heads = len(frequencies), int(attention.num_heads)
    waves = int(attention.head_dim) // 4
    chosen = torch.linspace(0, int(count * 0.75) - 1, waves).round().long()
    gain = 1.5
    for head in range(heads):
        offsets = _NEIGHBOURS[(first + head) % len(_NEIGHBOURS)]
        rows = head * int(attention.head_dim)
        q = 0.01 * torch.randn(4 * waves, 4 * count)
        k = 0.01 * torch.randn(4 * waves, 4 * count)
        for axis, offset in enumerate(offsets):
            for j, wave in enumerate(chosen.tolist()):
                sin, cos = 2 * axis * count + wave, (2 * axis + 1) * count + wave
                turn = float(frequencies[wave]) * offset
                r = (axis * waves + j) * 2
                k[r, sin] += gain
                k[r + 1, cos] += gain
                q[r, sin] += gain * math.cos(turn)
                q[r, cos] += gain * math.sin(turn)
                q[r + 1, cos] += gain * math.cos(turn)
                q[r + 1, sin] -= gain * math.sin(turn)
        attention.q_proj.weight[rows : rows + 4 * waves] = q
        attention.k_proj.weight[rows : rows + 4 * waves] = k


def _whitened_patches(width: int) -> Tensor:
    """Convolution weights ``[width, 3, P, P]``: whitened principal components of object patches."""
    patches = []
    for index in range(400):
        one = world.scene("train", index)
        image = (one.image.astype(np.float32) / 255 - MEAN) / STD
        grid = image.reshape(world.GRID, world.PATCH, world.GRID, world.PATCH, 3)
        grid = grid.transpose(0, 2, 4, 1, 3).reshape(world.GRID**2, -1)
        foreground = world.patch_labels(one).any(axis=1)
        patches.append(grid[foreground])
        patches.append(grid[~foreground][:4])
    data = torch.from_numpy(np.concatenate(patches)).float()
    _, scale, basis = torch.linalg.svd(data - data.mean(0), full_matrices=False)
    deviation = scale / math.sqrt(len(data))
    # Components past the noise floor would only amplify pixel noise.
    weights = basis / (deviation[:, None] + 0.25)
    weights = torch.nn.functional.pad(weights, (0, 0, 0, max(0, width - len(weights))))[:width]
    return weights.reshape(width, 3, world.PATCH, world.PATCH) * 1.5
