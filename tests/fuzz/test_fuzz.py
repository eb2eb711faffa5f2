"""Whatever a file holds, its reader ends with a sample, a scenario, a trial, or its own error.

Files that once broke a reader, or are nasty in a way worth keeping, lie in ``corpus/<reader>/``.
Hypothesis adds random ones; the same in every run, so that a failure can be seen again, unless
``REDTEAM_FUZZ=5000`` asks for so many that are new.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from readers import READERS, read
from report_data import manifest, trial

from redteam.errors import RedteamError
from redteam.scenario import load_scenario

CORPUS = Path(__file__).parent / "corpus"
MANY = int(os.environ.get("REDTEAM_FUZZ", "0"))
HARD = settings(
    max_examples=MANY or 60,
    deadline=None,
    derandomize=not MANY,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
GOOD: dict[str, Any] = {
    "name": "good",
    "seed": 3,
    "targets": [{"type": "scenes"}],
    "dataset": {"type": "scenes", "samples": 10},
    "compressions": [
        {"type": "fastv", "layer": 2, "retention": 0.25},
        {"type": "pipeline", "stages": [{"type": "visionzip", "keep_tokens": 16}]},
    ],
    "attacks": [
        {"type": "noise", "epsilons": ["8/255"]},
        {"type": "pgd", "steps": 3, "alpha": "2/255", "name": "strong"},
    ],
    "defenses": [{"type": "none"}, {"stack": [{"type": "vcd"}]}],
    "epsilons": ["8/255", 0.1],
    "gates": [
        {"metric": "csfr", "max": 0.1, "where": {"attack": "noise", "epsilon": "8/255"}},
        {"metric": "csfr", "max_increase": 0.1, "baseline": "../old", "family": "f"},
    ],
    "engine": {"type": "local", "batch_size": 4, "device": "cpu"},
    "checks": {"repeat": 2},
    "answers": {"max_new_tokens": 4},
}


def corpus() -> list[Path]:
    return sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", corpus(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_corpus(path: Path, tmp_path: Path) -> None:
    error = read(path.parent.name, path.read_bytes(), tmp_path)
    assert (error is None) == path.name.startswith("fine"), error


def test_the_corpus_covers_every_reader() -> None:
    assert {path.parent.name for path in corpus()} == set(READERS)


def pictures() -> dict[str, bytes]:
    found = {}
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(buffer, kind)
        found[kind] = buffer.getvalue()
    return found


def table() -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"image": {"bytes": pictures()["PNG"], "path": ""}, "question": f"{n} ?", "answer": "x"}
        for n in range(3)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=2)
    return buffer.getvalue()


def line(payload: bytes) -> bytes:
    """A ledger line with the right checksum, whatever it holds."""
    digest = hashlib.sha256(payload).hexdigest()[:16].encode()
    return b'{"sha256": "' + digest + b'", "trial": ' + payload + b"}\n"


def seeds(kind: str) -> list[bytes]:
    """Good files to be broken."""
    row = {
        "image": "a.png",
        "question": "?",
        "answer": ["red", "crimson"],
        "evidence": [[0, 0, 2, 2]],
    }
    if kind == "scenario":
        return [json.dumps(GOOD, indent=1).encode()]
    if kind == "ledger":
        trials = [trial("s0"), trial("s1", "error")]
        return [b"".join(line(one.model_dump_json().encode()) for one in trials)]
    if kind == "manifest":
        return [manifest().model_dump_json().encode()]
    if kind == "jsonl":
        return [(json.dumps(row) + "\n").encode() * 2]
    if kind == "csv":
        return [b'image,question,answer,options,evidence\na.png,"a, b?",x,x|y,"[[0,0,1,1]]"\n']
    return list(pictures().values()) if kind == "picture" else [table()]


NASTY = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3\x28", b"\xed\xa0\x80", b"\\ud800", b"\r", b"\n",
    b"\x1b[2J", b"'", b'"', b"{", b"}", b"[", b"]", b":", b",", b"-", b"&a", b"*a", b"!!python/x",
    b"<<", b"---\n", b"%YAML", b"nan", b"1e999", b"-1", b"9" * 400, b"\xe2\x80\xae", b"../", b"/",
    b"|\n", b">\n", b"? ", b"\t", b"~", b"null", b"true", b"0x10", b"1/0", b"8/255", b"[" * 50,
]  # fmt: skip


@st.composite
def broken(draw: st.DrawFn, kind: str) -> bytes:
    """A good file with a few pieces cut out, doubled, or put in."""
    data = draw(st.sampled_from(seeds(kind)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 30)))
        put = draw(
            st.one_of(st.sampled_from(NASTY), st.binary(max_size=8), st.just(data[start:end]))
        )
        data = data[:start] + put + data[draw(st.sampled_from([start, end])) :]
    return data


@pytest.mark.parametrize("kind", READERS)
@HARD
@given(choice=st.data())
def test_any_bytes(kind: str, choice: st.DataObject, tmp_path: Path) -> None:
    read(kind, choice.draw(st.binary(max_size=400) | st.text(max_size=200).map(_encoded)), tmp_path)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


@pytest.mark.parametrize("kind", READERS)
@HARD
@given(choice=st.data())
def test_a_good_file_that_was_broken(kind: str, choice: st.DataObject, tmp_path: Path) -> None:
    assert read(kind, choice.draw(st.sampled_from(seeds(kind))), tmp_path) is None
    read(kind, choice.draw(broken(kind)), tmp_path)


KEYS = ["attacks.strong.steps", "gates.0.where", "seed", "targets.0", "attacks.²", "name.x"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["8/255", "1/0", "noise", "scenes", "../x", "a" * 300, "\ud800", "all", "\0"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "name", "where", "max", "stack", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        found += _places(inner, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    node = copy
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = new
    return copy


@HARD
@given(path=st.sampled_from(_places(GOOD)), new=VALUES)
def test_any_value_anywhere_in_a_scenario(path: tuple[Any, ...], new: Any, tmp_path: Path) -> None:
    read("scenario", json.dumps(replaced(GOOD, path, new), ensure_ascii=True).encode(), tmp_path)


@HARD
@given(path=st.sampled_from(_places(json.loads(trial("s0").model_dump_json()))), new=VALUES)
def test_any_value_anywhere_in_a_trial(path: tuple[Any, ...], new: Any, tmp_path: Path) -> None:
    whole = replaced(json.loads(trial("s0").model_dump_json()), path, new)
    read("ledger", line(json.dumps(whole).encode()), tmp_path)


@HARD
@given(row=st.dictionaries(st.sampled_from(["image", "question", "answer", "options", "id", "kind",
                                            "evidence", "image_id"]), VALUES))  # fmt: skip
def test_any_value_in_a_row(row: dict[str, Any], tmp_path: Path) -> None:
    good = {"image": "a.png", "question": "?", "answer": "x"}
    read("jsonl", (json.dumps(good | row) + "\n").encode(), tmp_path)


@HARD
@given(
    payload=VALUES.map(json.dumps).map(str.encode)
    | st.binary(max_size=60).filter(lambda b: b"\n" not in b)
)
def test_any_payload_with_a_right_checksum(payload: bytes, tmp_path: Path) -> None:
    assert read("ledger", line(payload), tmp_path) is not None


@HARD
@given(
    key=st.text(max_size=20) | st.sampled_from(KEYS),
    value=st.text(max_size=20) | VALUES.map(json.dumps),
)
def test_any_override(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(json.dumps(GOOD))
    with contextlib.suppress(RedteamError):
        load_scenario(path, [f"{key}={value}"])
