"""Scores of detectors against slow references written from their formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from defenses.activation_trajectory import (
    STAGES,
    ActivationTrajectory,
    areas,
    quarters,
    trapezoid,
)
from defenses.base import DefenseError
from defenses.disagreement_monitor import answer_gap, divergence, jsd
from defenses.feature_squeezing import FeatureSqueezing, median, non_local_means
from defenses.mahalanobis import Mahalanobis
from defenses.rank_volatility import rank_disagreement, set_disagreement


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Disagreement monitor -----------------------------------------------------------------------------


def slow_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_divergences() -> None:
    full, compressed = (normal(3, 7, seed=seed).log_softmax(-1) for seed in (1, 2))
    for row in range(3):
        p, q = full[row].exp().tolist(), compressed[row].exp().tolist()
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        assert divergence(full, compressed)[row].item() == pytest.approx(slow_kl(p, q))
        wanted = (slow_kl(p, m) + slow_kl(q, m)) / 2
        assert jsd(full, compressed)[row].item() == pytest.approx(wanted)


def test_divergences_at_their_ends() -> None:
    certain = torch.tensor([[0.0, -torch.inf]])
    assert jsd(certain, certain.flip(1)).item() == pytest.approx(math.log(2))
    assert jsd(certain, certain).item() == pytest.approx(0, abs=1e-12)
    assert divergence(certain, certain).item() == 0


def test_gap_of_an_answer() -> None:
    logprobs = normal(2, 3, 5, seed=4).log_softmax(-1)
    targets = torch.tensor([[1, 4, 0], [2, 3, 3]])
    real = torch.tensor([[True, True, True], [True, False, False]])
    found = answer_gap(logprobs, targets, real).tolist()
    for row in range(2):
        gaps = [
            max(logprobs[row, step].tolist()) - logprobs[row, step, targets[row, step]].item()
            for step in range(3)
            if real[row, step]
        ]
        assert found[row] == pytest.approx(max(gaps))
    own = logprobs.argmax(-1)
    assert answer_gap(logprobs, own, real).tolist() == [0, 0]


# Rank volatility ----------------------------------------------------------------------------------


def slow_order(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def test_disagreement_of_sets() -> None:
    views = [rand(2, 9, seed=seed) for seed in range(4)]
    kept = torch.tensor([3, 5])
    found = set_disagreement(views, [one.log() for one in views], kept)
    for row in range(2):
        sets = [set(slow_order(one[row].tolist())[: int(kept[row])]) for one in views]
        pairs = list(itertools.combinations(sets, 2))
        wanted = 1 - sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)
        assert found[row].item() == pytest.approx(wanted)


def test_disagreement_of_ranks() -> None:
    views = [rand(2, 9, seed=seed) for seed in range(3)]
    found = rank_disagreement(views, [one.log() for one in views])
    for row in range(2):
        rhos = []
        for a, b in itertools.combinations(views, 2):
            first, second = slow_order(a[row].tolist()), slow_order(b[row].tolist())
            apart = sum((first.index(i) - second.index(i)) ** 2 for i in range(9))
            rhos.append(1 - 6 * apart / (9 * (81 - 1)))
        assert found[row].item() == pytest.approx((1 - sum(rhos) / 3) / 2)


def test_equal_views_do_not_disagree_and_a_gradient_is_there() -> None:
    score = rand(2, 9).requires_grad_()
    same = [score, score * 1.0]
    kept = torch.tensor([3, 3])
    assert set_disagreement(same, same, kept).tolist() == [0, 0]
    assert rank_disagreement(same, same).tolist() == pytest.approx([0, 0], abs=1e-9)
    other = [score, rand(2, 9, seed=8)]
    for found in (set_disagreement(other, other, kept), rank_disagreement(other, other)):
        (slope,) = torch.autograd.grad(found.sum(), score)
        assert bool((slope.abs().sum(1) > 0).all())


# Feature squeezing --------------------------------------------------------------------------------


def mirror(index: int, size: int) -> int:
    index %= 2 * size
    return min(index, 2 * size - 1 - index)


@pytest.mark.parametrize("window", [2, 3])
def test_median(window: int) -> None:
    images = rand(2, 3, 5, 6)
    found = median(images, window)
    for b, c, y, x in itertools.product(range(2), range(3), range(5), range(6)):
        around = sorted(
            images[b, c, mirror(y + dy, 5), mirror(x + dx, 6)].item()
            for dy in range(-(window // 2), (window + 1) // 2)
            for dx in range(-(window // 2), (window + 1) // 2)
        )
        assert found[b, c, y, x].item() == around[window * window // 2]


def test_even_median_is_that_of_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    images = rand(1, 3, 6, 6)
    wanted = ndimage.median_filter(images.numpy(), size=(1, 1, 2, 2), mode="reflect")
    torch.testing.assert_close(median(images, 2), torch.from_numpy(wanted))


def test_non_local_means() -> None:
    images = (rand(1, 3, 6, 5) * 0.05 + 0.4).double()
    found = non_local_means(images, 3, 3, 4.0)

    def at(c: int, y: int, x: int) -> float:
        return float(images[0, c, mirror(y, 6), mirror(x, 5)])

    def twice(c: int, y: int, x: int, dy: int, dx: int) -> float:
        # A patch is cut from the mirrored picture; beyond its edge that picture is mirrored again.
        high, wide = 6 + 2, 5 + 2
        return at(c, mirror(y + 1 + dy, high) - 1, mirror(x + 1 + dx, wide) - 1)

    for y, x in itertools.product(range(6), range(5)):
        total, sums = 0.0, [0.0] * 3
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            apart = 0.0
            for py, px, c in itertools.product((-1, 0, 1), (-1, 0, 1), range(3)):
                apart += (twice(c, y + py, x + px, dy, dx) - at(c, y + py, x + px)) ** 2 / 27
            weight = math.exp(-apart * 255**2 / 16)
            total += weight
            for c in range(3):
                sums[c] += weight * twice(c, y, x, dy, dx)
        for c in range(3):
            assert found[0, c, y, x].item() == pytest.approx(sums[c] / total)


def test_the_largest_distance_counts() -> None:
    seen = {"distance": torch.tensor([[0.1, 0.3, 0.2], [2.0, 0.0, 1.0]])}
    assert FeatureSqueezing().judge(seen, {}).tolist() == pytest.approx([0.3, 2.0])


# Mahalanobis --------------------------------------------------------------------------------------


def slow_distance(fit: Tensor, value: Tensor, count: int) -> float:
    """By the eigenvectors of the covariance matrix."""
    mean = fit.mean(0)
    covariance = (fit - mean).T @ (fit - mean) / (len(fit) - 1)
    strengths, vectors = torch.linalg.eigh(covariance)
    total = 0.0
    for index in range(1, count + 1):
        along = float((value - mean) @ vectors[:, -index])
        total += along**2 / float(strengths[-index])
    return math.sqrt(total)


def test_mahalanobis() -> None:
    fit = {"cls": normal(30, 6, seed=1), "patch": normal(30, 4, seed=2) * 3 + 1}
    new = {"cls": normal(5, 6, seed=3) * 2, "patch": normal(5, 4, seed=4)}
    detector = Mahalanobis(dimensions=3)
    found = detector.judge(new, detector.fit(fit, {}, {}))
    for row in range(5):
        wanted = []
        for name in ("cls", "patch"):
            own = torch.tensor([slow_distance(fit[name], one, 3) for one in fit[name]])
            far = slow_distance(fit[name], new[name][row], 3)
            wanted.append((far - float(own.mean())) / float(own.std()))
        assert found[row].item() == pytest.approx(max(wanted), rel=1e-5)


def test_mahalanobis_chooses_and_refuses_dimensions() -> None:
    state = Mahalanobis().fit({"patch": normal(30, 50)}, {}, {})
    assert len(state["patch.variances"]) == 10  # a third of the samples
    flat = torch.zeros(30, 5, dtype=torch.float64)
    flat[:, 0] = torch.arange(30)
    assert len(Mahalanobis(dimensions=3).fit({"patch": flat}, {}, {})["patch.variances"]) == 1
    with pytest.raises(DefenseError, match="30 clean samples of width 5 do not fit 6 dimensions"):
        Mahalanobis(dimensions=6).fit({"patch": flat}, {}, {})
    with pytest.raises(DefenseError, match=r"raise calibration\.samples"):
        Mahalanobis().fit({"patch": flat[:2]}, {}, {})
    with pytest.raises(DefenseError, match="are the same"):
        Mahalanobis().fit({"patch": torch.ones(30, 5).double()}, {}, {})


# Activation trajectory ----------------------------------------------------------------------------

TAPS = {
    "vision.0.5000": 4,
    "vision.1.0000": 4,
    "projector.0.0000": 4,
    "projector.1.0000": 6,
    "language.0.2500": 6,
    "language.0.5000": 6,
    "language.1.0000": 6,
}


def observed(count: int, seed: int, shift: float = 0.0) -> dict[str, Tensor]:
    return {
        name: torch.nn.functional.normalize(normal(count, width, seed=seed + i) + shift, dim=-1)
        for i, (name, width) in enumerate(TAPS.items())
    }


@pytest.mark.parametrize("stage", [*STAGES, "mean"])
def test_activation_trajectory(stage: str) -> None:
    clean, noisy, attacked = observed(9, 10), observed(9, 30), observed(9, 50, 0.8)
    new = observed(4, 70, 0.4)
    detector = ActivationTrajectory(stage=stage)  # type: ignore[arg-type]
    found = detector.judge(new, detector.fit(clean, noisy, attacked))

    def z(name: str, values: Tensor) -> list[float]:
        negative = torch.cat([clean[name], noisy[name]])
        centre = negative.mean(0)
        direction = attacked[name].mean(0) - centre
        direction = direction / float((direction**2).sum()) ** 0.5
        own = [float((one - centre) @ direction) for one in negative]
        mean = sum(own) / len(own)
        spread = (sum((u - mean) ** 2 for u in own) / (len(own) - 1)) ** 0.5
        return [float((one - centre) @ direction) / spread for one in values]

    def area(part: str, values: dict[str, Tensor]) -> list[float]:
        names = sorted(name for name in TAPS if name.startswith(part))
        depths = [float(name.split(".", 1)[1]) for name in names]
        columns = [z(name, values[name]) for name in names]
        rows = []
        for row in range(len(columns[0])):
            total = sum(
                (columns[i][row] + columns[i + 1][row]) / 2 * (depths[i + 1] - depths[i])
                for i in range(len(names) - 1)
            )
            rows.append(total / (depths[-1] - depths[0]))
        return rows

    def score(part: str) -> list[float]:
        both = {name: torch.cat([clean[name], noisy[name]]) for name in TAPS}
        own = torch.tensor(area(part, both), dtype=torch.float64)
        return [(one - float(own.mean())) / float(own.std()) for one in area(part, new)]

    parts = STAGES if stage == "mean" else (stage,)
    scores = [score(part) for part in parts]
    wanted = [sum(column) / len(parts) for column in zip(*scores, strict=True)]
    assert found.tolist() == pytest.approx(wanted)


def test_a_trajectory_needs_references() -> None:
    some, one = observed(4, 1), observed(1, 2)
    with pytest.raises(DefenseError, match="1 attacked references; at least 2"):
        ActivationTrajectory().fit(some, some, one)
    with pytest.raises(DefenseError, match="0 noisy references"):
        ActivationTrajectory().fit(some, {}, some)


def test_taps() -> None:
    assert quarters(24) == [5, 11, 17, 23]
    assert quarters(32) == [7, 15, 23, 31]
    assert quarters(2) == [0, 1]
    assert quarters(1) == [0]
    values = torch.tensor([[2.0, 4.0]])
    assert trapezoid(values, [0.5, 1.0]).tolist() == [3.0]
    assert trapezoid(values[:, :1], [1.0]).tolist() == [2.0]
    flat = {name: torch.zeros(2, width).double() for name, width in TAPS.items()}
    state = ActivationTrajectory().fit(observed(5, 1), observed(5, 2), observed(5, 3))
    assert set(areas(flat, state)) == set(STAGES)
