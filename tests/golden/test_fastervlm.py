"""FasterVLM and VisPruner against slow references, round by round."""

from __future__ import annotations

import pytest
import torch
from seen import normal, places, random_pass, seen, seen_by_tower, tiled, vision_pass
from torch import Tensor

from targets.compression import VisionZip
from targets.compression.fastervlm import FasterVLM
from targets.compression.trace import choose
from targets.compression.vispruner import VisPruner, distinct
from targets.errors import CompressionError


def by_score(score: Tensor) -> list[int]:
    values = score.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 5, 24])
def test_fastervlm_is_the_top_of_the_head_mean(seed: int, count: int) -> None:
    vision = random_pass(2, 25, seed=seed)
    _, selection = choose(FasterVLM(keep_tokens=count), seen_by_tower(vision, count))
    for image in range(2):
        mean = vision.attention()[image].double().mean(0)
        assert places(selection.kept[image]) == set(by_score(mean)[:count])


def test_fastervlm_keeps_visionzips_dominant_set() -> None:
    """Sum and mean over heads rank alike."""
    vision = random_pass(3, 36, seed=5)
    total = 16
    patches, _ = VisionZip(keep_tokens=total).split(total, has_cls=True)
    _, zipped = choose(VisionZip(keep_tokens=total), seen_by_tower(vision, total))
    _, faster = choose(FasterVLM(keep_tokens=patches), seen_by_tower(vision, patches))
    assert torch.equal(zipped.kept, faster.kept)


def test_fastervlm_shares_out_among_tiles() -> None:
    vision = random_pass(3, 16, seed=2, tiles=(3,))
    one = seen_by_tower(vision, 11, layouts=[tiled((4, 4), (4, 4), (4, 4))])
    _, selection = choose(FasterVLM(keep_tokens=11), one)
    assert selection.kept.view(3, 16).sum(1).tolist() == [4, 4, 3]
    for tile, count in enumerate((4, 4, 3)):
        paid = vision.attention()[0].mean(0)[16 * tile : 16 * tile + 16]
        assert places(selection.kept[0, 16 * tile : 16 * tile + 16]) == set(by_score(paid)[:count])


def test_fastervlm_of_a_tower_without_cls_takes_what_patches_receive() -> None:
    vision = random_pass(1, 9, seed=3, has_cls=False)
    scores, _ = choose(FasterVLM(keep_tokens=2), seen_by_tower(vision, 2))
    here = vision.layers[1]
    full = (here.queries @ here.keys.transpose(2, 3) * vision.scaling).softmax(-1)
    assert torch.allclose(scores.score[0], full[0].mean(0).mean(0), atol=1e-6)


def test_both_need_the_tower() -> None:
    for one in (FasterVLM(keep_tokens=2), VisPruner(keep_tokens=2)):
        with pytest.raises(CompressionError, match=one.name):
            one.score(seen(normal(1, 4, 3), 2))


def slow_vispruner(features: Tensor, score: Tensor, total: int, important: float) -> set[int]:
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    order = by_score(score)
    first = int(total * important)
    rest = order[first:]
    while (gone := min(8, len(rest) - (total - first))) > 0:
        even, odd = rest[::2], rest[1::2]
        alike = {i: max(float(unit[i] @ unit[j]) for j in odd) for i in even}
        even = sorted(even, key=lambda i: -alike[i])
        rest = even[gone:] + odd
    return set(order[:first]) | set(rest)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("total", "important"), [(1, 0.5), (7, 0.5), (20, 0.75), (35, 0.0)])
def test_vispruner(seed: int, total: int, important: float) -> None:
    vision = random_pass(2, 36, seed=seed)
    one = seen_by_tower(vision, total)
    _, selection = choose(VisPruner(keep_tokens=total, important=important), one)
    for image in range(2):
        mean = vision.attention()[image].mean(0)
        truth = slow_vispruner(one.features[image], mean, total, important)
        assert places(selection.kept[image]) == truth
        assert len(truth) == total


def test_vispruner_rounds_by_hand() -> None:
    """Eleven candidates on a circle, one wanted: 8 can go in a round, but only evens go."""
    angles = torch.tensor([0, 1, 40, 42, 90, 95, 150, 158, 200, 230, 300.0]).deg2rad()
    unit = torch.stack([angles.cos(), angles.sin()], 1)[None]
    left, real = torch.arange(11)[None], torch.ones(1, 11, dtype=torch.bool)
    # Evens 0, 2, 4, 6, 8, 10 against odds: apart by 1, 2, 5, 8, 30, 59 degrees (10 to 1 is 61).
    kept, there = distinct(unit, left, real, torch.tensor([9]))
    assert kept[there].tolist() == [4, 6, 8, 10, 1, 3, 5, 7, 9]
    # Six would be left to remove in the first round: all evens go, and the second compares
    # 1, 5, 9 with 3, 7: apart by 41, 53 and 72 degrees.
    kept, there = distinct(unit, left, real, torch.tensor([4]))
    assert kept[there].tolist() == [5, 9, 3, 7]


def test_vispruner_prefers_the_first_of_equals() -> None:
    hidden = torch.ones(1, 5, 4)
    flat = torch.zeros(1, 1, 5, 4)
    one = seen_by_tower(vision_pass(hidden, flat, flat), 2)
    _, selection = choose(VisPruner(keep_tokens=2), one)
    # Token 0 is important; of 1, 2, 3 (all alike) the even ones 1 and 3 go.
    assert places(selection.kept[0]) == {0, 2}
