"""Ask a model about pictures, in batches, with and without compression."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    from attacks.base import Attack
    from defenses.detector import Traffic
    from defenses.guard import Guard
    from targets.compression.base import Compressor, Selection
    from targets.footprint import Footprint
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
        fallback: whether a defence gave the request more tokens than its compressor keeps.
    """

    answer: Answer
    kept: Kept | None
    selection: Selection | None
    seconds: float
    left: int | None = None
    generated: int = 0
    fallback: bool = False


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
        self._guards: dict[str, Guard] = {}
        self._hardened: dict[str, LVLM] = {}
        self._places: dict[tuple[int, int], Places] = {}

    def instance(self, method: Method) -> Any:  # noqa: ANN401 - an instance of any method
        """The method itself, constructed once."""
        key = (method.kind, method.label)
        if key not in self._methods:
            self._methods[key] = method.create()
        return self._methods[key]

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Within it, answers about the same pictures share one run of the vision tower."""
        from targets.lvlm import LVLM
        from targets.remembering import remembering

        models = (self.model, *self._hardened.values())
        # A target of another package may be no LVLM of ours.
        with remembering(one.family for one in models if isinstance(one, LVLM)):
            yield

    def each(
        self,
        shots: Mapping[int, Shot],
        function: Callable[[Sequence[int]], Sequence[Result]],
        where: str,
        key: str = "",
        *,
        gradients: bool = False,
        passes: int = 1,
    ) -> dict[int, Result | Failure]:
        """Apply a function to batches of indices whose pictures have one size.

        Args:
            shots: by index.
            function: indices of a batch → as many results.
            where: what is being done, for the record of errors.
            key: what it is done with, as far as it decides how much memory is needed.
            gradients: whether it keeps activations for them.
            passes: of each picture that are held at once.
        """
        found: dict[int, Result | Failure] = {}
        for indices in of_one_size(shots):
            shape = shots[indices[0]].pixels.shape
            results = self.batcher.map(
                indices,
                function,
                where,
                names=lambda index: shots[index].sample.id,
                key=f"{where}/{key}/{shape}",
                each=passes * self._bytes((shape[0], shape[1]), gradients=gradients),
            )
            found.update(zip(indices, results, strict=True))
        return found

    def _bytes(self, size: tuple[int, int], *, gradients: bool) -> int:
        """Bytes that a pass of one picture is estimated to need; 0 if the target cannot say."""
        estimate = getattr(self.model, "footprint", None)
        if estimate is None:
            return 0
        needs: Footprint = estimate(size)
        return needs.gradient if gradients else needs.answer

    def ask(
        self,
        shots: Mapping[int, Shot],
        compression: Method | None,
        defense: Method,
        where: str,
        forced: Mapping[int, Selection] | None = None,
        draw: int = 0,
    ) -> Replies:
        """Answer the question of each shot.

        Args:
            shots: by index.
            compression: None for all visual tokens.
            defense: of any kind; `none` too.
            where: what is being done, for the record of errors.
            forced: selections to impose instead of the compressor's own, by index.
            draw: of the randomness of compressor and defence; 0 is the one that counts.
        """

        def reply(indices: Sequence[int]) -> list[Reply]:
            chosen = [shots[index] for index in indices]
            imposed = None if forced is None else [forced[index] for index in indices]
            return self._replies(chosen, compression, defense, imposed, draw)

        through = "" if compression is None else compression.label
        passes = self._passes_of(defense, 1)
        return self.each(shots, reply, where, f"{through}/{defense.label}", passes=passes)

    def passes(self, attack: Attack, defense: Method | None, draws: int) -> int:
        """Passes of a picture that a step of an attack holds at once, at most.

        Args:
            attack: any.
            defense: that it goes through; None for none.
            draws: of the defence in each call.
        """
        return attack.gradients_per_step * self._passes_of(defense, draws)

    def _passes_of(self, defense: Method | None, draws: int) -> int:
        from defenses.adaptive import passes_of
        from defenses.base import Defense

        made = None if defense is None else self.instance(defense)
        return passes_of(made, draws) if isinstance(made, Defense) else 1

    def _replies(
        self,
        shots: Sequence[Shot],
        compression: Method | None,
        defense: Method,
        forced: Sequence[Selection] | None,
        draw: int = 0,
    ) -> list[Reply]:
        """One reply for each shot; with a vote, the first of those that say what most say."""
        count = self.guard(defense).votes
        votes = range(draw * count, (draw + 1) * count)
        draws = [self._draw(shots, compression, defense, forced, vote, draw) for vote in votes]
        if count == 1:
            return draws[0]
        from defenses.voting import majority

        found = []
        for row in zip(*draws, strict=True):
            winner = row[majority([one.answer.text for one in row])]
            found.append(replace(winner, seconds=sum(one.seconds for one in row)))
        return found

    def _draw(
        self,
        shots: Sequence[Shot],
        compression: Method | None,
        defense: Method,
        forced: Sequence[Selection] | None,
        draw: int,
        compressor_draw: int = 0,
    ) -> list[Reply]:
        """Replies under one draw of the defence's randomness, and of the compressor's."""
        started = time.perf_counter()
        guard, instance = self.guard(defense), self.defended(defense)
        images = self.images(shots)
        for index, one in enumerate(guard.inputs):
            images = one(images, self._seeds(defense, shots, index, draw))
        compressor = None if compression is None else self.compressor(compression, defense)
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if guard.decoding is not None:
            how |= {"decoding": guard.decoding}
        asked = _Asked(instance, shots, images, self._seeds(defense, shots, 0, draw), how)
        if compressor is None or compression is None:
            return asked.replies(range(len(shots)), None, None, forced)
        # A compressor that draws draws the same for the clean and the attacked image.
        seeds = self._seeds(compression, shots, 0, compressor_draw)
        if guard.fallback is None or forced is not None:
            return asked.replies(range(len(shots)), compressor, seeds, forced)
        questions = [shot.sample.question for shot in shots]
        routes = guard.fallback.choose(instance, images, questions, compressor, seeds)
        deciding = (time.perf_counter() - started) / len(shots)
        return asked.routed(routes, compressor, seeds, deciding)

    def guard(self, defense: Method) -> Guard:
        """The parts of a defence."""
        if defense.label not in self._guards:
            from defenses.guard import Guard

            self._guards[defense.label] = Guard.of(self.instance(defense))
        return self._guards[defense.label]

    def defended(self, defense: Method) -> LVLM:
        """The model that answers under a defence: with its weights, if it has any."""
        encoder = self.guard(defense).encoder
        if encoder is None:
            return self.model
        if defense.label not in self._hardened:
            self._hardened[defense.label] = encoder.harden(self.model)
        return self._hardened[defense.label]

    def compressor(self, compression: Method, defense: Method) -> Compressor:
        """The compressor as it is deployed: with a selection defence in it."""
        plain: Compressor = self.instance(compression)
        if not self.guard(defense).selections:
            return plain
        key = (compression.label, defense.label)
        if key not in self._protected:
            # Its draws are not those of the compressor, nor any an attacker can know.
            salt = seed_of(self._seed, digest(defense.spec)[:12], "salt")
            self._protected[key] = self.guard(defense).protect(plain, salt)
        return self._protected[key]

    def pipeline(self, compression: Method, defense: Method) -> str:
        """Hash of what answers through a compression under a defence; "" where none acts."""
        guard = self.guard(defense)
        if guard.detector is None and not self.acts(defense, compressed=True):
            return ""
        from defenses.fingerprint import deployed

        return deployed(self.compressor(compression, defense), self.guard(defense))

    def traffic(self, shots: Sequence[Shot], compression: Method, defense: Method) -> Traffic:
        """Requests as a detector sees them, in front of an answer through the compressor."""
        from defenses.detector import Traffic

        return Traffic(
            model=self.model,
            compressor=self.instance(compression),
            images=self.images(shots),
            questions=tuple(shot.sample.question for shot in shots),
            seeds=tuple(self._seeds(defense, shots)),
            draws=tuple(self._seeds(compression, shots)),
        )

    def acts(self, defense: Method, *, compressed: bool) -> bool:
        """Whether a defence changes an answer on a path.

        Args:
            defense: any, `none` too.
            compressed: which path.
        """
        return self.guard(defense).acts(compressed=compressed)

    def draws(self, compression: Method | None, defense: Method) -> bool:
        """Whether answers on a path may differ between draws of a defence or a compressor.

        Args:
            compression: None for all visual tokens.
            defense: any, `none` too.
        """
        if compression is not None and self.imposes_clean(defense):
            return False  # what is kept is given
        drawing = compression is not None and self.instance(compression).draws
        return drawing or self.guard(defense).draws(compressed=compression is not None)

    def imposes_clean(self, defense: Method) -> bool:
        """Whether the clean picture's selection is imposed on the attacked one."""
        return self.guard(defense).imposes_clean

    def _seeds(
        self, method: Method, shots: Iterable[Shot], part: int = 0, draw: int = 0
    ) -> list[int]:
        what = digest(method.spec)[:12] + (f"/{part}/{draw}" if part or draw else "")
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


@dataclass(frozen=True, slots=True)
class _Asked:
    """Pictures and questions ready for a model.

    Attributes:
        model: that answers.
        shots: B of them.
        images: ``[B, 3, H, W]`` as a defence of the image has left them.
        draws: one per shot, for a decoding method that draws.
        how: else answers are made.
    """

    model: LVLM
    shots: Sequence[Shot]
    images: Tensor
    draws: Sequence[int]
    how: Mapping[str, Any]

    def replies(
        self,
        rows: Sequence[int],
        compressor: Compressor | None,
        seeds: Sequence[int] | None,
        forced: Sequence[Selection] | None,
    ) -> list[Reply]:
        """Of some of the shots, all with one compressor or with none."""
        how = dict(self.how)
        if "decoding" in how:
            how["draws"] = [self.draws[row] for row in rows]
        if compressor is not None:
            how |= {"compressor": compressor, "kept": forced, "seeds": seeds}
        whole = len(rows) == len(self.shots)
        images = self.images if whole else self.images[list(rows)]
        samples = [self.shots[row].sample for row in rows]
        answered = self.model.answer(images, [one.question for one in samples], **how)
        return [_reply(answered, place, sample) for place, sample in enumerate(samples)]

    def routed(
        self,
        routes: Sequence[Compressor | None],
        deployed: Compressor,
        seeds: Sequence[int],
        deciding: float,
    ) -> list[Reply]:
        """Of all shots, each with the compressor it was given; equal ones in one batch.

        Args:
            routes: one per shot.
            deployed: the compressor; any other is a fall-back.
            seeds: one per shot.
            deciding: seconds that finding the routes took, per shot.
        """
        found: dict[int, Reply] = {}
        for route in dict.fromkeys(routes):
            rows = [row for row, one in enumerate(routes) if one == route]
            chosen = None if route is None else [seeds[row] for row in rows]
            for row, reply in zip(rows, self.replies(rows, route, chosen, None), strict=True):
                fell = route != deployed
                found[row] = replace(reply, seconds=reply.seconds + deciding, fallback=fell)
        return [found[row] for row in range(len(routes))]


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
