"""MME: pairs of questions about one picture, one to be answered yes and one no."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

from redteam.datasets.entries import Entry
from redteam.datasets.own import name, text
from redteam.datasets.published import Published, yes_or_no
from redteam.datasets.tables import Record, Table

_ASKED = " Please answer yes or no."


@dataclass(frozen=True, kw_only=True)
class Mme(Published):
    """MME: 2,374 yes/no questions of 14 kinds, two about each picture.

    *MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models*
    (arXiv 2306.13394), in the columns of lmms-lab/MME: ``question_id, question, answer, category,
    image``. Both questions about a picture have its ``question_id``; the right answer and a
    mark of the question are added to make the sample's id. Scoring:
    `redteam.datasets.scoring.mme`. A subset takes both questions about a picture or none, as
    accuracy+ needs them.

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
        plain: take the benchmark's own request " Please answer yes or no." off the question, for
            use with another suffix.
        spelling: how the model spells yes (and no), which attacks on the answer need.
    """

    name: ClassVar[str] = "mme"
    wanted: ClassVar[tuple[str, ...]] = ("question_id", "question", "answer", "category")
    together: ClassVar[bool] = True

    repo: str = "lmms-lab/MME"
    plain: bool = False
    spelling: Literal["Yes", "yes"] = "Yes"

    def entry(self, table: Table, record: Record, position: int) -> Entry:
        """See `Published`."""
        del position
        picture = text(record, "question_id")
        answer = yes_or_no(record, self.spelling)
        question = text(record, "question").strip()
        mark = hashlib.sha256(question.encode()).hexdigest()[:6]
        if self.plain:
            question = question.removesuffix(_ASKED)
        return Entry(
            where=record.where,
            picture=table.picture(record, "image"),
            id=f"{picture}/{answer.lower()}-{mark}",
            image_id=picture,
            question=question + self.suffix,
            answer=answer,
            kind=name(record, "category", ""),
            scoring="mme",
        )
