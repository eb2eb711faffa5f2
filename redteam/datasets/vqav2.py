"""VQAv2: open questions about everyday pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Interval

from redteam.datasets.entries import Entry
from redteam.datasets.own import commonest, name, text
from redteam.datasets.published import Published, words
from redteam.datasets.tables import Record, Table


@dataclass(frozen=True, kw_only=True)
class VqaV2(Published):
    """VQAv2: open questions about COCO pictures, answered by ten people each.

    *Making the V in VQA Matter* (arXiv 1612.00837), in the columns of lmms-lab/VQAv2:
    ``question_id, question, answers, multiple_choice_answer, answer_type, image_id, image``, where
    ``answers`` holds structs with ``answer``. Scoring: `redteam.datasets.scoring.vqa`. The kind is
    the answer type; the test splits have no answers.

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
        bar: VQA accuracy above which an answer is right, in [0, 1); 0.5 asks that at least two of
            ten people said it.
    """

    name: ClassVar[str] = "vqav2"
    wanted: ClassVar[tuple[str, ...]] = ("question_id", "question", "answers")
    optional: ClassVar[tuple[str, ...]] = ("multiple_choice_answer", "answer_type", "image_id")

    repo: str = "lmms-lab/VQAv2"
    split: str = "validation"
    suffix: str = "\nAnswer the question using a single word or phrase."
    bar: Annotated[float, Interval(ge=0, lt=1)] = 0.5

    def entry(self, table: Table, record: Record, position: int) -> Entry:
        """See `Published`."""
        said = record.values["answers"]
        listed = said if isinstance(said, list) else []
        plain = [one.get("answer") if isinstance(one, Mapping) else one for one in listed]
        references = words(record, "answers", plain)
        common = commonest([one for one in references if one.strip()])
        return Entry(
            where=record.where,
            picture=table.picture(record, "image"),
            id=name(record, "question_id", str(position)),
            image_id=name(record, "image_id", ""),
            question=text(record, "question") + self.suffix,
            answer=name(record, "multiple_choice_answer", common),
            references=references,
            kind=name(record, "answer_type", ""),
            scoring="vqa",
            bar=self.bar,
        )
