"""Questions one by one, and a frozen scenes LVLM that reads any visual tokens before them.

A compressor that looks at the question makes other visual tokens for each question, so the packing
of `targets.scenes.packing` (many questions behind one image) does not fit here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from targets.scenes import WEIGHTS, build, passes, world
from targets.scenes.packing import IGNORE, PREFIX, Packed

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

ASKED: Final = 6
"""Words of the longest question."""
REPLY: Final = 3
"""Words of the longest answer and the end mark."""


@dataclass(frozen=True, slots=True)
class Questions:
    """Q questions about S scenes, as tensors.

    Attributes:
        images: uint8 ``[S, 3, 96, 96]``.
        scene: ``[Q]`` which scene each is about.
        kind: ``[Q]`` index in `world.KINDS`.
        words: ``[Q, ASKED]`` question ids, padded with 0 at the left.
        targets: ``[Q, REPLY]`` answer and end mark, padded with IGNORE.
    """

    images: Tensor
    scene: Tensor
    kind: Tensor
    words: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Q."""
        return len(self.scene)

    def of_scenes(self, scenes: Tensor) -> Questions:
        """All questions about some scenes, which are numbered anew."""
        where = torch.full((len(self.images),), -1)
        where[scenes] = torch.arange(len(scenes))
        new = where[self.scene]
        asked = new >= 0
        rest = (part[asked] for part in (self.kind, self.words, self.targets))
        return Questions(self.images[scenes], new[asked], *rest)

    def some(self, rows: Tensor) -> Questions:
        """Some of the questions, and the scenes they are about."""
        scenes, new = torch.unique(self.scene[rows], return_inverse=True)
        rest = (part[rows] for part in (self.kind, self.words, self.targets))
        return Questions(self.images[scenes], new, *rest)


def draw(split: world.Split, start: int, count: int) -> Questions:
    """All questions about `count` scenes of a split, from scene number `start` on."""
    ids = {word: i for i, word in enumerate(build.vocabulary())}
    images, scene, kind, words, targets = [], [], [], [], []
    for place in range(count):
        one = world.scene(split, start + place)
        images.append(torch.from_numpy(one.image.copy()).permute(2, 0, 1))
        for question in one.questions:
            asked = [ids[word] for word in question.text.split()]
            reply = [*(ids[word] for word in question.answer.split()), ids["</s>"]]
            words.append([0] * (ASKED - len(asked)) + asked)
            targets.append(reply + [IGNORE] * (REPLY - len(reply)))
            kind.append(world.KINDS.index(question.kind))
            scene.append(place)
    columns = (torch.tensor(part) for part in (scene, kind, words, targets))
    return Questions(torch.stack(images), *columns)


def frozen(checkpoint: str, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """A shipped scenes LVLM in float32, its weights without gradient."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(  # our own folder # nosec B615
        WEIGHTS / checkpoint, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval().requires_grad_(False)


def tower(model: LlavaForConditionalGeneration, images: Tensor) -> tuple[Tensor, ...]:
    """Patches ``[S, V, D]`` behind each layer of the vision tower, without gradient."""
    with torch.no_grad():
        hidden = model.model.vision_tower(passes.pixels(images), output_hidden_states=True)
    return tuple(layer[:, 1:] for layer in hidden.hidden_states[1:])


def noisy(images: Tensor, amplitude: float, generator: torch.Generator) -> Tensor:
    """Pictures in [0, 1]; half of the batches with uniform noise of up to `amplitude`."""
    pictures = images.float() / 255
    if float(torch.rand((), generator=generator)) < 0.5:
        return pictures
    strength = amplitude * float(torch.rand((), generator=generator))
    noise = torch.rand(pictures.shape, generator=generator) * 2 - 1
    return (pictures + strength * noise).clamp(0, 1)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the language model makes of visual tokens, a question and its answer.

    Attributes:
        logits: ``[Q, REPLY, vocabulary]`` of the answer and the end mark.
        attentions: ``[Q, N, L, L]`` of each layer, where asked for; else empty.
        visual: columns of the visual tokens. question: columns of the question, padding included.
    """

    logits: Tensor
    attentions: tuple[Tensor, ...]
    visual: slice
    question: slice


def read(
    model: LlavaForConditionalGeneration,
    visual: Tensor,
    batch: Questions,
    *,
    attentions: bool = False,
) -> Reading:
    """Read ``<s>``, visual tokens ``[Q, S, D]``, question and answer; positions have no gaps."""
    text: Any = model.model.language_model
    reply = batch.targets[:, :-1].clamp_min(0)
    before = text.embed_tokens(torch.ones_like(reply[:, :1]))
    behind = text.embed_tokens(torch.cat([batch.words, reply], 1))
    embeds = torch.cat([before, visual, behind], 1)
    # Padding stands between picture and question; masked, it changes nothing.
    live = torch.ones(embeds.shape[:2], dtype=torch.long)
    first = 1 + visual.shape[1]
    live[:, first : first + ASKED] = (batch.words > 0).long()
    output = text(
        inputs_embeds=embeds,
        attention_mask=live,
        position_ids=(live.cumsum(1) - 1).clamp_min(0),
        use_cache=False,
        output_attentions=attentions,
    )
    logits = model.lm_head(output.last_hidden_state[:, -batch.targets.shape[1] :])
    seen = tuple(output.attentions) if attentions else ()
    return Reading(logits, seen, slice(1, first), slice(first, first + ASKED))


def read_packed(model: LlavaForConditionalGeneration, visual: Tensor, batch: Packed) -> Tensor:
    """Logits ``[S, PACK, vocabulary]`` of all questions packed behind visual tokens ``[S, n, D]``.

    For tokens that do not depend on the question: a third of the work of reading them one by one.
    """
    text: Any = model.model.language_model
    before = text.embed_tokens(torch.ones_like(batch.tokens[:, :1]))
    embeds = torch.cat([before, visual, text.embed_tokens(batch.tokens)], 1)
    count = visual.shape[1]
    # Everyone sees start and picture (-2), a word its own question, padding (-1) only itself.
    block = torch.nn.functional.pad(batch.block, (1 + count, 0), value=-2)
    same = (block[:, :, None] == block[:, None]) & (block >= 0)[:, None]
    causal = torch.ones(block.shape[1], block.shape[1], dtype=torch.bool).tril()
    own = torch.eye(block.shape[1], dtype=torch.bool)
    visible = (causal & (same | (block == -2)[:, None])) | own
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    places = torch.arange(1 + count).expand(len(block), -1)
    output = text(
        inputs_embeds=embeds,
        attention_mask=mask[:, None],
        position_ids=torch.cat([places, batch.positions - PREFIX + 1 + count], 1),
        use_cache=False,
    )
    logits: Tensor = model.lm_head(output.last_hidden_state[:, 1 + count :])
    return logits


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of answer tokens and end marks."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether greedy decoding would give exactly this answer and stop, bool ``[Q]``."""
    return ((logits.argmax(-1) == targets) | (targets == IGNORE)).all(-1)


def by_kind(right: Tensor, kind: Tensor) -> dict[str, float]:
    """Share of right answers of each kind, and over all."""
    out: dict[str, float] = {
        name: round(float(right[kind == index].float().mean()), 4)
        for index, name in enumerate(world.KINDS)
        if bool((kind == index).any())
    }
    return {**out, "all": round(float(right.float().mean()), 4)}
