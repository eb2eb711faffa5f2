"""GQA: questions that take several steps, generated from scene graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from redteam.datasets.entries import Entry
from redteam.datasets.images import Picture, PictureError
from redteam.datasets.own import name, text
from redteam.datasets.published import Published
from redteam.datasets.tables import Record, Table, require


@dataclass(frozen=True, kw_only=True)
class Gqa(Published):
    """GQA: compositional questions with one short answer each.

    *GQA: A New Dataset for Real-World Visual Reasoning* (arXiv 1902.09506), in the columns of
    lmms-lab/GQA, which keeps questions (``id, imageId, question, answer, types``) and pictures
    (``id, image``) in two configurations, ``…_instructions`` and ``…_images``. A file of your own
    may hold both in one table. Scoring: `redteam.datasets.scoring.gqa`. The kind is the structural
    type.

    Args:
        path: folder as `hf download` writes it, or a .parquet or .jsonl file of the same columns,
            relative to the scenario; null loads it from the hub.
        repo: id on the hub.
        config: configuration with the questions, and folder in `path`.
        split: name of the split.
        revision: commit, tag or branch on the hub; null is the newest, so pin it for a result that
            lasts.
        samples: use only so many; null is all.
        seed: of the subset, which is stratified by kind; null takes the first.
        filter: keep what every target gets right at full tokens (clean_right), and of these what
            it gets wrong on a black image (sighted); null keeps all.
        suffix: appended to each question.
        images: configuration with the pictures.
    """

    name: ClassVar[str] = "gqa"
    wanted: ClassVar[tuple[str, ...]] = ("id", "imageId", "question", "answer")
    optional: ClassVar[tuple[str, ...]] = ("types",)

    repo: str = "lmms-lab/GQA"
    config: str | None = "testdev_balanced_instructions"
    split: str = "testdev"
    suffix: str = "\nAnswer the question using a single word or phrase."
    images: str = "testdev_balanced_images"

    def tables(self, config: str | None) -> list[Table]:
        """Tables of questions, each joined to the pictures where these are apart."""
        found = super().tables(config)
        if all("image" in table.columns for table in found):
            return found
        pictures = {}
        for table in super().tables(self.images):
            require(table, ("id", "image"), self.path or self.repo)
            for record in table.records(("id",)):
                pictures[name(record, "id", "")] = (table, record)
        return [Joined(table, pictures) for table in found]

    def entry(self, table: Table, record: Record, position: int) -> Entry:
        """See `Published`."""
        kinds = record.values.get("types")
        return Entry(
            where=record.where,
            picture=table.picture(record, "image"),
            id=name(record, "id", str(position)),
            image_id=text(record, "imageId"),
            question=text(record, "question") + self.suffix,
            answer=text(record, "answer"),
            kind=str(kinds.get("structural") or "") if isinstance(kinds, Mapping) else "",
            scoring="gqa",
        )


class Joined:
    """Questions whose pictures are in another table; see `redteam.datasets.tables.Table`.

    Args:
        table: of questions, with ``imageId``.
        pictures: table and row by id of the picture.
    """

    def __init__(self, table: Table, pictures: Mapping[str, tuple[Table, Record]]) -> None:
        self._table, self._pictures = table, pictures

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the questions, and the picture."""
        return (*self._table.columns, "image")

    def records(self, wanted: Sequence[str]) -> Iterator[Record]:
        """The questions."""
        return self._table.records(wanted)

    def has_picture(self, record: Record, column: str) -> bool:
        """Whether the other table has it."""
        del column
        return name(record, "imageId", "") in self._pictures

    def picture(self, record: Record, column: str) -> Picture:
        """The picture, from the other table."""
        key = name(record, "imageId", "")
        if key not in self._pictures:
            raise PictureError(f"image {key!r} is not among the {len(self._pictures)} pictures")
        table, row = self._pictures[key]
        return table.picture(row, column)
