"""Checked rows, and the samples they become when asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from redteam.datasets.base import Box, Sample
from redteam.datasets.images import Picture, PictureError, decode
from redteam.datasets.subset import choose
from redteam.errors import DatasetError


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample whose picture has not been read yet.

    Attributes:
        where: ``file:line`` or ``file: row n``, for messages.
        picture: where the pixels are.
        id: unique in the data set.
        image_id: of the picture; "" to use the hash of its bytes.
        question: as the model is asked.
        answer: the right answer, as the model would spell it.
        accepted: further spellings that count as right.
        kind: kind of question.
        evidence: boxes one has to see to answer.
        options: of a multiple choice.
        references: what each annotator said.
        scoring: name of the scorer.
        bar: credit above which an answer is right.
    """

    where: str
    picture: Picture
    id: str
    image_id: str
    question: str
    answer: str
    accepted: tuple[str, ...] = ()
    kind: str = ""
    evidence: tuple[Box, ...] = ()
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    scoring: str = "exact"
    bar: float = 0.5

    def wrong(self, message: object) -> DatasetError:
        """An error that names this row."""
        return DatasetError(f"{self.where}: {message}")

    @property
    def words(self) -> str:
        """Everything but the picture and the place, as one line."""
        return json.dumps(
            [
                self.id,
                self.image_id,
                self.question,
                self.answer,
                self.accepted,
                self.kind,
                self.evidence,
                self.options,
                self.references,
                self.scoring,
                self.bar,
            ]
        )


class Entries:
    """Samples over checked rows; see `redteam.datasets.base.Samples`.

    Pictures are measured when the object is made (their header only, where they are files) and
    decoded when a sample is asked for.

    Args:
        entries: at least one.

    Raises:
        DatasetError: naming the row, if a picture may not be decoded.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = tuple(entries)
        self._identity = ""
        seen: set[str] = set()
        for entry in self._entries:
            if entry.picture.key in seen:
                continue
            seen.add(entry.picture.key)
            try:
                entry.picture.measure()
            except PictureError as error:
                raise entry.wrong(error) from error

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all samples, in order."""
        return tuple(entry.id for entry in self._entries)

    @property
    def identity(self) -> str:
        """SHA-256 over all texts and the bytes of all pictures; each picture is read once."""
        if not self._identity:
            digests: dict[str, str] = {}
            total = hashlib.sha256()
            for entry in self._entries:
                key = entry.picture.key
                if key not in digests:
                    digests[key] = self._digest(entry)
                total.update(f"{entry.words}\n{digests[key]}\n".encode())
            self._identity = total.hexdigest()
        return self._identity

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        try:
            image = decode(entry.picture)
        except PictureError as error:
            raise entry.wrong(error) from error
        height, width = image.shape[:2]
        for box in entry.evidence:
            if box[2] > width or box[3] > height:
                raise entry.wrong(
                    f"evidence {list(box)} reaches beyond the {width} × {height} image"
                )
        return Sample(
            id=entry.id,
            image_id=entry.image_id or self._digest(entry)[:16],
            image=image,
            question=entry.question,
            answer=entry.answer,
            accepted=entry.accepted,
            kind=entry.kind,
            evidence=entry.evidence,
            options=entry.options,
            references=entry.references,
            scoring=entry.scoring,
            bar=entry.bar,
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def _digest(self, entry: Entry) -> str:
        try:
            return entry.picture.digest()
        except PictureError as error:
            raise entry.wrong(error) from error


def gather(
    entries: Sequence[Entry],
    count: int | None,
    seed: int | None,
    *,
    together: bool = False,
) -> Entries:
    """The samples of a data set, or the part of them that was asked for.

    Args:
        entries: all rows that were read.
        count: how many samples; None for all.
        seed: of the subset; None for the first so many.
        together: take all questions about a picture or none.

    Raises:
        DatasetError: naming the row, if an id is used twice or a picture may not be decoded.
    """
    check_ids(entries)
    groups = [entry.image_id for entry in entries] if together else None
    kinds = [entry.kind for entry in entries]
    chosen = choose([entry.id for entry in entries], count, seed, kinds, groups)
    return Entries([entries[index] for index in chosen])


def check_ids(entries: Sequence[Entry]) -> None:
    """Refuse a data set that uses an id twice.

    Raises:
        DatasetError: naming both rows.
    """
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.id in seen:
            raise entry.wrong(
                f"id {entry.id!r} is used before, at {seen[entry.id]}; ids are unique"
            )
        seen[entry.id] = entry.where
