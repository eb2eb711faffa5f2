"""ScienceQA: school questions with options, those that have a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from redteam.datasets.entries import Entry
from redteam.datasets.own import letter, name, text, texts
from redteam.datasets.published import Published
from redteam.datasets.scoring.scienceqa import LETTERS
from redteam.datasets.tables import Record, Table


@dataclass(frozen=True, kw_only=True)
class ScienceQa(Published):
    """ScienceQA: multiple choice from school science, the questions that have a picture.

    *Learn to Explain* (arXiv 2209.09513), in the columns of lmms-lab/ScienceQA and
    derek-thomas/ScienceQA: ``question, choices, answer, hint, subject, image``, where ``answer`` is
    an index from 0. The prompt is ``Context: HINT``, the question, the options with letters, and
    the suffix. Scoring: `redteam.datasets.scoring.scienceqa`. The kind is the subject.

    In a full split, questions without a picture are left out, as in the published subset IMG.

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
    """

    name: ClassVar[str] = "scienceqa"
    wanted: ClassVar[tuple[str, ...]] = ("question", "choices", "answer")
    optional: ClassVar[tuple[str, ...]] = ("hint", "subject")

    repo: str = "lmms-lab/ScienceQA"
    config: str | None = "ScienceQA-IMG"
    suffix: str = "\nAnswer with the option's letter from the given choices directly."

    def entry(self, table: Table, record: Record, position: int) -> Entry | None:
        """See `Published`; rows have no id of their own."""
        if not table.has_picture(record, "image"):
            return None
        options = texts(record, "choices")
        right = letter(record, "answer", options)
        hint = name(record, "hint", "").strip()
        lines = [f"Context: {hint}"] if hint else []
        lines.append(text(record, "question"))
        lines += [f"{mark}. {one}" for mark, one in zip(LETTERS, options, strict=False)]
        return Entry(
            where=record.where,
            picture=table.picture(record, "image"),
            id=str(position),
            image_id="",
            question="\n".join(lines) + self.suffix,
            answer=right,
            kind=name(record, "subject", ""),
            options=options,
            scoring="scienceqa",
        )
