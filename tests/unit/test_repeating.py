"""The self-check on an attack that is run twice alike."""

from __future__ import annotations

import numpy as np

from redteam.trials import changed

PICTURE = np.full((4, 4, 3), 7, dtype=np.uint8)


def test_equal_runs_say_nothing() -> None:
    assert changed(PICTURE, PICTURE.copy()) == ""
    assert changed(None, None) == "", "an error that repeats itself is repeatable"


def test_a_difference_is_measured() -> None:
    other = PICTURE.copy()
    other[0, 0, 0] = 3
    message = changed(PICTURE, other)
    assert message.startswith("not-repeatable: ")
    assert "2.1% of the picture, by up to 4 levels" in message
    assert changed(other, PICTURE) == message


def test_one_error_is_a_difference() -> None:
    assert "ended in an error" in changed(PICTURE, None)
    assert "ended in an error" in changed(None, PICTURE)
