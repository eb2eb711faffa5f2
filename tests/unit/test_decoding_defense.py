"""What all decoding methods share: options, the plausibility cut, the contrast."""

from __future__ import annotations

import math

import pytest
import torch

from defenses.base import DefenseError, DefenseKind
from defenses.beam import BeamSearch
from defenses.decoding import OFF, contrasted, plausible
from defenses.vasparse import VASparse


def test_options_outside_their_range_are_refused() -> None:
    with pytest.raises(DefenseError, match=r"beams is 0; allowed is Ge\(ge=1\)"):
        BeamSearch(beams=0)


def test_intervals_are_checked_at_both_ends() -> None:
    for keep in (0.0, 1.1):
        with pytest.raises(DefenseError, match=f"keep is {keep}; allowed is Interval"):
            VASparse(keep=keep)
    assert VASparse(keep=1.0).keep == 1


def test_it_says_what_it_is() -> None:
    one = BeamSearch()
    assert one.kind is DefenseKind.DECODING
    assert one.verifiable
    assert not one.draws
    assert repr(one) == "BeamSearch(beams=3, length_penalty=1.0)"


@pytest.mark.parametrize("cutoff", [0.0, 0.1, 0.5, 1.0])
def test_the_plausibility_cut_is_exact(cutoff: float) -> None:
    logits = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0)) * 3
    found = plausible(logits, cutoff)
    for row in range(4):
        for place in range(3):
            p = [math.exp(value) for value in logits[row, place].tolist()]
            wanted = [one >= cutoff * max(p) for one in p]
            assert found[row, place].tolist() == wanted


def test_nothing_subtracted_is_the_same_tensor() -> None:
    logits = torch.randn(2, 9)
    assert contrasted(logits, torch.randn(2, 9), 0.0, 0.1) is logits


def test_the_contrast_by_hand() -> None:
    logits, other = torch.tensor([2.0, 1.0, -3.0]), torch.tensor([0.5, 2.0, -4.0])
    found = contrasted(logits, other, 0.5, 0.1)
    assert found.tolist() == pytest.approx([2.75, 0.5, 1.5 * -3 + 0.5 * 4 - OFF])
    assert float(found.softmax(0)[2]) == 0.0
