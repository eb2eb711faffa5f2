"""POPE: is there a …? Objects that are there, and objects one would expect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from redteam.datasets.entries import Entry
from redteam.datasets.own import name, text
from redteam.datasets.published import Published, yes_or_no
from redteam.datasets.tables import Record, Table


@dataclass(frozen=True, kw_only=True)
class Pope(Published):
    """POPE: 9,000 yes/no questions whether an object is in a COCO picture.

    *Evaluating Object Hallucination in Large Vision-Language Models* (arXiv 2305.10355), in the
    columns of lmms-lab/POPE: ``question_id, question, answer, image_source, image, category``.
    Scoring: `redteam.datasets.scoring.pope`. The kind is the category.

    Args:
        path: folder as `hf download` writes it, or a .parquet or .jsonl file of the same columns,
            relative to the scenario; null loads it from the hub.
        repo: id on the hub.
        config: configuration on the hub, and folder in `path`; null for the only one.
        split: name of the split.
        revision: commit, tag or branch on the hub; null is the newest, so pin it for a result that
            lasts.
        samples: use only so many; null is all.
        seed: of the subset, which is stratified by kind; null takes the first.
        filter: keep what every target gets right at full tokens (clean_right), and of these what
            it gets wrong on a black image (sighted); null keeps all.
        suffix: appended to each question.
        category: only questions whose object was drawn so; null is all three.
        spelling: how the model spells yes (and no), which attacks on the answer need.
    """

    name: ClassVar[str] = "pope"
    wanted: ClassVar[tuple[str, ...]] = ("question_id", "question", "answer")
    optional: ClassVar[tuple[str, ...]] = ("image_source", "category")

    repo: str = "lmms-lab/POPE"
    suffix: str = "\nAnswer the question using a single word or phrase."
    category: Literal["random", "popular", "adversarial"] | None = None
    spelling: Literal["Yes", "yes"] = "Yes"

    def entry(self, table: Table, record: Record, position: int) -> Entry | None:
        """See `Published`; the same question number is used once in each category."""
        category = name(record, "category", "")
        if self.category not in (None, category):
            return None
        number = name(record, "question_id", str(position))
        return Entry(
            where=record.where,
            picture=table.picture(record, "image"),
            id=f"{category}/{number}" if category else number,
            image_id=name(record, "image_source", ""),
            question=text(record, "question").strip() + self.suffix,
            answer=yes_or_no(record, self.spelling),
            kind=category,
            scoring="pope",
        )
