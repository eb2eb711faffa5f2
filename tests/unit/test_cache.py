"""The cache gives back what was put in, under the same key only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from redteam import cache
from redteam.cache import Entry, ImageCache, code, key_of, size_of
from redteam.cli import main
from redteam.errors import UsageError

ENTRY = Entry({"loss": [0.5, float("1e-3")], "checks": ["x: y"]}, b"attacked", b"base")


def test_it_gives_back_what_was_put_in(tmp_path: Path) -> None:
    store = ImageCache(tmp_path / "new")
    assert store.get("a" * 64) is None
    store.put("a" * 64, ENTRY)
    assert store.get("a" * 64) == ENTRY
    assert store.get("b" * 64) is None
    assert store.contents().images == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_image_is_none(tmp_path: Path, damage: str) -> None:
    store = ImageCache(tmp_path)
    store.put("a" * 64, ENTRY)
    (path,) = tmp_path.rglob("*.image")
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:-1], "flip": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[damage]
    )
    assert store.get("a" * 64) is None


def test_what_is_used_stays(tmp_path: Path) -> None:
    store = ImageCache(tmp_path)
    for number in range(4):
        store.put(f"{number}" * 64, ENTRY)
        (path,) = tmp_path.rglob(f"{number}*.image")
        os.utime(path, (number, number))
    assert store.get("0" * 64) is not None
    one = store.contents().size // 4
    assert store.prune(2 * one) == 2
    assert [store.get(f"{n}" * 64) is not None for n in range(4)] == [True, False, False, True]
    assert store.prune(0) == 2
    assert store.contents().size == 0


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ImageCache(tmp_path / "file")
    store.put("a" * 64, ENTRY)
    assert store.get("a" * 64) is None
    assert store.contents().images == 0


def test_the_key_depends_on_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {"seed": 1, "weights": {"sha": "x"}, "image": "y"}
    keys = {key_of(made)}
    for change in ({"seed": 2}, {"weights": {"sha": "z"}}, {"image": "z"}, {"more": 1}):
        keys.add(key_of({**made, **change}))
    monkeypatch.setattr(cache, "code", lambda: "other code")
    keys.add(key_of(made))
    monkeypatch.undo()
    monkeypatch.setattr(cache, "_versions", lambda: {"torch": "9"})
    keys.add(key_of(made))
    assert len(keys) == 7
    monkeypatch.undo()
    assert key_of(dict(reversed(made.items()))) == key_of(made), "but not on the order"


def test_the_code_is_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("attacks", "defenses", "redteam", "targets"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "one.py").write_text("x = 1")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "redteam" / "cache.py"))
    code.cache_clear()
    before = code()
    (tmp_path / "targets" / "one.py").write_text("x = 2")
    code.cache_clear()
    assert code() != before
    code.cache_clear()


@pytest.mark.parametrize(
    ("text", "size"), [("0B", 0), ("20GB", 20 * 1024**3), (" 1.5 mb ", 1572864), ("7KB", 7168)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "20", "GB", "-1GB", "1e30TB", "nanB", "many"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        size_of(text)


def test_the_environment_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ImageCache.of_environment() is None, "tests run without it"
    monkeypatch.setenv("REDTEAM_CACHE", str(tmp_path))
    monkeypatch.setenv("REDTEAM_CACHE_LIMIT", "1MB")
    found = ImageCache.of_environment()
    assert found is not None
    assert (found.folder, found.limit) == (tmp_path, 1024**2)
    monkeypatch.delenv("REDTEAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    found = ImageCache.of_environment()
    assert found is not None
    assert found.folder == tmp_path / "home" / "redteam" / "images"


def test_the_command_shows_and_empties_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDTEAM_CACHE", str(tmp_path))
    ImageCache(tmp_path).put("a" * 64, ENTRY)

    def redteam(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["redteam", "cache", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return capsys.readouterr().out

    assert "holds    1 image," in redteam()
    assert json.loads(redteam("--json"))["cache"]["images"] == 1
    assert "deleted  1 image" in redteam("--clear")
    monkeypatch.setenv("REDTEAM_CACHE", "off")
    assert "switched off" in redteam()


def test_what_names_a_method_of_another_package_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from redteam.engines import local
    from redteam.plan import make_plan
    from redteam.scenario import load_limited

    groups = make_plan(load_limited("quickstart", [], None)).groups

    def kept() -> set[str]:
        labels = (f"{one.attack.label} {one.known.label if one.known else ''}" for one in groups)
        return {label for label, one in zip(labels, groups, strict=True) if local.cacheable(one)}

    assert kept() == {"pgd ", "caa fastv K=2 25%", "caa visionzip 25%"}, "noise costs nothing"
    monkeypatch.setattr(local, "foreign", lambda: {"visionzip"})
    assert kept() == {"pgd ", "caa fastv K=2 25%"}
