"""ToMe against tokens in lists: merging in the layers of a tower, and in front of the LVLM."""

from __future__ import annotations

from typing import Any

import pytest
import slow_tower
import torch
from seen import seen
from torch import Tensor

from targets.compression import ToMe
from targets.compression.base import Selection
from targets.compression.flow import Step, Tokens
from targets.compression.tome_matching import counts_after, described, matched, repeated, unit
from targets.errors import CompressionError


def test_published_counts_of_llava() -> None:
    for merges, left in ((16, 208), (17, 185), (19, 139), (20, 116), (22, 70), (23, 47)):
        counts = counts_after(576, left, 23, "constant")
        assert counts == tuple(576 - merges * (layer + 1) for layer in range(23))


@pytest.mark.parametrize("schedule", ["constant", "decreasing", "increasing"])
def test_counts_reach_every_budget_within_halves(schedule: Any) -> None:
    for patches, layers in ((36, 3), (144, 4), (5, 1), (1, 2), (576, 23)):
        lowest = -(-patches // 2**layers)
        for final in range(lowest, patches + 1):
            counts = counts_after(patches, final, layers, schedule)
            assert counts[-1] == final
            for before, after in zip((patches, *counts), counts, strict=False):
                assert before - before // 2 <= after <= before
    with pytest.raises(CompressionError, match=r"leave 5 of 36, not 4"):
        counts_after(36, 4, 3, schedule)


METRICS = {
    "random": torch.randn(1, 11, 4, generator=torch.Generator().manual_seed(0)),
    "all equal": torch.ones(1, 11, 4),
    "pairs": torch.eye(4)[torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2])][None],
    "opposite": torch.tensor([1.0, -1.0]).repeat(6)[:11].view(1, 11, 1).expand(1, 11, 4),
}


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("merges", [0, 1, 3, 5])
def test_matching_of_ties_and_random_tokens(name: str, lead: int, merges: int) -> None:
    metric = METRICS[name]
    values = torch.randn(1, 11, 3, generator=torch.Generator().manual_seed(1))
    tokens = Tokens.whole(1, 11 - lead, lead, metric.device)
    step = matched(unit(metric), tokens, torch.tensor([merges]), lead)
    listed = [slow_tower.Token(values[0, n], n - lead, [n - lead]) for n in range(11)]
    truth, _ = slow_tower.merge_step(listed, metric[0], merges)
    if step is None:
        assert merges == 0
        return
    assert step.after.place[0].tolist() == [token.place for token in truth]
    made = torch.stack([token.value for token in truth])
    assert torch.allclose(step.averaged(values)[0], made, atol=1e-6)
    assert step.after.size[0].tolist() == [len(token.members) for token in truth]


VALID = torch.ones(3, 12, dtype=torch.bool)
VALID[1, [0, 3, 4, 9]] = False
VALID[2, 1:] = False


def ragged(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 12, 5, generator=generator, dtype=torch.float64)


def in_front(features: Tensor, counts: list[int], valid: Tensor, kept: Any = None) -> Any:
    one, sight = ToMe(retention=0.5, variant="post"), seen(features, counts, valid=valid)
    scores = one.score(sight)
    selection = one.select(scores, sight) if kept is None else one.complete(kept, sight)
    return scores, selection, one.merge(selection, sight)


@pytest.mark.parametrize("counts", [[6, 4, 1], [1, 1, 1], [11, 8, 1], [12, 3, 1], [2, 7, 1]])
def test_merging_in_front_of_the_language_model(counts: list[int]) -> None:
    features = ragged()
    features[~VALID] = torch.nan  # whatever stands there must not matter
    scores, selection, merged = in_front(features, counts, VALID)
    assert merged.valid.sum(1).tolist() == counts
    assert bool(scores.score.isfinite().all())
    for image in range(3):
        places = VALID[image].nonzero().flatten()
        tokens, score = slow_tower.tome_post(features[image][places], counts[image])
        real = merged.valid[image]
        assert merged.source[image][real].tolist() == [int(places[t.place]) for t in tokens]
        truth = torch.stack([token.value for token in tokens])
        assert torch.allclose(merged.features[image][real], truth, atol=1e-9)
        assert sorted(merged.source[image][real].tolist()) == (
            selection.kept[image].nonzero().flatten().tolist()
        )
        truth = torch.tensor(score).double()
        assert torch.allclose(scores.score[image][places], truth, atol=1e-6)


def test_images_do_not_change_one_another() -> None:
    counts, features = [5, 4, 1], ragged(3)
    scores, selection, merged = in_front(features, counts, VALID)
    for image in range(3):
        rows = slice(image, image + 1)
        one, chosen, alone = in_front(features[rows], counts[rows], VALID[rows])
        assert torch.equal(chosen.kept[0], selection.kept[image])
        real = alone.features[0][alone.valid[0]]
        assert torch.allclose(real, merged.features[image][merged.valid[image]], atol=1e-12)
        assert torch.allclose(one.score[0], scores.score[image], atol=1e-12)


def test_a_selection_is_repeated_on_other_tokens() -> None:
    counts = [5, 4, 1]
    _, selection, first = in_front(ragged(4), counts, VALID)
    sight = seen(ragged(5), counts, valid=VALID)
    stacked = Selection.stack([selection.row(image) for image in range(3)])
    wide = torch.nn.functional.pad(stacked.kept, (0, 2))
    assert torch.equal(wide[:, :12], selection.kept)
    second = ToMe(retention=0.5, variant="post").merge(stacked, sight)
    assert torch.equal(first.source, second.source)
    assert not torch.allclose(first.features, second.features)


def test_a_bare_set_draws_everything_to_it() -> None:
    features, kept = ragged(6)[:1], torch.zeros(1, 12, dtype=torch.bool)
    kept[0, [2, 7, 8]] = True
    _, _, merged = in_front(features, [6], VALID[:1], kept)
    groups: dict[int, list[int]] = {2: [], 7: [], 8: []}
    for place in range(12):
        cosine = {
            at: float(torch.cosine_similarity(features[0, place], features[0, at], dim=0))
            for at in groups
        }
        groups[place if place in groups else max(cosine, key=lambda at: cosine[at])].append(place)
    assert sorted(merged.source[0].tolist()) == [2, 7, 8]
    for token, place in zip(merged.features[0], merged.source[0].tolist(), strict=True):
        assert torch.allclose(token, features[0, groups[place]].mean(0), atol=1e-9)


def test_description_and_repetition_are_inverse() -> None:
    generator = torch.Generator().manual_seed(8)
    tokens, steps = Tokens.whole(2, 13, 0, torch.device("cpu")), []
    for stage, merges in enumerate((5, 0, 3)):
        metric = unit(torch.randn(2, tokens.place.shape[1], 4, generator=generator))
        step = matched(metric, tokens, torch.tensor([merges, max(0, merges - 1)]), 0)
        if step is not None:
            steps.append((stage, step))
            tokens = step.after
    selection = described(steps, tokens.survivors(), 3)
    again: Tokens = Tokens.whole(2, 13, 0, torch.device("cpu"))
    for stage in range(3):
        step = repeated(selection, stage, again)
        assert (step is None) == (stage == 1)
        again = again if step is None else step.after
    assert torch.equal(again.where, tokens.where)
    assert torch.equal(again.place, tokens.place)


def test_score_gradient_in_front_agrees_with_finite_differences() -> None:
    features, weight = ragged(9).requires_grad_(), ragged(10)[:, :, 0]

    def loss(x: Tensor) -> Tensor:
        return (in_front(x, [5, 4, 1], VALID)[0].score * weight * VALID).sum()

    (gradient,) = torch.autograd.grad(loss(features), features)
    direction, step = ragged(11), 1e-6
    with torch.no_grad():
        slope = (loss(features + step * direction) - loss(features - step * direction)) / 2 / step
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5)
    assert abs(float(slope)) > 1e-2


def test_removed_tokens_are_nowhere() -> None:
    tokens = Tokens.whole(1, 4, 1, torch.device("cpu"))
    step = Step.of(tokens, torch.tensor([[0, -1, 2, 2, 4]]))
    assert step.after.place.tolist() == [[-1, 1, 3]]
    assert step.after.where.tolist() == [[-1, 1, 1, 2]]
    assert step.after.size.tolist() == [[1, 2, 1]]
