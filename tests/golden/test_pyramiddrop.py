"""PyramidDrop against loops over heads and tokens."""

from __future__ import annotations

import pytest
import torch
from sight import ROWS, Prompt, prompt

from targets.compression.base import Cut, Stage
from targets.compression.pyramiddrop import PyramidDrop
from targets.compression.trace import choose

ONE = PyramidDrop(retention=0.125)


def saw(seed: int, counts: int = 4, dead: tuple[tuple[int, int], ...] = ()) -> Prompt:
    cut = Cut(Stage.LAYER, 8, attends=True)
    return prompt(ROWS, counts, seed=seed, dead=dead, attends=True, cut=cut)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dead", [(), ((0, 0), (1, 2), (1, 4), (3, 11))])
def test_score_is_the_last_row(seed: int, dead: tuple[tuple[int, int], ...]) -> None:
    one = saw(seed, 2, dead)
    scores, selection = choose(ONE, one.seen)
    for image in range(4):
        truth = one.mean_paid(image, [one.text.last])
        valid = one.seen.valid[image]
        assert scores.score[image][valid].tolist() == pytest.approx(truth, abs=1e-9)
        places = valid.nonzero().flatten().tolist()
        best = sorted(range(len(truth)), key=lambda i: (-truth[i], i))[:2]
        kept = selection.kept[image].nonzero().flatten().tolist()
        assert kept == sorted(places[i] for i in best)


def test_of_equals_the_first_stay() -> None:
    one = saw(0)
    even = torch.ones_like(one.seen.attention) * 0.01
    for count in (1, 3, 5):
        seen = prompt(ROWS, count, attends=True).seen
        object.__setattr__(seen, "attention", even)
        _, selection = choose(ONE, seen)
        assert bool(selection.kept[:, :count].all())
        assert selection.kept.sum(1).tolist() == [count] * 4


def test_an_image_alone_is_kept_as_in_the_batch() -> None:
    one = saw(5)
    _, selection = choose(ONE, one.seen)
    alone = prompt([ROWS[0]], 4, seed=5, attends=True)
    _, single = choose(ONE, alone.seen)
    assert torch.equal(selection.kept[0, :9], single.kept[0])
    assert not bool(selection.kept[0, 9:].any())
