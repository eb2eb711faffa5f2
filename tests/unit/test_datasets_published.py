"""Public benchmarks: rows of the public layouts become the right questions, from files and hub."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from redteam.datasets.gqa import Gqa
from redteam.datasets.mme import Mme
from redteam.datasets.pope import Pope
from redteam.datasets.published import Published
from redteam.datasets.scienceqa import ScienceQa
from redteam.datasets.scoring import credit, scored, summarise
from redteam.datasets.textvqa import TextVqa
from redteam.datasets.vqav2 import VqaV2
from redteam.errors import DatasetError

SHORT = "\nAnswer the question using a single word or phrase."


def picture(shade: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3), (shade, 0, 0)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": f"{shade}.png"}


def pope(number: int, answer: str, category: str) -> dict[str, Any]:
    return {
        "id": f"{number}",
        "question_id": f"{number}",
        "question": f"Is there a thing {number} in the image?",
        "answer": answer,
        "image_source": f"COCO_{number // 2}",
        "image": picture(number),
        "category": category,
    }


POPE = [
    pope(number, "yes" if number % 2 else "no", category)
    for category in ("adversarial", "popular", "random")
    for number in range(1, 5)
]


def people(*said: str) -> list[dict[str, Any]]:
    return [
        {"answer": one, "answer_confidence": "yes", "answer_id": i} for i, one in enumerate(said)
    ]


TEN = ["net"] * 6 + ["the net"] * 3 + ["racket"]
VQA = {
    "question_type": "what",
    "multiple_choice_answer": "net",
    "answers": people(*TEN),
    "image_id": 42,
    "answer_type": "other",
    "question_id": 42000,
    "question": "What is this?",
    "image": picture(1),
}
TEXT = {
    "image_id": "003a",
    "question_id": 34602,
    "question": "what is the brand of this camera?",
    "image": picture(2),
    "answers": ["nikon", "dakota", "dakota", *["dakota digital"] * 7],
    "ocr_tokens": ["DAKOTA", "DIGITAL"],
}
SCIENCE = [
    {
        "image": picture(3),
        "question": "Which is a star?",
        "choices": ["Mars", "the sun", "the moon"],
        "answer": 1,
        "hint": "Look up.",
        "subject": "natural science",
    },
    {
        "image": None,
        "question": "Which word?",
        "choices": ["a", "b"],
        "answer": 0,
        "hint": "",
        "subject": "language science",
    },
    {
        "image": picture(4),
        "question": "Which is cold?",
        "choices": ["ice", "fire"],
        "answer": 0,
        "hint": "",
        "subject": "natural science",
    },
]
GQA = {
    "id": "201307251",
    "imageId": "n161313",
    "question": "Is it overcast?",
    "answer": "no",
    "types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"},
}


def mme(image: str, category: str) -> list[dict[str, Any]]:
    return [
        {
            "question_id": f"{category}/{image}.png",
            "image": picture(int(image)),
            "question": f"Is it {word}? Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for word, answer in (("so", "Yes"), ("not so", "No"))
    ]


MME = [
    row
    for category, count in (("count", 6), ("OCR", 2))
    for i in range(count)
    for row in mme(str(i), category)
]


def place(folder: Path, where: str, *shards: list[dict[str, Any]]) -> str:
    """Shards as `hf download` leaves them."""
    for number, rows in enumerate(shards):
        path = folder / f"{where}-{number:05d}-of-{len(shards):05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(folder)


def test_pope(tmp_path: Path) -> None:
    path = place(tmp_path, "data/test", POPE[:7], POPE[7:])
    data = Pope(path=path).open()
    assert len(data) == 12
    assert data.ids[:2] == ("adversarial/1", "adversarial/2")
    first, second = data[0], data[1]
    assert first.question == f"Is there a thing 1 in the image?{SHORT}"
    assert (first.answer, second.answer, first.kind) == ("Yes", "No", "adversarial")
    assert (first.image_id, second.image_id) == ("COCO_0", "COCO_1")
    assert first.image[0, 0].tolist() == [1, 0, 0]
    assert first.scoring == "pope"
    assert credit("Yes, a thing.", first) == 1
    plain = Pope(path=path, category="random", suffix="", spelling="yes").open()
    assert plain.ids == tuple(f"random/{i}" for i in range(1, 5))
    assert (plain[0].question, plain[0].answer) == ("Is there a thing 1 in the image?", "yes")


def test_pope_subsets_are_stratified_and_do_not_depend_on_the_order(tmp_path: Path) -> None:
    path = place(tmp_path / "a", "data/test", POPE)
    other = place(tmp_path / "b", "data/test", POPE[::-1])
    data = Pope(path=path, samples=6).open()
    assert [sum(name.startswith(kind) for name in data.ids) for kind in ("a", "p", "r")] == [
        2,
        2,
        2,
    ]
    assert sorted(Pope(path=other, samples=6).open().ids) == sorted(data.ids)
    assert Pope(path=path, samples=6).open().identity == data.identity
    assert Pope(path=path, samples=6, seed=1).open().ids != data.ids
    assert Pope(path=path, samples=3, seed=None).open().ids == tuple(
        f"adversarial/{i}" for i in (1, 2, 3)
    )


def test_vqav2(tmp_path: Path) -> None:
    one = VqaV2(path=place(tmp_path, "data/validation", [VQA])).open()[0]
    assert (one.id, one.image_id, one.kind, one.answer) == ("42000", "42", "other", "net")
    assert one.question == f"What is this?{SHORT}"
    assert one.references == tuple(TEN)
    assert credit("Net.", one) == 1
    assert credit("racket", one) == pytest.approx(0.3)
    with pytest.raises(DatasetError, match=r"holds no test\.parquet.*validation-00000-of-00001"):
        VqaV2(path=str(tmp_path), split="test").open()
    place(tmp_path / "t", "data/test", [{**VQA, "answers": None, "multiple_choice_answer": None}])
    with pytest.raises(DatasetError, match=r"row 0: 'answers' is empty; the answers of test"):
        VqaV2(path=str(tmp_path / "t"), split="test").open()


def test_textvqa(tmp_path: Path) -> None:
    path = place(tmp_path, "data/validation", [TEXT])
    one = TextVqa(path=path, bar=0.2).open()[0]
    assert one.question == f"what is the brand of this camera?{SHORT}"
    assert (one.id, one.image_id, one.answer) == ("34602", "003a", "dakota digital")
    assert credit("Dakota", one) == pytest.approx(0.6)
    assert one.bar == 0.2
    read = TextVqa(path=path, ocr=True).open()[0].question
    assert read == f"what is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL{SHORT}"


def test_mme(tmp_path: Path) -> None:
    path = place(tmp_path, "data/test", MME[:3], MME[3:])
    data = Mme(path=path).open()
    assert len(set(data.ids)) == 16
    first, second = data[0], data[1]
    assert first.image_id == second.image_id == "count/0.png"
    assert (first.answer, second.answer, first.kind) == ("Yes", "No", "count")
    assert first.question == "Is it so? Please answer yes or no."
    assert Mme(path=path, plain=True, suffix=SHORT).open()[0].question == f"Is it so?{SHORT}"
    found = summarise([scored("yes", sample) for sample in data])
    assert (found["accuracy"], found["accuracy_plus"], found["perception"]) == (0.5, 0, 100.0)


def test_mme_subsets_keep_pairs(tmp_path: Path) -> None:
    path = place(tmp_path, "data/test", MME)
    data = Mme(path=path, samples=9).open()
    images = [sample.image_id for sample in data]
    assert len(data) == 8, "whole pairs only"
    assert all(images.count(image) == 2 for image in images)
    assert sum(image.startswith("count") for image in images) == 6, "six of eight pairs are count"
    with pytest.raises(DatasetError, match="samples is 1, less than"):
        Mme(path=path, samples=1).open()


@pytest.mark.parametrize("config", ["ScienceQA-IMG", "ScienceQA-FULL"])
def test_scienceqa(config: str, tmp_path: Path) -> None:
    rows = [row for row in SCIENCE if row["image"]] if config.endswith("IMG") else SCIENCE
    data = ScienceQa(path=place(tmp_path, f"{config}/test", rows), config=config).open()
    assert len(data) == 2, "the question without a picture is left out"
    first, second = data
    assert first.question == (
        "Context: Look up.\nWhich is a star?\nA. Mars\nB. the sun\nC. the moon\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (first.answer, first.kind, first.options[1]) == ("B", "natural science", "the sun")
    assert not second.question.startswith("Context")
    assert credit("B. the sun", first) == 1
    assert credit("C", second) == 0


def test_gqa_joins_pictures(tmp_path: Path) -> None:
    other = {**GQA, "id": "2", "imageId": "n2", "types": None}
    place(tmp_path, "testdev_balanced_instructions/testdev", [GQA, other, {**other, "id": "3"}])
    pictures = [{"id": "n2", "image": picture(2)}, {"id": "n161313", "image": picture(1)}]
    path = place(tmp_path, "testdev_balanced_images/testdev", pictures)
    data = Gqa(path=path).open()
    assert [sample.image[0, 0, 0] for sample in data] == [1, 2, 2]
    assert (data.ids, data[0].kind, data[1].kind) == (("201307251", "2", "3"), "verify", "")
    assert data[0].image_id == "n161313"
    assert credit("No.", data[0]) == 1
    place(tmp_path, "testdev_balanced_images/testdev", pictures[:1])
    with pytest.raises(DatasetError, match=r"row 0: image 'n161313' is not among the 1 pictures"):
        Gqa(path=path).open()


def test_a_layout_may_be_one_file_or_json_lines(tmp_path: Path) -> None:
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    rows = [{**row, "image": "a.png"} for row in POPE]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in (tmp_path, tmp_path / "test.jsonl"):
        assert len(Pope(path=str(path)).open()) == 12
    gqa = tmp_path / "gqa.parquet"
    pq.write_table(pa.Table.from_pylist([{**GQA, "image": picture(7)}]), gqa)
    assert Gqa(path=str(gqa)).open()[0].image[0, 0, 0] == 7


BAD: dict[str, tuple[Callable[..., Published], list[dict[str, Any]], str]] = {
    "column": (Pope, [{"question_id": "1", "question": "?"}], "no column 'answer'; it has"),
    "image": (Pope, [{**POPE[0], "image": "x"}], "row 0: image 'x' cannot be read"),
    "no image": (Pope, [{"question_id": "1", "question": "?", "answer": "no"}], "column 'image'"),
    "neither": (Pope, [{**POPE[0], "answer": "maybe"}], "row 0: 'answer' is 'maybe'"),
    "question": (Pope, [{**POPE[0], "question": None}], "row 0: 'question' is None"),
    "twice": (Pope, [POPE[0], POPE[0]], "row 1: id 'adversarial/1' is used before, at .* row 0"),
    "picture": (Pope, [{**POPE[0], "image": {"bytes": b"x", "path": "x"}}], "row 0: image cannot"),
    "none": (Pope, [{**POPE[0], "category": "other"}], "holds no question of these options"),
    "people": (TextVqa, [{**TEXT, "answers": [1, 2]}], "row 0: 'answers' holds 1"),
    "silent": (TextVqa, [{**TEXT, "answers": ["", " "]}], "row 0: 'answers' is empty"),
    "option": (ScienceQa, [{**SCIENCE[0], "answer": 3}], "row 0: 'answer' is 3"),
    "options": (ScienceQa, [{**SCIENCE[0], "choices": []}], "row 0: 'choices' is"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(case: str, tmp_path: Path) -> None:
    make, rows, message = BAD[case]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    options = {"category": "random"} if case == "none" else {}
    with pytest.raises(DatasetError, match=message):
        make(path=str(tmp_path / "x.parquet"), **options).open()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_the_hub_gives_what_a_folder_gives(tmp_path: Path) -> None:
    """`datasets` reads a folder in the layout of the hub as it reads the hub."""
    import datasets

    features = datasets.Features(
        {
            **{key: datasets.Value("string") for key in POPE[0] if key != "image"},
            "image": datasets.Image(),
        }
    )
    whole = datasets.Dataset.from_list(POPE, features=features)
    (tmp_path / "repo" / "data").mkdir(parents=True)
    whole.to_parquet(tmp_path / "repo" / "data" / "test-00000-of-00001.parquet")
    hub = Pope(repo=str(tmp_path / "repo")).open()
    local = Pope(path=str(tmp_path / "repo")).open()
    assert hub.ids == local.ids
    assert hub.identity == local.identity
    assert all(np.array_equal(a.image, b.image) for a, b in zip(hub, local, strict=True))


@pytest.mark.usefixtures("offline")
def test_no_connection_says_how_to_go_on() -> None:
    message = r"lmms-lab/POPE, split test cannot be loaded.*hf download lmms-lab/POPE.*set path"
    with pytest.raises(DatasetError, match=message):
        Pope().open()


def test_datasets_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DatasetError, match=r'datasets, which is not.*pip install "redteam\[data\]"'
    ):
        Pope().open()
