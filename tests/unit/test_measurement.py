"""The record and the page of ``redteam measure``."""

from __future__ import annotations

from pathlib import Path

import pytest
from measured import measurement, setting

from reports.errors import ReportError
from reports.html.measurement import heat, render, write
from reports.measurement import PRACTICAL, accuracy_interval, read, rows, scores_text
from reports.measurement import write as write_record


def test_k_prac_is_the_fewest_tokens_that_keep_enough() -> None:
    found = measurement(
        setting("", right=90, left=144),
        setting("m 50%", method="m", right=85, left=72),
        setting("m 25%", method="m", right=72, left=36),
        setting("m 11%", method="m", right=71, left=16),
        setting("n 50%", method="n", right=10, left=72),
    )
    assert pytest.approx(0.72) == PRACTICAL * 0.9
    best = found.practical("t", "m")
    assert best is not None
    assert best.left == 36
    assert found.practical("t", "n") is None
    assert [name for name, _ in found.curves("t")] == ["m", "n"]
    (_, settings), _ = found.curves("t")
    assert [one.left for one in settings] == [72, 36, 16]


def test_rows_say_what_could_not_be_measured() -> None:
    found = measurement(setting("", right=90), setting("broken", n=0, right=0, errors=100))
    cells = list(rows(found, "t"))
    assert cells[0][0] == "all tokens"
    assert cells[0][3] == "0.900 [0.83, 0.94]"
    assert cells[1][3] == "error"
    assert accuracy_interval(found.settings[0]) == pytest.approx((0.826, 0.945), abs=2e-3)


def test_own_scores_are_shown_where_they_add_something() -> None:
    plain = setting("m", right=90, scores={"accuracy": 0.9})
    assert scores_text(plain) == ""
    other = setting("m", right=90, scores={"accuracy": 0.81})
    assert scores_text(other) == "accuracy 0.81"
    more = setting("m", right=90, scores={"accuracy": 0.9, "f1": 0.87654})
    assert scores_text(more) == "accuracy 0.9, f1 0.8765"


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = measurement(setting("", right=1), setting("m", right=1, frequency=True))
    assert read(write_record(tmp_path, found)) == found
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ReportError, match=r"other\.json is no measurement"):
        read(tmp_path / "other.json")


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\x1b[31m\u202e"
    found = measurement(
        setting("", right=90),
        setting(bad, method=bad, right=80, frequency=True, scores={bad: 0.5}),
        name=bad,
        question=bad,
    )
    page = write(tmp_path, found).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert render(found) == page


def test_tokens_are_listed_layer_by_layer() -> None:
    page = render(measurement(setting("", right=90), setting("m", right=80)))
    assert page.count('<td class="num">8 8</td>') == 2


def test_a_map_is_darker_where_there_is_more() -> None:
    drawn = str(heat((1, 3), [0.0, 0.5, 1.0]))
    assert 'fill-opacity="0.5"' in drawn
    assert 'fill-opacity="1.0"' in drawn
    assert drawn.count('class="above"') == 2
    signed = str(heat((1, 2), [-0.02, 0.01], signed=True))
    assert 'class="below" fill-opacity="1.0"' in signed
    assert 'class="above" fill-opacity="0.5"' in signed
    assert str(heat((1, 1), [0.0], signed=True)).count("rect") >= 1
