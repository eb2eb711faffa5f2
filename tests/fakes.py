"""A small differentiable target: random patch embedding, one attention, linear answer head.

It implements the views of `targets.base` with a few matrices, so that attacks can be tested in
milliseconds and where every number can be checked by hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from targets.base import (
    Batch,
    Continuation,
    Generation,
    Knowledge,
    Path,
    PathMargins,
    Ranking,
    Surrogate,
    TowerLayer,
    VisionOutput,
    includes,
)
from targets.errors import KnowledgeError

VOCABULARY = 7
DEPTH = 3
"""Layers of the fake's tower."""
END = 1
"""The fake's end token."""
_WORDS = {2: "no", 3: "yes"}


def make_batch(count: int = 4, size: int = 16, seed: int = 0) -> Batch:
    """Random 8-bit images with a question and an answer each."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (count, 3, size, size), generator=generator)
    return Batch(
        ids=tuple(f"s{i}" for i in range(count)),
        images=levels.float() / 255,
        questions=tuple(f"question {i}?" for i in range(count)),
        answers=tuple("yes" if i % 2 else "no" for i in range(count)),
    )


def pick(batch: Batch, index: int) -> Batch:
    """One sample of a batch, as a batch."""
    return batch.rows([index])


def text_vector(text: str, width: int) -> Tensor:
    """A fixed random vector for a text."""
    digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randn(width, generator=generator)


@dataclass
class FakeView:
    """WhiteBoxView of the fake target, or less: methods above `knowledge` raise.

    A question that contains "nan" makes every loss of that sample NaN; one that contains "dead"
    makes its gradient zero. Unless `adaptive`, the number of kept tokens does not depend on the
    picture.
    """

    knowledge: Knowledge = Knowledge.WHITE_BOX
    keep: int = 4
    patch: int = 4
    heads: int = 2
    width: int = 8
    attention: bool = True
    seed: int = 1
    sharpness: float = 4.0
    adaptive: bool = True
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        pixels = 3 * self.patch**2
        dim = self.heads * self.width
        self.embed = torch.randn(pixels, dim, generator=generator) / pixels**0.5 * 3
        self.to_key = torch.randn(dim, dim, generator=generator) / dim**0.5
        self.head = torch.randn(dim, VOCABULARY, generator=generator)
        self.blocks = torch.randn(DEPTH, dim, dim, generator=generator) / dim**0.5
        self.cls = torch.randn(DEPTH, dim, generator=generator)

    def token_mask_to_pixels(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        rows = size[0] // self.patch
        grid = tokens.view(len(tokens), 1, rows, -1).float()
        return grid.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)

    def tower_depth(self) -> int:
        return DEPTH

    def encode(self, images: Tensor) -> VisionOutput:
        self._enter("encode", Knowledge.ENCODER)
        features = self._features(images)
        return VisionOutput(features, features.norm(dim=-1))

    def layers(
        self, images: Tensor, numbers: Sequence[int], *, normalised: bool = False
    ) -> tuple[TowerLayer, ...]:
        self._enter("layers", Knowledge.ENCODER)
        hidden, found = self._features(images), []
        for block, cls in zip(self.blocks, self.cls, strict=True):
            # Row by row, so that a sample does not depend on its neighbours.
            hidden = torch.stack([torch.tanh(row @ block) for row in hidden])
            score = torch.stack([row @ cls for row in hidden]).softmax(-1)
            shown = torch.nn.functional.normalize(hidden, dim=-1) if normalised else hidden
            found.append(TowerLayer(shown, score))
        return tuple(found[number] for number in numbers)

    def values(
        self,
        images: Tensor,
        numbers: Sequence[int],
        *,
        normalised: bool = False,
        smoothing: int = 0,
        keys: int = -1,
    ) -> tuple[Tensor, ...]:
        self._enter("values", Knowledge.ENCODER)
        del keys
        features, found = self._features(images), []
        for block in self.blocks:
            values = torch.stack([row @ block.T for row in features])
            for _ in range(smoothing):
                weights = torch.stack([(row @ row.T).softmax(-1) for row in features])
                values = torch.stack([w @ v for w, v in zip(weights, values, strict=True)])
            shown = torch.nn.functional.normalize(values, dim=-1) if normalised else values
            found.append(shown)
        return tuple(found[number] for number in numbers)

    def project(self, features: Tensor) -> Tensor:
        self._enter("project", Knowledge.WHITE_BOX)
        return torch.stack([row @ self.to_key for row in features])

    def concepts(self, texts: Sequence[str]) -> Tensor:
        self._enter("concepts", Knowledge.WHITE_BOX)
        return torch.stack([text_vector(text, self.heads * self.width) for text in texts])

    def continuation(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        *,
        length: int,
        path: Path = "full",
        under: Any = None,
    ) -> Continuation:
        del under
        self._enter(f"continuation {path}", Knowledge.WHITE_BOX)
        with torch.no_grad():
            ids = self._steps(images, questions, length, path, False)[0].argmax(-1)
        ended = ids == END
        return Continuation(ids, ended.long().cumsum(1) - ended.long() == 0)

    def generation(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        said: Continuation,
        *,
        path: Path = "full",
        straight_through: bool = False,
        under: Any = None,
    ) -> Generation:
        del under
        self._enter(f"generation {path}", Knowledge.WHITE_BOX)
        length = said.ids.shape[1]
        logprobs, hidden = self._steps(images, questions, length, path, straight_through)
        return Generation(logprobs, logprobs[..., END], hidden, said.real)

    def rank(self, images: Tensor, questions: tuple[str, ...], *, under: Any = None) -> Ranking:
        del under
        self._enter("rank", Knowledge.COMPRESSED)
        return self._rank(images, questions)

    def answer_nll(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        path: Path = "full",
        straight_through: bool = False,
        under: Any = None,
    ) -> Tensor:
        del under
        self._enter(f"answer_nll {path}", Knowledge.WHITE_BOX)
        logprobs, _ = self._answer(images, questions, path, straight_through)
        wanted = torch.tensor([len(answer) % VOCABULARY for answer in answers])
        return -logprobs[torch.arange(len(images)), 0, wanted]

    def answer_logprobs(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        path: Path = "full",
        under: Any = None,
    ) -> tuple[Tensor, Tensor]:
        del answers, under
        self._enter(f"answer_logprobs {path}", Knowledge.WHITE_BOX)
        return self._answer(images, questions, path, False)

    def full_and_rank(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        under: Any = None,
    ) -> tuple[Tensor, Tensor, Ranking]:
        del answers, under
        self._enter("full_and_rank", Knowledge.WHITE_BOX)
        logprobs, mask = self._answer(images, questions, "full", False)
        return logprobs, mask, self._rank(images, questions)

    def path_margins(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        under: Any = None,
        full_gradient: bool = True,
    ) -> PathMargins:
        del under
        self._enter("path_margins", Knowledge.WHITE_BOX)
        wanted = torch.tensor([[len(answer) % VOCABULARY] for answer in answers])
        margins = []
        for path, through in (("full", False), ("compressed", True)):
            logprobs = self._answer(images, questions, path, through)[0][:, 0]  # type: ignore[arg-type]
            others = logprobs.scatter(1, wanted, -torch.inf).amax(1)
            margin = logprobs.gather(1, wanted)[:, 0] - others
            margins.append(margin if full_gradient or path == "compressed" else margin.detach())
        return PathMargins(*margins)

    def option_logprobs(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        options: tuple[tuple[str, ...], ...],
        *,
        path: Path = "full",
        straight_through: bool = False,
    ) -> Tensor:
        self._enter(f"option_logprobs {path}", Knowledge.WHITE_BOX)
        logprobs, _ = self._answer(images, questions, path, straight_through)
        wanted = torch.tensor([[len(one) % VOCABULARY for one in row] for row in options])
        return logprobs[:, 0].gather(1, wanted)

    def option_passes(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        options: tuple[tuple[str, ...], ...],
        *,
        path: Path = "full",
    ) -> int:
        return 1

    def ask(
        self, images: Tensor, questions: tuple[str, ...], *, path: Path = "compressed"
    ) -> tuple[str, ...]:
        self._enter(f"ask {path}", Knowledge.QUERY)
        logprobs, _ = self._answer(images, questions, path, False)
        return tuple(_WORDS.get(n, "w" * n) for n in logprobs[:, 0].argmax(-1).tolist())

    def option_scores(
        self, images: Tensor, questions: tuple[str, ...], options: tuple[tuple[str, ...], ...]
    ) -> Tensor:
        self._enter("option_scores", Knowledge.SCORES)
        logprobs, _ = self._answer(images, questions, "compressed", False)
        wanted = torch.tensor([[len(one) % VOCABULARY for one in row] for row in options])
        return logprobs[:, 0].gather(1, wanted).detach()

    def _enter(self, call: str, needed: Knowledge) -> None:
        if not includes(self.knowledge, needed):
            raise KnowledgeError(f"{call} needs {needed.value}, the view is {self.knowledge.value}")
        self.calls.append(call)

    def _features(self, images: Tensor) -> Tensor:
        # One sample at a time: batched kernels may round differently, which sign() would amplify.
        p = self.patch
        tiles = [x.unfold(1, p, p).unfold(2, p, p).permute(1, 2, 0, 3, 4) for x in images]
        rows = [(t.reshape(-1, 3 * p * p) - 0.5) @ self.embed for t in tiles]
        return torch.stack(rows)

    def _rank(self, images: Tensor, questions: tuple[str, ...]) -> Ranking:
        features = torch.tanh(self._features(images))
        flaws = torch.tensor([float("nan") if "nan" in q else 1.0 for q in questions])
        live = torch.tensor([0.0 if "dead" in q else 1.0 for q in questions])
        features = features.detach() + (features - features.detach()) * live.view(-1, 1, 1)
        features = features * flaws.view(-1, 1, 1)
        if not self.attention:
            score = features.norm(dim=-1)
            centred = score - score.mean(1, keepdim=True)
            standard = centred / score.std(1, keepdim=True)
            kept, soft = self._keep(score), self._soft(standard)
            return Ranking(score, standard, None, None, features, kept, soft)
        shape = (len(images), -1, self.heads, self.width)
        keys = torch.stack([f @ self.to_key for f in features]).view(shape).transpose(1, 2)
        query = torch.stack([text_vector(q, self.heads * self.width) for q in questions])
        query = query.view(-1, self.heads, self.width)
        weights = (keys * query[:, :, None]).sum(-1) * self.sharpness / self.width
        score = weights.softmax(-1).mean(1)
        log_score, kept = (score + 1e-12).log(), self._keep(score)
        return Ranking(score, log_score, query, keys, features, kept, self._soft(log_score))

    def _soft(self, log_score: Tensor) -> Tensor | None:
        """Tokens above the mean, relaxed; what is really kept is `keep`, for simplicity."""
        if not self.adaptive:
            return None
        return torch.sigmoid((log_score - log_score.mean(1, keepdim=True)) / 0.5).sum(1)

    def _keep(self, score: Tensor) -> Tensor:
        order = score.argsort(dim=1, descending=True, stable=True)
        return order.argsort(dim=1, stable=True) < self.keep

    def _steps(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        length: int,
        path: Path,
        straight_through: bool,
    ) -> tuple[Tensor, Tensor]:
        """Distributions ``[B, A, vocabulary]`` and hidden states ``[B, A, D]`` of an answer."""
        pooled = self._pooled(images, questions, path, straight_through)
        hidden, states = pooled, []
        for step in range(length):
            hidden = torch.stack([torch.tanh(row @ self.blocks[step % DEPTH]) for row in hidden])
            states.append(hidden)
        shown = torch.stack(states, 1)
        # It likes to end, so that there is something to prolong.
        likes = 3.0 * torch.nn.functional.one_hot(torch.tensor(END), VOCABULARY)
        logits = torch.stack([row @ self.head for row in shown]) + likes
        return logits.log_softmax(-1), shown

    def _answer(
        self, images: Tensor, questions: tuple[str, ...], path: Path, straight_through: bool
    ) -> tuple[Tensor, Tensor]:
        pooled = self._pooled(images, questions, path, straight_through)
        logits = torch.stack([row @ self.head for row in pooled])
        logprobs = logits.log_softmax(-1)[:, None].expand(-1, 2, -1)
        return logprobs, torch.ones(logprobs.shape[:2], dtype=torch.bool)

    def _pooled(
        self, images: Tensor, questions: tuple[str, ...], path: Path, straight_through: bool
    ) -> Tensor:
        ranking = self._rank(images, questions)
        weights = torch.ones_like(ranking.score)
        if path == "compressed":
            weights = ranking.kept.float()
            if straight_through:
                bar = ranking.log_score.sort(dim=1, descending=True).values[:, self.keep - 1]
                soft = torch.sigmoid(ranking.log_score - bar.detach()[:, None])
                weights = weights + soft - soft.detach()
        return (ranking.features * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


@dataclass
class FakeSurrogates:
    """SurrogateView over fakes of different seeds."""

    count: int = 2
    knowledge: Knowledge = Knowledge.SURROGATE

    def __post_init__(self) -> None:
        self.views = [FakeView(seed=10 + index) for index in range(self.count)]
        self.surrogates = tuple(
            Surrogate(f"fake-{index}", 2, (16, 16), view) for index, view in enumerate(self.views)
        )


def view_for(knowledge: Knowledge, **options: Any) -> FakeView | FakeSurrogates:
    """The fake view an attack with this knowledge gets."""
    if knowledge is Knowledge.SURROGATE:
        return FakeSurrogates()
    return FakeView(knowledge, **options)
