"""Ask a model about pictures, in batches, with and without compression."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import Tensor

from redteam.batching import Batcher, Failure
from redteam.datasets.base import Sample, is_correct
from redteam.diagnosis import Bools, Kept, Places, evidence_tokens
from redteam.pictures import Pixels, to_tensor
from redteam.plan import seed_of
from redteam.scenario import Method, digest
from reports.records import Answer

if TYPE_CHECKING:
    from targets.compression.base import Compressor, Selection
    from targets.decoding import Decoding
    from targets.lvlm import LVLM, Answered

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Shot:
    """A picture as it was saved, with the question about it.

    Attributes:
        sample: question and truth.
        pixels: decoded from the stored file.
        png: content hash of that file.
    """

    sample: Sample
    pixels: Pixels
    png: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer.

    Attributes:
        answer: text and whether it is right.
        kept: what the compressor kept and how it ranked; None without one.
        selection: the same in the target's own form, to be forced upon another image.
        seconds: this sample's share of the batch.
        left: visual tokens in the last layer of the language model; None without compression.
        generated: tokens of the answer, the end token included.
    """

    answer: Answer
    kept: Kept | None
    selection: Selection | None
    seconds: float
    left: int | None = None
    generated: int = 0


Replies = dict[int, Reply | Failure]
"""By index of the sample."""


def of_one_size(shots: Mapping[int, Shot]) -> list[list[int]]:
    """Indices grouped by picture size: only pictures of one size fit into a batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, shot in shots.items():
        groups.setdefault(shot.pixels.shape, []).append(index)
    return list(groups.values())


def good(results: Mapping[int, Result | Failure]) -> dict[int, Result]:
    """Only what could be measured."""
    return {key: one for key, one in results.items() if not isinstance(one, Failure)}


class Asker:
    """Answers questions with one loaded model.

    Args:
        model: the target.
        batcher: how to batch; remembers what fits into memory.
        seed: of the run.
        max_new_tokens: most tokens of an answer.
    """

    def __init__(self, model: LVLM, batcher: Batcher, seed: int, max_new_tokens: int) -> None:
        self.model = model
        self.batcher = batcher
        self.max_new_tokens = max_new_tokens
        self._seed = seed
        self._methods: dict[tuple[str, str], Any] = {}
        self._protected: dict[tuple[str, str], Compressor] = {}
        self._places: dict[tuple[int, int], Places] = {}

    def instance(self, method: Method) -> Any:  # noqa: ANN401 - an instance of any method
        """The method itself, constructed once."""
        key = (method.kind, method.label)
        if key not in self._methods:
            self._methods[key] = method.create()
        return self._methods[key]

    def each(
        self,
        shots: Mapping[int, Shot],
        function: Callable[[Sequence[int]], Sequence[Result]],
        where: str,
    ) -> dict[int, Result | Failure]:
        """Apply a function to batches of indices whose pictures have one size."""
        found: dict[int, Result | Failure] = {}
        for indices in of_one_size(shots):
            results = self.batcher.map(
                indices, function, where, names=lambda index: shots[index].sample.id
            )
            found.update(zip(indices, results, strict=True))
        return found

    def ask(
        self,
        shots: Mapping[int, Shot],
        compression: Method | None,
        defense: Method,
        where: str,
        forced: Mapping[int, Selection] | None = None,
    ) -> Replies:
        """Answer the question of each shot.

        Args:
            shots: by index.
            compression: None for all visual tokens.
            defense: in front of the model, in the compressor, or in how answers are decoded.
            where: what is being done, for the record of errors.
            forced: selections to impose instead of the compressor's own, by index.
        """

        def reply(indices: Sequence[int]) -> list[Reply]:
            chosen = [shots[index] for index in indices]
            imposed = None if forced is None else [forced[index] for index in indices]
            answered = self._answer(chosen, compression, defense, imposed)
            return [_reply(answered, row, shot.sample) for row, shot in enumerate(chosen)]

        return self.each(shots, reply, where)

    def _answer(
        self,
        shots: Sequence[Shot],
        compression: Method | None,
        defense: Method,
        forced: Sequence[Selection] | None,
    ) -> Answered:
        images = self.images(shots)
        if self._kind(defense) == "input":
            seeds = self._seeds(defense, shots)
            images = self.instance(defense)(images, seeds)
        questions = [shot.sample.question for shot in shots]
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        decoding = self.decoding(defense)
        if decoding is not None:
            how |= {"decoding": decoding, "draws": self._seeds(defense, shots)}
        if compression is None:
            return self.model.answer(images, questions, **how)
        return self.model.answer(
            images,
            questions,
            compressor=self.compressor(compression, defense),
            kept=forced,
            # A compressor that draws draws the same for the clean and the attacked image.
            seeds=self._seeds(compression, shots),
            **how,
        )

    def compressor(self, compression: Method, defense: Method) -> Compressor:
        """The compressor as it is deployed: with a selection defence in it."""
        plain: Compressor = self.instance(compression)
        if self._kind(defense) != "selection":
            return plain
        key = (compression.label, defense.label)
        if key not in self._protected:
            # Its draws are not those of the compressor, nor any an attacker can know.
            salt = seed_of(self._seed, digest(defense.spec)[:12], "salt")
            self._protected[key] = self.instance(defense).protect(plain, salt)
        return self._protected[key]

    def decoding(self, defense: Method) -> Decoding | None:
        """How answers are decoded under a defence; None for the model's own way."""
        if self._kind(defense) != "decoding":
            return None
        found: Decoding = self.instance(defense)
        return found

    def acts(self, defense: Method, *, compressed: bool) -> bool:
        """Whether a defence changes anything on a path; one of the selection is in the compressor.

        Args:
            defense: any, `none` too.
            compressed: which path.
        """
        kind = self._kind(defense)
        return kind != "none" and (compressed or kind != "selection")

    def imposes_clean(self, defense: Method) -> bool:
        """Whether the clean picture's selection is imposed on the attacked one."""
        return self._kind(defense) == "selection" and bool(self.instance(defense).clean_ranking)

    @staticmethod
    def _kind(defense: Method) -> str:
        return str(defense.signature.facts.get("kind", "input"))

    def _seeds(self, method: Method, shots: Iterable[Shot]) -> list[int]:
        what = digest(method.spec)[:12]
        return [seed_of(self._seed, what, shot.sample.id) for shot in shots]

    def images(self, shots: Sequence[Shot]) -> Tensor:
        """Pictures of one size as a batch on the model's device."""
        return to_tensor([shot.pixels for shot in shots]).to(self.model.device)

    def places(self, shot: Shot) -> Places:
        """Where the visual tokens of a picture lie."""
        size = (shot.pixels.shape[0], shot.pixels.shape[1])
        if size not in self._places:
            layout = self.model.layout(size)
            boxes = np.asarray(layout.boxes.double().numpy())
            self._places[size] = Places(boxes, layout.shapes[layout.base], size)
        return self._places[size]

    def evidence(self, shot: Shot) -> Bools | None:
        """Tokens that show what the question asks about: bool ``[V]``; None if unknown."""
        if not shot.sample.evidence:
            return None
        return evidence_tokens(self.places(shot), shot.sample.evidence)


def _reply(answered: Answered, row: int, sample: Sample) -> Reply:
    text = answered.texts[row]
    kept = None
    if answered.kept is not None and answered.score is not None:
        kept = Kept(
            kept=np.asarray(answered.kept[row].cpu().numpy(), dtype=bool),
            score=np.asarray(answered.score[row].detach().double().cpu().numpy()),
        )
    return Reply(
        answer=Answer(text=text, correct=is_correct(text, sample)),
        kept=kept,
        selection=answered.selection[row] if answered.selection is not None else None,
        seconds=answered.seconds / len(answered.texts),
        left=None if answered.left is None else int(answered.left[row]),
        generated=answered.generated[row] if answered.generated else 0,
    )
