"""Batches of the fake target that it answers right, so that there is something to break."""

from __future__ import annotations

from dataclasses import replace

from targets.base import Batch
from tests.fakes import FakeView, make_batch


def answered(count: int, *, view: FakeView | None = None, seed: int = 0) -> Batch:
    """Samples that the fake answers alike with all tokens and compressed; that answer is right."""
    view = view or FakeView()
    rows: list[int] = []
    drawn = 6 * count
    while len(rows) < count:  # how many it answers alike depends on the draw
        batch = make_batch(drawn, seed=seed)
        full = view.ask(batch.images, batch.questions, path="full")
        compressed = view.ask(batch.images, batch.questions, path="compressed")
        rows = [i for i, pair in enumerate(zip(full, compressed, strict=True)) if len({*pair}) == 1]
        drawn *= 2
    chosen = batch.rows(rows[:count])
    return replace(chosen, answers=tuple(full[row] for row in rows[:count]))
