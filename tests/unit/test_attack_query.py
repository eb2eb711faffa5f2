"""Text answers alone: patterns, and findings that were given, not assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attacks import Query
from attacks.patterns import PATTERNS
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge
from tests.fakes import FakeView, make_batch, pick

SEEDS = [1, 2, 3, 4]
EPSILON = 16 / 255


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(sorted(PATTERNS)),
    st.integers(0, 10_000),
    st.sampled_from([(1, 1), (2, 9), (16, 16), (31, 48), (96, 96)]),
)
def test_patterns_are_signs_of_each_samples_own(
    name: str, seed: int, size: tuple[int, int]
) -> None:
    both = PATTERNS[name](size, SeedBank([seed, seed + 1]))
    assert both.shape == (2, 3, *size)
    assert torch.equal(both.abs(), torch.ones_like(both))
    assert torch.equal(PATTERNS[name](size, SeedBank([seed + 1])), both[1:])


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_patterns_have_a_structure_that_noise_has_not(name: str) -> None:
    """Neighbours agree far more often than by chance, along one axis at least."""
    found = PATTERNS[name]((64, 64), SeedBank(range(40)))
    down = (found[:, :, 1:] == found[:, :, :-1]).float().flatten(1).mean(1)
    across = (found[..., 1:] == found[..., :-1]).float().flatten(1).mean(1)
    assert (torch.maximum(down, across) > 0.6).float().mean() > 0.9
    assert found.flatten(1).mean(1).abs().median() < 0.5  # and neither sign has it all


@dataclass
class Threshold(FakeView):
    """Answers wrongly once the left half is brighter than at first by `bar` in the mean."""

    knowledge: Knowledge = Knowledge.QUERY
    clean: Tensor | None = None
    bar: float = 0.0
    asked: list[tuple[str, Tensor]] = field(default_factory=list)

    def ask(self, images: Tensor, questions: Any, *, path: Any = "compressed") -> tuple[str, ...]:
        assert self.clean is not None
        texts = []
        for image, question in zip(images, questions, strict=True):
            row = int(question.split()[1].rstrip("?"))
            self.asked.append((question, image.clone()))
            half = (image - self.clean[row])[..., : image.shape[-1] // 2]
            texts.append("wrong" if float(half.mean()) > self.bar else "right")
        return tuple(texts)


def grey(count: int = 4) -> Batch:
    batch = make_batch(count)
    images = torch.full_like(batch.images, 128 / 255)
    return replace(batch, images=images, answers=("right",) * count)


def run(bar: float, **options: Any) -> tuple[Threshold, Batch, Any]:
    batch = grey()
    view = Threshold(clean=batch.images, bar=bar)
    return view, batch, Query(**options)(view, batch, EPSILON, SEEDS)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_is_saved_is_what_was_answered_wrongly(norm: Any) -> None:
    batch = grey()
    view = Threshold(clean=batch.images, bar=0.2 * EPSILON if norm == "linf" else 0.01)
    result = Query(norm=norm, queries=60)(view, batch, EPSILON if norm == "linf" else 2.0, SEEDS)
    texts = view.ask(result.images, batch.questions)
    assert texts == ("wrong",) * 4
    for row, question in enumerate(batch.questions):
        mine = [image for name, image in view.asked[:-4] if name == question]
        assert torch.equal(mine[-1], result.images[row])  # the last question, then it stopped
        others = torch.stack(mine[:-1]) if len(mine) > 1 else torch.empty(0)
        assert not any(torch.equal(image, result.images[row]) for image in others)
    assert result.queries == math.ceil((len(view.asked) - 4) / 4)


def test_questions_are_spent_and_no_more_where_nothing_helps() -> None:
    view, batch, result = run(bar=9.0, queries=11)
    counts = [sum(name == question for name, _ in view.asked) for question in batch.questions]
    assert counts == [11] * 4
    assert result.queries == 11
    assert result.linf.tolist() == [EPSILON] * 4
    assert not any(result.checks)


def test_kinds_of_pattern_take_turns() -> None:
    view, batch, _ = run(bar=9.0, queries=8)
    mine = [image for name, image in view.asked if name == batch.questions[0]]
    rng = SeedBank(SEEDS[:1])
    for number, image in enumerate(mine):
        signs = list(PATTERNS.values())[number % len(PATTERNS)]((16, 16), rng)
        torch.testing.assert_close(image, batch.images[0] + EPSILON * signs[0])


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    _, batch, together = run(bar=0.5 * EPSILON, queries=20)
    for row in range(4):
        one = pick(batch, row)
        own = Threshold(clean=batch.images, bar=0.5 * EPSILON)
        alone = Query(queries=20)(own, one, EPSILON, SEEDS[row : row + 1])
        assert torch.equal(alone.images[0], together.images[row])


def test_answers_are_judged_as_the_data_set_judges() -> None:
    """A judge that accepts everything leaves nothing to find."""
    batch = replace(grey(), judges=(lambda text: True,) * 4)
    view = Threshold(clean=batch.images, bar=-9.0)  # whatever is asked, the text is "wrong"
    assert Query(queries=7)(view, batch, EPSILON, SEEDS).queries == 7
    assert Query(queries=7)(view, replace(batch, judges=None), EPSILON, SEEDS).queries == 1
