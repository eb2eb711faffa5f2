"""Your own data in CSV and Parquet: what is read, and which files are refused."""

from __future__ import annotations

import io
import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from redteam.datasets import images
from redteam.datasets.csv import Csv
from redteam.datasets.entries import Entries
from redteam.datasets.jsonl import Jsonl
from redteam.datasets.parquet import Parquet
from redteam.errors import DatasetError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def png(colour: tuple[int, int, int] = RED, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "data"
    found.mkdir()
    (found / "a.png").write_bytes(png(RED))
    (found / "b.png").write_bytes(png(BLUE))
    return found


def write_csv(folder: Path, text: str | bytes) -> str:
    path = folder / "data.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def write_parquet(folder: Path, rows: list[dict[str, Any]], **kinds: pa.DataType) -> str:
    path = folder / "data.parquet"
    table = pa.Table.from_pylist(rows)
    for column, kind in kinds.items():
        values = pa.array([row.get(column) for row in rows], type=kind)
        table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, path, row_group_size=2)
    return str(path)


def colours(data: Entries) -> list[tuple[int, ...]]:
    return [tuple(sample.image[0, 0].tolist()) for sample in data]


def test_csv_is_read(folder: Path) -> None:
    text = (
        "\ufeffimage,question,answer,kind,evidence,extra\r\n"
        'a.png,"What, then?",red|scarlet,colour,"[[0, 0, 2, 2]]",x\r\n'
        "\r\n"
        'b.png,"two\nlines",blue,,,\r\n'
        "b.png,?,navy,,,\r\n"
    )
    data = Csv(path=write_csv(folder, text), suffix=" Shortly.").open()
    assert data.ids == ("000002", "000004", "000006"), "line numbers, also after a cell of two"
    first, second, third = data
    assert (first.question, first.answer, first.accepted) == (
        "What, then? Shortly.",
        "red",
        ("scarlet",),
    )
    assert (first.kind, first.evidence) == ("colour", ((0, 0, 2, 2),))
    assert colours(data) == [RED, BLUE, BLUE]
    assert second.image_id == third.image_id != first.image_id


def test_csv_columns_and_separators_can_be_named(folder: Path) -> None:
    path = write_csv(folder, "file;q;a;o\na.png;which ?;x|y;p/x|y\n")
    named = {"image_column": "file", "question_column": "q", "answer_column": "a"}
    plain = Csv(path=path, delimiter=";", separator="", **named).open()
    assert (plain[0].answer, plain[0].scoring) == ("x|y", "exact")
    choice = Csv(path=path, delimiter=";", separator="/", options_column="o", **named).open()
    assert choice[0].options == ("p", "x|y")
    assert (choice[0].answer, choice[0].scoring) == ("B", "choice")
    assert choice[0].question == "which ?\nA. p\nB. x|y"
    with pytest.raises(DatasetError, match=r"no column 'qq'; it has: file, q, a, o"):
        Csv(path=path, delimiter=";", **{**named, "question_column": "qq"}).open()
    with pytest.raises(DatasetError, match="no column 'kinds'"):
        Csv(path=path, delimiter=";", kind_column="kinds", **named).open()
    with pytest.raises(DatasetError, match="delimiter is ';;'"):
        Csv(path=path, delimiter=";;")


BAD_CSV: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", r"data\.csv is empty"),
    "header only": ("image,question,answer\n", "holds no row"),
    "header": ("image,answer\na.png,red\n", "no column 'question'"),
    "twice": ("image,image,question,answer\n", r":1: column 'image' is there twice"),
    "utf-8": (b"image,question,answer\na.png,?,red\na.png,caf\xe9,red\n", r":3: is not UTF-8"),
    "nul": (b"image,question,answer\na\0.png,?,red\n", r":2: holds a NUL byte"),
    "cells": ("image,question,answer\na.png,a, b,red\n", r":2: has 4 cells; the header names 3"),
    "blank": ("image,question,answer\n,,\n", r":2: 'question' is ''"),
    "quotes": ('image,question,answer\na.png,"?"x,red\n', r":2: is not CSV"),
    "open quote": ('image,question,answer\na.png,"?,red\n', r":2: is not CSV"),
    "huge cell": ("image,question,answer\na.png," + "x" * 200_000 + ",red\n", r":2: is not CSV"),
    "answer": ("image,question,answer\na.png,?,\n", r":2: 'answer' is ''"),
    "half an answer": ("image,question,answer\na.png,?,red|\n", r":2: 'answer' is \['red', ''\]"),
    "no picture": ("image,question,answer\n,?,red\n", r":2: image is empty"),
    "outside": ("image,question,answer\n../o.png,?,red\n", r":2: image .* lies outside"),
    "id": ("id,image,question,answer\n1,a.png,?,x\n1,a.png,?,y\n", r":3: id '1' is used before"),
    "evidence": ("image,question,answer,evidence\na.png,?,x,[\n", r":2: 'evidence' is not JSON"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv_is_named(case: str, folder: Path) -> None:
    text, message = BAD_CSV[case]
    (folder.parent / "o.png").write_bytes(png())
    with pytest.raises(DatasetError, match=message):
        Csv(path=write_csv(folder, text)).open()


ROW = {"image": {"bytes": png(RED), "path": None}, "question": "?", "answer": "red"}


@pytest.mark.parametrize(
    "cell",
    [
        {"bytes": png(BLUE), "path": "gone.png"},
        {"bytes": None, "path": "b.png"},
        png(BLUE),
        "b.png",
    ],
    ids=["struct with bytes", "struct with path", "bytes", "path"],
)
def test_parquet_pictures_in_every_form(cell: object, folder: Path) -> None:
    path = write_parquet(folder, [{**ROW, "image": cell}] * 3)
    data = Parquet(path=path).open()
    assert colours(data) == [BLUE] * 3
    assert len({sample.image_id for sample in data}) == 1, "equal pictures share an id"
    assert data.ids == ("000000", "000001", "000002")


def test_parquet_columns(folder: Path) -> None:
    row = {**ROW, "id": 7, "image_id": 9, "kind": "k", "answer": ["red", "scarlet"], "extra": 1.5}
    data = Parquet(path=write_parquet(folder, [row])).open()
    assert (data.ids, data[0].image_id, data[0].kind) == (("7",), "9", "k")
    assert (data[0].answer, data[0].accepted) == ("red", ("scarlet",))
    choice = {**ROW, "options": ["blue", "red"], "answer": 1}
    data = Parquet(path=write_parquet(folder, [choice, {**choice, "answer": 0}])).open()
    assert [sample.answer for sample in data] == ["B", "A"]
    ten = {**ROW, "answer": ["red"] * 2 + ["blue"] * 8}
    data = Parquet(path=write_parquet(folder, [ten]), scoring="vqa", bar=0.7).open()
    assert (data[0].answer, data[0].scoring, data[0].bar) == ("blue", "vqa", 0.7)
    assert data[0].references == tuple(ten["answer"])


def test_a_folder_is_all_its_files(folder: Path) -> None:
    for number in (1, 0):
        inner = folder / "deep"
        inner.mkdir(exist_ok=True)
        rows = [{**ROW, "question": f"{number}", "image": "../a.png"}]
        pq.write_table(pa.Table.from_pylist(rows), inner / f"part-{number}.parquet")
    data = Parquet(path=str(folder)).open()
    assert data.ids == ("0-000000", "1-000000")
    assert [sample.question for sample in data] == ["0", "1"]
    with pytest.raises(DatasetError, match=r"holds no \.csv file"):
        Csv(path=str(folder)).open()


def nan(column: str) -> dict[str, Any]:
    return {**ROW, column: float("nan")}


BAD_PARQUET: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nan question": (nan("question"), {"question": pa.float64()}, "row 0: 'question' is nan"),
    "nan answer": (nan("answer"), {"answer": pa.float64()}, "row 0: 'answer' is nan"),
    "no answer": ({**ROW, "answer": None}, {}, "row 1: 'answer' is None"),
    "no answers": ({**ROW, "answer": []}, {"answer": pa.list_(pa.string())}, "'answer' is"),
    "number": ({**ROW, "answer": 3}, {"answer": pa.int64()}, "'answer' is 3"),
    "no picture": ({**ROW, "image": {"bytes": None, "path": None}}, {}, "row 1: image is empty"),
    "no image": ({**ROW, "image": {"bytes": b"GIF89a", "path": None}}, {}, "row 1: image cannot"),
    "half": ({**ROW, "image": {"bytes": png()[:20], "path": None}}, {}, "row 1: image cannot be"),
    "outside": ({**ROW, "image": {"bytes": None, "path": "/etc/hosts"}}, {}, "row 1: .* outside"),
    "id": ({**ROW, "id": True}, {"id": pa.bool_()}, "'id' is True"),
    "twice": ({**ROW, "id": "x"}, {}, "row 2: id 'x' is used before"),
}


@pytest.mark.parametrize("case", BAD_PARQUET)
def test_bad_parquet_rows_are_named(case: str, folder: Path) -> None:
    row, kinds, message = BAD_PARQUET[case]
    first = {**ROW, "id": "y"} if "id" in row else ROW
    rows = [row] if kinds else [first, row, row]
    with pytest.raises(DatasetError, match=message):
        Parquet(path=write_parquet(folder, rows, **kinds)).open()


def test_bad_parquet_files_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write_parquet(folder, [ROW] * 6))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(DatasetError, match=r"data\.parquet cannot be read as Parquet"):
        Parquet(path=str(path)).open()
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"data\.parquet cannot be read as Parquet"):
        Parquet(path=str(path)).open()
    with pytest.raises(DatasetError, match=r"cannot be read as Parquet"):
        Parquet(path=str(folder / "none.parquet")).open()
    write_parquet(folder, [{**ROW, "image": 3}])
    with pytest.raises(DatasetError, match="column 'image' is of type int64; a picture is bytes"):
        Parquet(path=str(path)).open()
    pq.write_table(pa.Table.from_pylist([ROW]).slice(0, 0), path)
    with pytest.raises(DatasetError, match="holds no row"):
        Parquet(path=str(path)).open()
    path.write_bytes(whole)
    monkeypatch.setattr("redteam.datasets.parquet.MAX_TEXT", 10)
    with pytest.raises(DatasetError, match="decompressed; at most"):
        Parquet(path=str(path)).open()


def test_damaged_pages_are_named(folder: Path) -> None:
    path = Path(write_parquet(folder, [{**ROW, "question": "x" * 50}] * 4))
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(2).data_page_offset
    assert pq.ParquetFile(path).metadata.row_group(1).column(2).path_in_schema == "question"
    data[start : start + 12] = b"\xff" * 12
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"rows 2 to 3 are damaged"):
        Parquet(path=str(path)).open()


def test_pyarrow_missing_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(folder, [ROW])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r'pip install "redteam\[data\]"'):
        Parquet(path=path).open()


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes whose header claims `side` squared pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        total = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + total

    size = side.to_bytes(4, "big") * 2
    head = chunk(b"IHDR", size + bytes([8, 2, 0, 0, 0]))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 60_000])
@pytest.mark.parametrize("form", ["file", "cell"])
def test_bombs_are_refused_before_decoding(
    side: int, form: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(Image.Image, "convert", never)
    monkeypatch.setattr(images, "decode", never)
    if form == "file":
        (folder / "bomb.png").write_bytes(bomb(side))
        path = write_csv(folder, "image,question,answer\na.png,?,x\nbomb.png,?,red\n")
        with pytest.raises(DatasetError, match=r"data\.csv:3: image (has|is refused)"):
            Csv(path=path).open()
    else:
        path = write_parquet(folder, [ROW, {**ROW, "image": {"bytes": bomb(side), "path": ""}}])
        with pytest.raises(DatasetError, match=r"row 1: image (has|is refused)"):
            Parquet(path=path).open()


def test_large_files_and_odd_files_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(DatasetError, match=r":2: image 'pipe.png' .* not a plain file"):
        Csv(path=write_csv(folder, "image,question,answer\npipe.png,?,red\n")).open()
    with pytest.raises(DatasetError, match=r":2: image '\.' .* not a plain file"):
        Csv(path=write_csv(folder, "image,question,answer\n.,?,red\n")).open()
    (folder / "loop.png").symlink_to(folder / "loop.png")
    with pytest.raises(DatasetError, match=r":2: image 'loop.png'"):
        Csv(path=write_csv(folder, "image,question,answer\nloop.png,?,red\n")).open()
    monkeypatch.setattr(images, "MAX_FILE", 10)
    with pytest.raises(DatasetError, match=r":2: image 'a.png' is larger than"):
        Csv(path=write_csv(folder, "image,question,answer\na.png,?,red\n")).open()
    with pytest.raises(DatasetError, match=r"row 0: image is larger than"):
        Parquet(path=write_parquet(folder, [ROW])).open()
    monkeypatch.setattr("redteam.datasets.csv.MAX_FILE", 10)
    with pytest.raises(DatasetError, match="is larger than 0 MiB; split it"):
        Csv(path=write_csv(folder, "image,question,answer\na.png,?,red\n")).open()


def test_outside_may_be_allowed(folder: Path) -> None:
    (folder.parent / "o.png").write_bytes(png(BLUE))
    (folder / "link.png").symlink_to(folder.parent / "o.png")
    path = write_csv(folder, "image,question,answer\n../o.png,?,x\nlink.png,?,x\n")
    with pytest.raises(DatasetError, match="lies outside"):
        Csv(path=path).open()
    assert colours(Csv(path=path, outside=True).open()) == [BLUE, BLUE]


def test_a_truncated_picture_is_this_rows_trouble(folder: Path) -> None:
    noisy = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(noisy, format="PNG")
    half = noisy.getvalue()[:1500]
    rows = [{**ROW, "image": png()}, {**ROW, "image": half}]
    data = Parquet(path=write_parquet(folder, rows)).open()
    assert data[0].image.shape == (4, 6, 3)
    with pytest.raises(DatasetError, match=r"row 1: image cannot be decoded"):
        data[1]


def test_identity_covers_texts_and_pixels_of_what_is_used(folder: Path) -> None:
    header = "image,question,answer\n"
    path = write_csv(folder, header + "a.png,?,red\nb.png,?,blue\n")
    first = Csv(path=path).open().identity
    assert Csv(path=path).open().identity == first
    size = (folder / "b.png").stat().st_size
    changed = png((0, 0, 254))
    assert len(changed) == size, "only the content changes, not the size"
    (folder / "b.png").write_bytes(changed)
    second = Csv(path=path).open().identity
    assert second != first
    assert Csv(path=path, samples=1).open().identity != second
    one = Csv(path=path, samples=1).open().identity
    (folder / "b.png").write_bytes(png(RED))
    assert Csv(path=path, samples=1).open().identity == one, "b.png is not used"
    write_csv(folder, header + "a.png,?,Red\n")
    assert Csv(path=path).open().identity != one
    assert Csv(path=path, suffix="!").open().identity != Csv(path=path).open().identity


def test_identity_does_not_depend_on_where_pictures_are_kept(folder: Path) -> None:
    row = {**ROW, "id": "x", "image_id": "i"}
    inside = Parquet(path=write_parquet(folder, [row])).open().identity
    beside = Parquet(path=write_parquet(folder, [{**row, "image": "a.png"}])).open().identity
    line = {**row, "image": "a.png"}
    (folder / "data.jsonl").write_text(json.dumps(line))
    assert inside == beside == Jsonl(path=str(folder / "data.jsonl")).open().identity


def test_jsonl_refuses_what_is_no_json_and_no_utf8(folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_text('{"image": "a.png", "question": "?", "answer": NaN}\n')
    with pytest.raises(DatasetError, match=r":1: is not JSON: NaN is no JSON value"):
        Jsonl(path=str(path)).open()
    path.write_bytes(b'{"image": "a.png", "question": "caf\xe9", "answer": "x"}\n')
    with pytest.raises(DatasetError, match=r":1: is not UTF-8"):
        Jsonl(path=str(path)).open()
    path.write_text(json.dumps({"image": "a\0.png", "question": "?", "answer": "x"}))
    with pytest.raises(DatasetError, match=r":1: image .* is no path"):
        Jsonl(path=str(path)).open()
    path.write_text(json.dumps({"image": "a.png", "question": "?", "answer": ["x"] * 3}))
    with pytest.raises(DatasetError, match=r"holds 3 answers; scoring vqa"):
        Jsonl(path=str(path), scoring="vqa").open()
    with pytest.raises(DatasetError, match=r"has no 'options'; scoring choice"):
        Jsonl(path=str(path), scoring="choice").open()
    with pytest.raises(DatasetError, match=r"'answer' is 'x'; scoring pope needs yes or no"):
        Jsonl(path=str(path), scoring="pope").open()
    path.write_text(
        json.dumps({"image": "a.png", "question": "?", "answer": "x", "options": ["y"]})
    )
    with pytest.raises(DatasetError, match="write the text of one option, its letter"):
        Jsonl(path=str(path)).open()


def test_an_upright_picture(folder: Path) -> None:
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    data = Csv(path=write_csv(folder, "image,question,answer\nturned.jpg,?,x\n")).open()
    assert data[0].image.shape == (6, 4, 3)
