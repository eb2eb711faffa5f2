"""Data sets: what counts as right, and which files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from redteam.datasets import images
from redteam.datasets.base import Sample, is_correct
from redteam.datasets.jsonl import Jsonl
from redteam.datasets.scenes import Scenes
from redteam.errors import DatasetError

EMPTY = np.zeros((1, 1, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("Yes", ["yes"], True),
        ("Yes, there is no doubt.", ["yes"], True),
        ("No. Yes would be wrong.", ["yes"], False),
        ("It is red", ["yes"], False),
        ("not known", ["no"], False),
        ("", ["no"], False),
        ("A red circle.", ["red circle"], True),
        ("red circles", ["red circle"], False),
        ("two", ["2", "two"], True),
        ("x 4", ["x 4"], True),
        ("4 x", ["x 4"], False),
        ("", ["red"], False),
        ("?", ["?"], True),
        ("!", ["?"], False),
        ("ＲＥＤ", ["red"], True),
        ("a", ["a"], True),
    ],
)
def test_right_answers(text: str, answers: list[str], right: bool) -> None:
    sample = Sample("s", "i", EMPTY, "?", answers[0], tuple(answers[1:]))
    assert is_correct(text, sample) is right


def test_scenes_are_deterministic_and_have_evidence() -> None:
    first, second = Scenes(samples=5).open(), Scenes(samples=5).open()
    assert first.ids == second.ids
    assert first.identity == second.identity
    assert Scenes(samples=5, start=9).open().identity != first.identity
    assert len({sample.kind for sample in first}) > 1
    assert all(sample.evidence for sample in first)
    assert first[0].image.dtype == np.uint8


def place(folder: Path, *lines: Any) -> Path:
    Image.new("RGB", (6, 4), (255, 0, 0)).save(folder / "a.png")
    Image.new("RGBA", (6, 4), (0, 0, 255, 10)).save(folder / "b.png")
    path = folder / "data.jsonl"
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


GOOD = {"image": "a.png", "question": "?", "answer": "red"}


def test_lines_are_read(tmp_path: Path) -> None:
    box = [0, 0, 2, 2]
    extra = {"id": "x", "kind": "k", "evidence": [box], "answer": ["blue", "navy"]}
    path = place(tmp_path, GOOD, "", {**GOOD, "image": "b.png", **extra})
    data = Jsonl(path=str(path)).open()
    assert data.ids == ("000001", "x")
    assert data[0].image.shape == (4, 6, 3)
    assert data[0].image[0, 0].tolist() == [255, 0, 0]
    assert data[1].accepted == ("navy",)
    assert data[1].evidence == ((0, 0, 2, 2),)
    assert data[1].image.shape == (4, 6, 3)
    assert len(Jsonl(path=str(path), samples=1).open()) == 1
    before = data.identity
    place(tmp_path, {**GOOD, "answer": "blue"})
    assert Jsonl(path=str(path)).open().identity != before


BAD = {
    "json": ("{", "is not JSON"),
    "list": ([1], "is no JSON object"),
    "key": ({**GOOD, "anser": "x"}, "did you mean 'answer'"),
    "missing": ({"image": "a.png", "question": "?"}, "has no 'answer'"),
    "answer": ({**GOOD, "answer": 3}, "'answer' is 3"),
    "no answer": ({**GOOD, "answer": []}, "'answer' is []"),
    "question": ({**GOOD, "question": " "}, "'question' is ' '"),
    "picture": ({**GOOD, "image": "none.png"}, "'none.png' cannot be read: No such file"),
    "no picture": ({**GOOD, "image": "data.jsonl"}, "it is none of PNG"),
    "outside": ({**GOOD, "image": "../a.png"}, "lies outside the folder"),
    "absolute": ({**GOOD, "image": "/etc/passwd"}, "lies outside the folder"),
    "link": ({**GOOD, "image": "link.png"}, "lies outside the folder"),
    "box": ({**GOOD, "evidence": [[3, 0, 1, 1]]}, "x0 < x1"),
    "box type": ({**GOOD, "evidence": [[0, 0, 1.5, 1]]}, "write boxes"),
    "boxes": ({**GOOD, "evidence": "here"}, "'evidence' holds 'here'"),
    "bomb": ({**GOOD, "image": "bomb.png"}, "12 × 12 pixels; at most 100"),
    "double": (GOOD | {"id": "first"}, "id 'first' is used before"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line, message = BAD[case]
    outside = tmp_path / "outside.png"
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (3, 3)).save(outside)
    (folder / "link.png").symlink_to(outside)
    Image.new("RGB", (12, 12)).save(folder / "bomb.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    path = place(folder, GOOD | {"id": "first"}, line)
    with pytest.raises(DatasetError, match=r"data\.jsonl:2: ") as caught:
        Jsonl(path=str(path)).open()
    assert message in str(caught.value)


def test_no_lines_no_file_and_a_broken_picture(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no line"):
        Jsonl(path=str(place(tmp_path, ""))).open()
    with pytest.raises(DatasetError, match="No such file"):
        Jsonl(path=str(tmp_path / "none.jsonl")).open()
    path = place(tmp_path, GOOD, {**GOOD, "evidence": [[0, 0, 60, 4]]})
    data = Jsonl(path=str(path)).open()
    with pytest.raises(DatasetError, match=r":2: evidence .* reaches beyond the 6 × 4"):
        data[1]
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r":1: image 'a.png' cannot be decoded"):
        data[0]


def test_a_line_that_never_ends_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.write(b'{"image": "')
        file.truncate(200 << 20)  # a sparse file: it takes no room, and has no end of line
    with pytest.raises(DatasetError, match=r"data\.jsonl:1: is longer than 1 MiB"):
        Jsonl(path=str(path)).open()


def test_half_characters_are_refused(tmp_path: Path) -> None:
    path = place(tmp_path, GOOD, '{"image": "a.png", "question": "\\ud83d", "answer": "x"}')
    with pytest.raises(DatasetError, match=r"data\.jsonl:2: holds half a character"):
        Jsonl(path=str(path)).open()
    path = place(tmp_path, '{"image": "a.png", "question": "\\ud83d\\ude00", "answer": "x"}')
    assert Jsonl(path=str(path)).open()[0].question == "😀"
