"""TextVQA: questions whose answer has to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Interval

from redteam.datasets.entries import Entry
from redteam.datasets.own import commonest, name, text
from redteam.datasets.published import Published, words
from redteam.datasets.tables import Record, Table


@dataclass(frozen=True, kw_only=True)
class TextVqa(Published):
    """TextVQA: questions about text in pictures, answered by ten people each.

    *Towards VQA Models That Can Read* (arXiv 1904.08920), in the columns of lmms-lab/textvqa:
    ``question_id, question, answers, image_id, image, ocr_tokens``. Scoring:
    `redteam.datasets.scoring.textvqa`. The answer is what most people said; the test split has
    none.

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
        ocr: add the tokens an OCR system found to the question, as LLaVA-1.5 was tested.
        bar: VQA accuracy above which an answer is right, in [0, 1); 0.5 asks that at least two of
            ten people said it.
    """

    name: ClassVar[str] = "textvqa"
    wanted: ClassVar[tuple[str, ...]] = ("question_id", "question", "answers")
    optional: ClassVar[tuple[str, ...]] = ("image_id", "ocr_tokens")

    repo: str = "lmms-lab/textvqa"
    split: str = "validation"
    suffix: str = "\nAnswer the question using a single word or phrase."
    ocr: bool = False
    bar: Annotated[float, Interval(ge=0, lt=1)] = 0.5

    def entry(self, table: Table, record: Record, position: int) -> Entry:
        """See `Published`."""
        said = record.values["answers"]
        references = words(record, "answers", said if isinstance(said, list) else [])
        return Entry(
            where=record.where,
            picture=table.picture(record, "image"),
            id=name(record, "question_id", str(position)),
            image_id=name(record, "image_id", ""),
            question=text(record, "question") + self._read(record) + self.suffix,
            answer=commonest([one for one in references if one.strip()]),
            references=references,
            scoring="textvqa",
            bar=self.bar,
        )

    def _read(self, record: Record) -> str:
        if not self.ocr:
            return ""
        tokens = record.values.get("ocr_tokens")
        if not isinstance(tokens, list) or not all(isinstance(one, str) for one in tokens):
            raise record.wrong(f"'ocr_tokens' is {tokens!r}; ocr: true needs a list of texts")
        return f"\nReference OCR token: {', '.join(tokens)}"
