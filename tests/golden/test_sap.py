"""Safety-aware pruning against loops: which tokens come back, who is an anchor, where mass goes."""

from __future__ import annotations

import math

import pytest
import torch
from seen import seen
from torch import Tensor

from defenses.base import AdaptiveRoute, DefenseError, DefenseKind
from defenses.sap import SAP, AttentionReallocation, TokenRestoration, reallocated, suspicion
from targets.compression.base import Scores
from targets.compression.scoring import top_k_mask


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# Restoration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [4, 10, 15, 24, 34, 36])
@pytest.mark.parametrize("rho", [0.0, 0.1, 0.3, 1.0])
def test_k_of_the_dropped_replace_the_k_lowest_kept(keep: int, rho: float) -> None:
    score = rand(3, 36, seed=keep)
    kept = top_k_mask(score, keep)
    what = seen(torch.zeros(3, 36, 2), keep)
    restored = TokenRestoration(rho=rho).keep(
        kept, Scores(score, score.log()), what, generators([1, 2, 3])
    )
    wanted = min(math.floor(rho * keep + 0.5), 36 - keep)
    if rho * keep % 1 == 0.5:
        wanted = min(round(rho * keep), 36 - keep)  # to even, as elsewhere
    for row in range(3):
        fresh = [i for i in range(36) if restored[row, i] and not kept[row, i]]
        lost = [i for i in range(36) if kept[row, i] and not restored[row, i]]
        lowest = sorted((i for i in range(36) if kept[row, i]), key=lambda i: float(score[row, i]))[
            :wanted
        ]
        assert len(fresh) == wanted
        assert lost == sorted(lowest)
    if not wanted:
        assert torch.equal(restored, kept)


def test_every_dropped_token_comes_back_as_often() -> None:
    score = rand(1, 25)
    kept = top_k_mask(score, 10)
    what = seen(torch.zeros(1, 25, 2), 10)
    times = torch.zeros(25)
    for seed in range(600):
        found = TokenRestoration(rho=0.3).keep(
            kept, Scores(score, score.log()), what, generators([seed])
        )
        times += found[0] & ~kept[0]
    assert times[kept[0]].sum() == 0
    # 3 of 15, 600 times: 120 each, with a deviation of 9.8.
    assert bool(((times[~kept[0]] - 120).abs() < 40).all())


def test_absent_places_never_come_back() -> None:
    score = rand(2, 16)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, 9:] = False
    kept = top_k_mask(score, torch.tensor([6, 6]), valid)
    what = seen(torch.zeros(2, 16, 2), 6, valid=valid)
    for seed in range(20):
        found = TokenRestoration(rho=1.0).keep(
            kept, Scores(score, score.log()), what, generators([seed, seed])
        )
        assert found.sum(1).tolist() == [6, 6]
        assert not bool((found & ~valid).any())
        assert int((found[1] & ~kept[1]).sum()) == 3, "no more than were dropped"


# Anchors and reallocation ------------------------------------------------------------------------


def test_suspicion_by_hand() -> None:
    paid, states, safe = rand(2, 7), rand(2, 7, 5, seed=1) - 0.5, rand(5, seed=2) - 0.5
    found = suspicion(paid, states, safe)
    for row in range(2):
        for column in range(7):
            v = states[row, column].tolist()
            dot = sum(a * b for a, b in zip(v, safe.tolist(), strict=True))
            size = math.sqrt(sum(a * a for a in v)) * math.sqrt(sum(a * a for a in safe.tolist()))
            wanted = float(paid[row, column]) * (1 - dot / size)
            assert float(found[row, column]) == pytest.approx(wanted, rel=1e-4)
    assert suspicion(paid, None, safe) is paid


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_mass_moves_and_rows_keep_it(strength: float) -> None:
    weights = (rand(2, 3, 4, 9) * 3).softmax(-1)
    anchors = torch.zeros(2, 1, 1, 9, dtype=torch.bool)
    anchors[0, ..., [1, 4]] = True
    anchors[1, ..., 2] = True
    to = torch.zeros(2, 1, 1, 9, dtype=torch.bool)
    to[0, ..., [4, 6, 7]] = True  # one of them an anchor itself
    to[1, ..., 8] = True
    found = reallocated(weights, anchors, to, strength)
    for row in range(2):
        for head in range(3):
            for place in range(4):
                old = weights[row, head, place].tolist()
                at = [i for i in range(9) if anchors[row, 0, 0, i]]
                who = [i for i in range(9) if to[row, 0, 0, i]]
                taken = sum(strength * old[i] for i in at)
                for i in range(9):
                    wanted = old[i] * (1 - strength * (i in at)) + taken / len(who) * (i in who)
                    assert float(found[row, head, place, i]) == pytest.approx(wanted, abs=1e-6)
    torch.testing.assert_close(found.sum(-1), weights.sum(-1))
    assert bool((found >= 0).all())
    if not strength:
        assert torch.equal(found, weights)


def test_a_row_without_anybody_to_give_to_stays_as_it_is() -> None:
    weights = rand(1, 2, 1, 4).softmax(-1)
    nobody = torch.zeros(1, 1, 1, 4, dtype=torch.bool)
    assert torch.equal(reallocated(weights, ~nobody, nobody, 0.6), weights)


# What it says of itself --------------------------------------------------------------------------


def test_it_is_a_selection_and_a_decoding_part() -> None:
    one = SAP(rho=0.2, number=4, strength=0.5, anchors="utility", beams=2)
    restore, reallocate = one.parts()
    assert (restore.kind, reallocate.kind) == (DefenseKind.SELECTION, DefenseKind.DECODING)
    assert restore == TokenRestoration(rho=0.2)
    assert reallocate == AttentionReallocation(number=4, strength=0.5, anchors="utility", beams=2)
    assert one.draws
    assert one.route is AdaptiveRoute.EOT
    assert SAP(rho=0).route is AdaptiveRoute.DIFFERENTIABLE
    assert not SAP(rho=0).draws
    assert (SAP().rho, SAP().number, SAP().strength) == (0.1, 10, 0.6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rho": 1.5}, "sap: rho is 1.5"),
        ({"strength": -0.1}, "sap: strength is -0.1"),
        ({"number": -1}, "sap: number is -1"),
        ({"instruction": " "}, "instruction is ' '; give the words"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(DefenseError, match=says):
        SAP(**options)  # type: ignore[arg-type]
