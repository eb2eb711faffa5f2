"""Whatever the picture, the border and the budget: only the frame moves, and never too far."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import Attack, Noise, TransferCAA
from attacks.errors import AttackError
from attacks.transfer.borders import frame, framed, inside_of, thickness
from targets.base import Knowledge
from tests.fakes import FakeSurrogates, FakeView, make_batch

FRAMES = st.sampled_from(["inside", "added"])
BORDERS = st.floats(0.01, 0.4)
EPSILONS = st.floats(1 / 255, 1)


def check(attack: Attack, view: Any, size: int, epsilon: float, border: float, where: str) -> None:
    batch = make_batch(2, size)
    result = attack(view, batch, epsilon, [1, 2])
    base = framed(batch.images, border) if where == "added" else batch.images
    assert torch.equal(result.base, (base * 255).round() / 255)
    moved = (result.images - result.base).abs()
    assert float(moved.max()) <= epsilon + 1e-6
    assert float(result.linf.max()) <= epsilon
    inside = frame(batch.images, border).expand_as(moved) == 0
    assert not bool(moved[inside].any())


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 40), BORDERS, FRAMES, EPSILONS, st.sampled_from(["uniform", "sign"]))
def test_noise(size: int, border: float, where: Any, epsilon: float, kind: Any) -> None:
    attack = Noise(border=border, frame=where, distribution=kind)
    check(attack, FakeView(Knowledge.NONE), size, epsilon, border, where)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([12, 16, 24]),
    BORDERS,
    FRAMES,
    EPSILONS,
    st.one_of(st.none(), st.integers(1, 30)),
    st.sampled_from(["mean", "cwa"]),
)
def test_transfer_caa(
    size: int, border: float, where: Any, epsilon: float, template: int | None, ensemble: Any
) -> None:
    attack = TransferCAA(
        border=border, frame=where, template=template, ensemble=ensemble, steps=2, judge_every=1
    )
    check(attack, FakeSurrogates(1), size, epsilon, border, where)


@given(st.integers(3, 200), st.integers(3, 200), BORDERS)
def test_a_frame_leaves_an_inside_or_is_refused(height: int, breadth: int, width: float) -> None:
    top, left, bottom, right = inside_of((height, breadth), width)
    thick = thickness((height, breadth), width)
    assert 1 <= thick <= max(1, round(width * min(height, breadth)))
    if 2 * thick >= min(height, breadth):  # rounding closes the frame of a tiny picture
        with pytest.raises(AttackError, match="of the shorter side"):
            framed(torch.zeros(1, 3, height, breadth), width)
        return
    assert top < bottom
    assert left < right
    shape = framed(torch.zeros(1, 3, height, breadth), width).shape
    assert shape == (1, 3, height, breadth)
