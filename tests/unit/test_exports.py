"""Plugin authors import from `redteam` alone."""

from __future__ import annotations

import pytest

import redteam


@pytest.mark.parametrize("name", redteam.__all__)
def test_every_name_loads(name: str) -> None:
    assert getattr(redteam, name) is not None


@pytest.mark.parametrize("name", ["EncoderView", "CompressedView", "WhiteBoxView", "QueryView"])
def test_the_types_of_views_are_among_them(name: str) -> None:
    assert name in redteam.__all__
