import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults import Faults, injected
from report_data import cell, manifest, trial

from reports.errors import LedgerError, ResumeMismatch, RunLockedError, StoreError
from reports.records import Manifest
from reports.store import LEDGER, RunStore

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of four samples, two of them recorded."""
    with RunStore.create(tmp_path / "run", manifest(), "name: test\n") as store:
        store.append([trial("s0"), trial("s1", "1111")])
    return tmp_path / "run"


def samples(store: RunStore) -> list[str]:
    return [one.sample for one in store.trials()]


def test_what_was_appended_is_read_back(folder: Path) -> None:
    store = RunStore.read(folder)
    assert list(store.trials()) == [trial("s0"), trial("s1", "1111")]
    assert store.done() == {("c1", "s0"), ("c1", "s1")}
    assert store.manifest == manifest()
    assert store.scenario_text() == "name: test\n"


def test_strange_strings_survive_the_ledger(tmp_path: Path) -> None:
    odd = trial("s0", question='</script>\u202e\u0000\n\u2028\x85 {"sha256": 😀')
    with RunStore.create(tmp_path / "run", manifest()) as store:
        store.append([odd, trial("s1")])
    assert list(RunStore.read(tmp_path / "run").trials()) == [odd, trial("s1")]


def test_a_resume_appends(folder: Path) -> None:
    with RunStore.open(folder, manifest()) as store:
        assert not store.repaired
        store.append([trial("s2")])
    assert samples(RunStore.read(folder)) == ["s0", "s1", "s2"]


@pytest.mark.parametrize("cut", [1, 2, 40, 300])
def test_a_line_cut_short_by_a_kill_is_ignored_and_then_repaired(folder: Path, cut: int) -> None:
    ledger = folder / LEDGER
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:-cut])
    assert samples(RunStore.read(folder)) == ["s0"]
    assert ledger.read_bytes() == whole[:-cut], "reading must not write"
    with RunStore.open(folder, manifest()) as store:
        assert store.repaired
        assert store.done() == {("c1", "s0")}
        store.append([trial("s1", "1111")])
    assert ledger.read_bytes() == whole


@pytest.mark.parametrize("line", [1, 2])
@pytest.mark.parametrize("old", [b'"correct":true', b'"sha256": "', b'"sample":'])
def test_any_other_damage_is_an_error_with_its_line(folder: Path, line: int, old: bytes) -> None:
    lines = (folder / LEDGER).read_bytes().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(old, b"x" * len(old), 1)
    (folder / LEDGER).write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=rf"line {line} is damaged.*Delete line {line}"):
        list(RunStore.read(folder).trials())
    with pytest.raises(LedgerError):
        RunStore.open(folder, manifest())


def test_after_the_advice_of_that_error_only_that_trial_is_missing(folder: Path) -> None:
    lines = (folder / LEDGER).read_bytes().splitlines(keepends=True)
    (folder / LEDGER).write_bytes(lines[1])
    with RunStore.open(folder, manifest()) as store:
        assert store.done() == {("c1", "s1")}


def test_of_two_lines_of_one_sample_the_last_counts(folder: Path) -> None:
    with RunStore.open(folder, manifest()) as store:
        store.append([trial("s0", "error"), trial("s2", "error")])
        store.append([trial("s0", "0000")])
    store = RunStore.read(folder)
    assert [one.sample for one in store.trials()] == ["s1", "s2", "s0"]
    assert {one.sample: one.error is None for one in store.trials()}["s0"]
    assert ("c1", "s2") in store.done()
    assert ("c1", "s2") not in store.done(errors=False)


def test_a_trial_is_read_again_from_its_place(folder: Path) -> None:
    with RunStore.open(folder, manifest()) as store:
        store.append([trial("s0", "0000"), trial("s2", question="é \u2028")])
    store = RunStore.read(folder)
    located = list(store.located())
    assert [one for _, one in located] == list(store.trials())
    assert [place.number for place, _ in located] == [2, 3, 4]
    for place, one in reversed(located):
        assert store.trial_at(place) == one


def test_a_place_that_was_changed_is_noticed(folder: Path) -> None:
    store = RunStore.read(folder)
    (place, _), *_ = store.located()
    data = (folder / LEDGER).read_bytes()
    (folder / LEDGER).write_bytes(data.replace(b'"s0"', b'"s9"', 1))
    with pytest.raises(LedgerError, match="line 1 is damaged: its checksum does not match"):
        store.trial_at(place)


@pytest.mark.parametrize("name", ['say "s1"', "back\\slash", "tab\t", "é😀", "", '","sample":"s1'])
def test_names_of_every_kind_are_told_apart(tmp_path: Path, name: str) -> None:
    """Keys are read without parsing a line where they need no escape: then too they are right."""
    one = cell(f"c {name}")
    planned = manifest(cells=[one]).model_copy(update={"samples": [name, "s1"]})
    with RunStore.create(tmp_path / "run", planned) as store:
        store.append(
            [trial(name, cell=one.id), trial("s1", cell=one.id), trial(name, "1111", one.id)]
        )
    store = RunStore.read(tmp_path / "run")
    assert store.done() == {(one.id, name), (one.id, "s1")}
    assert [found.sample for found in store.trials()] == ["s1", name]


def test_an_error_is_told_from_an_answer_that_looks_like_none(folder: Path) -> None:
    with RunStore.open(folder, manifest()) as store:
        failed = trial("s2", "error").error
        assert failed is not None
        odd = failed.model_copy(update={"traceback": '"error":null}'})
        store.append([trial("s2", "error", error=odd)])
    assert ("c1", "s2") not in RunStore.read(folder).done(errors=False)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"[1, 2]", "it has no"),
        (b'{"cell": "c1"}', "it has no 'sample'"),
        (b"nothing", "it is no JSON"),
        (b"\xff", "it is no JSON"),
        (b'{"cell"', "it is no JSON"),
        (b"[1]", "it has no"),
        (b'{"cell": ["c"], "sample": "s"}', "its cell or sample is no text"),
        (b'{"cell": ' + b"[" * 9000, "it is no JSON"),
    ],
)
def test_a_line_of_something_else_is_said_to_be_damaged(
    folder: Path, payload: bytes, why: str
) -> None:
    digest = hashlib.sha256(payload).hexdigest()[:16].encode()
    with (folder / LEDGER).open("ab") as file:
        file.write(b'{"sha256": "' + digest + b'", "trial": ' + payload + b"}\n")
    with pytest.raises(LedgerError, match=f"line 3 is damaged: {why}"):
        RunStore.read(folder).done()


def test_images_are_stored_once_by_their_content(folder: Path) -> None:
    data = b"not really a PNG"
    with RunStore.open(folder, manifest()) as store:
        name = store.save_png(data)
        assert store.save_png(data) == name == hashlib.sha256(data).hexdigest()
    store = RunStore.read(folder)
    assert store.read_png(name) == data
    assert store.image_path(name) == folder / "images" / name[:2] / f"{name}.png"
    assert [p.name for p in (folder / "images").rglob("*") if p.is_file()] == [f"{name}.png"]


def test_a_changed_image_is_noticed(folder: Path) -> None:
    with RunStore.open(folder, manifest()) as store:
        name = store.save_png(b"one")
    store.image_path(name).write_bytes(b"two")
    with pytest.raises(StoreError, match="was changed"):
        store.read_png(name)


def changed(**update: object) -> Manifest:
    return manifest().model_copy(update=update)


def test_a_resume_of_another_scenario_is_refused_key_by_key(folder: Path) -> None:
    scenario = {
        "name": "test", "seed": 0, "attacks": [{"type": "caa", "steps": 40, "alpha": 0.1}],
    }  # fmt: skip
    with pytest.raises(ResumeMismatch) as caught:
        RunStore.open(folder, changed(scenario=scenario, scenario_hash="1" * 16))
    assert caught.value.differences == (
        "attacks[0].alpha: (absent) -> 0.1",
        "attacks[0].steps: 30 -> 40",
    )
    assert "attacks[0].steps: 30 -> 40" in str(caught.value)


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"samples": ["s0"]}, "samples: 4 -> 1"),
        ({"cells": [cell("other")]}, "cells: 1 -> 1"),
        ({"scenario_hash": "1" * 16}, "scenario_hash"),
    ],
)
def test_other_differences_are_refused_too(
    folder: Path, update: dict[str, object], said: str
) -> None:
    with pytest.raises(ResumeMismatch, match=said):
        RunStore.open(folder, changed(**update))


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    first = changed(provenance={"identity": {"scenes-a": "aaaa"}, "host": "one"})
    RunStore.create(tmp_path / "run", first).close()
    with pytest.raises(ResumeMismatch, match=r'identity.scenes-a: "aaaa" -> "bbbb"'):
        RunStore.open(tmp_path / "run", changed(provenance={"identity": {"scenes-a": "bbbb"}}))
    again = changed(provenance={"identity": {"scenes-a": "aaaa"}, "host": "two"})
    RunStore.open(tmp_path / "run", again).close()  # another machine is no other run


def test_two_writers_are_refused_and_the_first_is_named(folder: Path) -> None:
    with RunStore.open(folder, manifest()):
        with pytest.raises(RunLockedError, match=f"process {os.getpid()}"):
            RunStore.open(folder, manifest())
        assert samples(RunStore.read(folder)) == ["s0", "s1"], "reading is always possible"
    RunStore.open(folder, manifest()).close()


def test_a_killed_writer_leaves_no_lock(folder: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from reports.files import FileLock\n"
        "lock = FileLock(Path(sys.argv[1]) / '.lock'); print('held', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"held\n"
    with pytest.raises(RunLockedError, match=f"process {writer.pid}"):
        RunStore.open(folder, manifest())
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    RunStore.open(folder, manifest()).close()


def test_a_folder_with_something_in_it_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_text("mine")
    with pytest.raises(StoreError, match="not empty"):
        RunStore.create(tmp_path, manifest())
    assert (tmp_path / "scenario.yaml").read_text() == "mine"


def test_a_run_killed_before_its_manifest_can_start_again(tmp_path: Path) -> None:
    RunStore.create(tmp_path, manifest(), "x").close()
    (tmp_path / "manifest.json").unlink()
    RunStore.create_or_open(tmp_path, manifest(), "x").close()
    RunStore.create_or_open(tmp_path, manifest(), "x").close()


def test_what_is_no_run_folder_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a run folder"):
        RunStore.read(tmp_path)


def test_a_manifest_that_cannot_be_read_names_the_field(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"name": "test"', '"name": 3', 1))
    with pytest.raises(StoreError, match="name: "):
        RunStore.read(folder)


def test_a_store_for_reading_does_not_write(folder: Path) -> None:
    with pytest.raises(StoreError, match="reading only"):
        RunStore.read(folder).append([trial("s2")])


def test_a_full_disk_is_explained_and_leaves_the_ledger_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / LEDGER).read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunStore.open(folder, manifest()) as store:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="disk is full"):
            store.append([trial("s2")])
        store.save_png(b"image")
        with pytest.raises(StoreError, match="disk is full"):
            store.append([trial("s3")])
        monkeypatch.undo()
        assert (folder / LEDGER).read_bytes() == before, "no line names an image that is not there"
        assert not list((folder / "images").rglob("*.*")), "no temporary file stays"
        store.append([trial("s2")])
    assert samples(RunStore.read(folder)) == ["s0", "s1", "s2"]


def test_an_image_that_failed_can_be_saved_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, times = os.fsync, 0

    def once(handle: int) -> None:
        nonlocal times
        times += 1
        if times == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with RunStore.open(folder, manifest()) as store:
        monkeypatch.setattr(os, "fsync", once)
        name = store.save_png(b"image")
        with pytest.raises(StoreError, match="disk is full"):
            store.read_png(name)
        with pytest.raises(StoreError, match="disk is full"):
            store.append([trial("s2")])
        assert store.save_png(b"image") == name
        store.append([trial("s2")])
        assert store.read_png(name) == b"image"


def test_what_failed_first_is_raised_not_what_failed_on_closing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail() -> None:
        with RunStore.open(folder, manifest()) as store:
            monkeypatch.setattr(os, "fsync", full)
            store.save_png(b"image")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    monkeypatch.undo()
    RunStore.open(folder, manifest()).close()  # the lock was given back


def test_images_of_a_closed_store_are_there(folder: Path) -> None:
    with RunStore.open(folder, manifest()) as store:
        names = [store.save_png(str(number).encode()) for number in range(50)]
    there = RunStore.read(folder)
    assert [there.read_png(name) for name in names] == [str(n).encode() for n in range(50)]


def test_a_place_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="another --out folder"):
        RunStore.create(tmp_path / "file" / "run", manifest())


def test_half_a_unit_on_a_disk_that_fills_up_is_taken_back(folder: Path) -> None:
    before = (folder / LEDGER).read_bytes()
    more = [trial(f"n{index}", question="?" * 3000) for index in range(5)]  # more than one buffer
    counted = Faults()
    with RunStore.open(folder, manifest()) as store:
        with injected(counted):
            store.append([trial("s2")])
        at = counted.log.index("write") + 1
        (folder / LEDGER).write_bytes(before)
        with injected(Faults(at, number=errno.ENOSPC)), pytest.raises(StoreError, match="disk is"):
            store.append(more)
        assert (folder / LEDGER).read_bytes() == before, "closing the file wrote behind the cut"
        store.append(more)
    assert len(samples(RunStore.read(folder))) == 7


def test_half_a_unit_that_cannot_be_taken_back_is_cut_off_before_the_next(folder: Path) -> None:
    before = (folder / LEDGER).read_bytes()
    with RunStore.open(folder, manifest()) as store:
        counted = Faults()
        with injected(counted):
            store.append([trial("s2")])
        (folder / LEDGER).write_bytes(before)
        at = counted.log.index("write") + 1
        with (
            injected(Faults(at, number=errno.EIO, lasting=True)),
            pytest.raises(StoreError, match="Input/output error"),
        ):
            store.append([trial("s2")])
        assert (folder / LEDGER).read_bytes() != before, "there is half a line"
        assert samples(RunStore.read(folder)) == ["s0", "s1"]
        store.append([trial("s3")])
    assert samples(RunStore.read(folder)) == ["s0", "s1", "s3"]


def test_what_killed_writers_left_is_removed_by_the_next(folder: Path) -> None:
    with RunStore.open(folder, manifest()) as store:
        name = store.save_png(b"image")
    left = folder / "images" / name[:2] / f".{name[:40]}.k2l_x9ab"
    mine = folder / "images" / ".gitignore"
    left.write_bytes(b"ima")
    mine.write_text("*")
    RunStore.read(folder)
    assert left.exists(), "reading must not write"
    RunStore.open(folder, manifest()).close()
    assert not left.exists()
    assert mine.exists()
    assert RunStore.read(folder).read_png(name) == b"image"


def test_an_error_about_a_name_that_is_no_utf8_is_recorded(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    wrong = trial("s0", "error")
    assert wrong.error is not None
    error = wrong.error.model_copy(update={"message": f"cannot read {name}"})
    planned = changed(provenance={"command": f"redteam run {name}"})
    with RunStore.create(tmp_path / "run", planned) as store:
        store.append([wrong.model_copy(update={"error": error})])
    store = RunStore.read(tmp_path / "run")
    assert store.manifest.provenance["command"] == "redteam run caf?.png"
    (found,) = store.trials()
    assert found.error is not None
    assert found.error.message == "cannot read caf?.png"


def test_half_a_surrogate_pair_is_recorded_as_a_question_mark(folder: Path) -> None:
    with RunStore.open(folder, manifest()) as store:
        store.append([trial("s2", question="what is \ud800 this?", truth="yes")])
    last = [one for one in RunStore.read(folder).trials() if one.sample == "s2"]
    assert last[0].question == "what is ? this?"
    assert last[0].truth == "yes"
