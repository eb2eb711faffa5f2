"""The losses of the margin split, against short slow references written from their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from attacks.margin_split import renewed, worth
from targets.passes import answer_margin
from targets.prompts import Dialogue


@pytest.mark.parametrize("seed", range(4))
def test_answer_margin_is_the_smallest_lead_of_a_token(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs = (3 * torch.randn(5, 3, 7, generator=generator)).log_softmax(-1)
    targets = torch.randint(0, 7, (5, 3), generator=generator)
    real = torch.arange(3) < torch.randint(1, 4, (5, 1), generator=generator)
    talk = Dialogue(torch.zeros(5, 4), torch.ones(5, 4), targets, real)
    found = answer_margin(logprobs, talk).tolist()
    for sample in range(5):
        leads = []
        for place in range(3):
            if not real[sample, place]:
                continue
            row, wanted = logprobs[sample, place].tolist(), int(targets[sample, place])
            leads.append(row[wanted] - max(v for i, v in enumerate(row) if i != wanted))
        assert found[sample] == pytest.approx(min(leads), abs=1e-6)
        greedy = all(
            int(logprobs[sample, place].argmax()) == int(targets[sample, place])
            for place in range(3)
            if real[sample, place]
        )
        assert (found[sample] > 0) == greedy


def test_the_multiplier_follows_the_full_margin_and_stays_in_its_range() -> None:
    full = [[3.0, 0.5, -2.0, 1.0], [3.0, 2.0, -2.0, 0.9]]
    now, slow = torch.ones(4), [1.0] * 4
    for _ in range(30):
        for margins in full:
            now = renewed(now, torch.tensor(margins), 1.0, 1.5, 0.8, floor=0.25)
            for i, margin in enumerate(margins):
                factor = 1.5 if margin < 1.0 else 0.8
                slow[i] = min(max(slow[i] * factor, 0.25), 100.0)
            assert now.tolist() == pytest.approx(slow, rel=1e-4)
    assert float(now[0]) == pytest.approx(0.25)
    assert float(now[2]) == pytest.approx(100.0)


def test_an_image_the_full_path_misreads_is_worth_less_than_any_it_reads() -> None:
    compressed = [-4.0, 30.0, -4.0, -4.0, 2.0]
    full = [0.5, 0.02, 0.01, -3.0, -40.0]
    found = worth(torch.tensor(compressed), torch.tensor(full), 0.01).tolist()
    slow = [c if f > 0.01 else 1000 + 0.01 - f for c, f in zip(compressed, full, strict=True)]
    assert found == pytest.approx(slow)
    assert max(found[:2]) < min(found[2:])
    assert found[3] < found[4], "of two the full path misreads, the less wrong one"
    assert math.isclose(found[1], 30.0, rel_tol=1e-6)
