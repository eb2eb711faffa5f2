"""Batches of the fake target that it answers right, so that there is something to break."""

from __future__ import annotations

from dataclasses import replace

from targets.base import Batch
from tests.fakes import FakeView, make_batch


def answered(count: int, *, view: FakeView | None = None, seed: int = 0) -> Batch:
    """Samples that the fake answers alike with all tokens and compressed; that answer is right."""
    view = view or FakeView()
    batch = make_batch(6 * count, seed=seed)
    full = view.ask(batch.images, batch.questions, path="full")
    compressed = view.ask(batch.images, batch.questions, path="compressed")
    rows = [row for row, pair in enumerate(zip(full, compressed, strict=True)) if len({*pair}) == 1]
    assert len(rows) >= count, "draw more samples"
    chosen = batch.rows(rows[:count])
    return replace(chosen, answers=tuple(full[row] for row in rows[:count]))
