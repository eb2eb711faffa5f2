"""Attacks in bfloat16 on models of several families: what is reduced, and what is not."""

from __future__ import annotations

import functools
from typing import Any

import families
import pytest
import tiny
import torch
from torch import Tensor

from attacks import APGD, CAA, CAGE, PGD, AttackError, MarginSplit, Suite, VEAttack
from attacks.base import Attack
from attacks.checks import reduced_precision
from attacks.descent import descend
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge
from targets.compression import FastV, VisionZip
from targets.errors import KnowledgeError
from targets.lvlm import LVLM
from targets.precision import ReducedView, attacking, exactly, is_reduced, obstacle
from tests.fakes import FakeView, make_batch

SOME = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl", "paligemma")
EPSILON = 8 / 255
SEEDS = [1, 2]
CPU = torch.device("cpu")


@functools.cache
def target(family: str) -> LVLM:
    return LVLM(*families.build(family))


def batch(count: int = 2) -> Batch:
    ids = tuple(str(number) for number in range(count))
    questions = ("is there a red circle ?", "how many ?")[:count]
    return Batch(ids, tiny.pictures(count), questions, ("yes", "two")[:count])


def seen_dtypes(model: LVLM, monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Of what every linear layer of the language model gives."""
    found: set[torch.dtype] = set()
    plain = torch.nn.Linear.forward

    def forward(self: Any, values: Tensor) -> Tensor:
        out = plain(self, values)
        found.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return found


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("path", ["full", "compressed"])
def test_passes_are_reduced_and_answers_are_not(
    family: str, path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = target(family), batch()
    plain: Any = model.view(Knowledge.WHITE_BOX, FastV(layer=1, retention=0.5))
    view: Any = ReducedView(plain, model.device)
    args = (samples.images, samples.questions)
    said, exact = plain.ask(*args, path=path), plain.answer_nll(*args, samples.answers, path=path)
    dtypes = seen_dtypes(model, monkeypatch)
    with attacking(view):
        found = view.answer_nll(*args, samples.answers, path=path)
        assert torch.bfloat16 in dtypes
        dtypes.clear()
        assert view.ask(*args, path=path) == said
        with exactly():
            assert torch.equal(view.answer_nll(*args, samples.answers, path=path), exact)
        assert dtypes == {torch.float32}
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)
    assert torch.equal(view.answer_nll(*args, samples.answers, path=path), exact)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=2, path="both"),
        APGD(steps=2, path="compressed", loss="ce", preserve_weight=1.0),
        CAA(steps=2, preset="strict_preserve"),
        CAGE(steps=2),
        VEAttack(steps=2),
        MarginSplit(steps=2),
        PGD(steps=2, path="compressed", stop_when_broken=True),
    ],
    ids=lambda one: one.name,
)
def test_the_image_is_judged_in_full_precision(family: str, attack: Attack) -> None:
    model, samples = target(family), batch()
    compressor = FastV(layer=1, retention=0.5)
    plain: Any = model.view(attack.needs, compressor)
    result = attack(ReducedView(plain, model.device), samples, EPSILON, SEEDS)
    assert not is_reduced()
    own = attack(plain, samples, EPSILON, SEEDS)
    assert [len(trace) for trace in result.loss] >= [2, 2]
    assert float(result.linf.max()) <= EPSILON
    if not getattr(attack, "stop_when_broken", False) and attack.name != "margin_split":
        assert [len(trace) for trace in result.loss] == [len(one) + 1 for one in own.loss]
        assert result.forwards > own.forwards
    if isinstance(attack, PGD):
        weights = {"full": attack.full_weight, "compressed": 1.0}
        wanted = torch.zeros(2)
        for path in ("full", "compressed") if attack.path == "both" else (attack.path,):
            nll = plain.answer_nll(result.images, samples.questions, samples.answers, path=path)
            wanted -= weights[path] * nll
        assert [trace[-1] for trace in result.loss] == pytest.approx(wanted.tolist(), rel=1e-4)


def test_the_same_image_whoever_is_beside_it_and_twice() -> None:
    model, samples = target("llava"), batch()
    view = ReducedView(model.view(Knowledge.WHITE_BOX, VisionZip(retention=0.5)), model.device)
    attack = PGD(steps=3, path="compressed")
    one, two = (attack(view, samples, EPSILON, SEEDS) for _ in range(2))
    assert torch.equal(one.images, two.images)
    assert one.loss == two.loss


def test_the_view_grants_what_the_view_inside_grants() -> None:
    model = target("llava")
    view: Any = ReducedView(model.view(Knowledge.ENCODER, None), model.device)
    assert view.knowledge is Knowledge.ENCODER
    assert hasattr(view, "encode")
    with pytest.raises(KnowledgeError, match="needs knowledge 'white_box'"):
        view.answer_nll(batch().images, batch().questions, batch().answers)
    with pytest.raises(KnowledgeError):
        view.encode.__closure__  # noqa: B018 - reaching is what is tested
    with pytest.raises(AttackError, match="needs a view of knowledge 'white_box'"):
        PGD(steps=1)(view, batch(), EPSILON, SEEDS)


class Coarse(FakeView):
    """A picture is worth ten times as much in reduced precision as it is in full precision."""

    def answer_nll(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = images.flatten(1).mean(1)
        return found if torch.is_autocast_enabled("cpu") else 0.1 * found


def test_the_check_fires_where_the_descent_was_rounding() -> None:
    samples = make_batch(2)
    result = PGD(steps=5)(ReducedView(Coarse(), CPU), samples, EPSILON, SEEDS)  # type: ignore[arg-type]
    for trace, checks in zip(result.loss, result.checks, strict=True):
        (message,) = [one for one in checks if one.startswith("reduced-precision:")]
        assert "Set engine.attack_precision to float32" in message
        brightness = -min(trace[:-1])
        assert trace[-1] == pytest.approx(-0.1 * brightness, abs=1e-4)
    plain = PGD(steps=5)(Coarse(), samples, EPSILON, SEEDS)  # type: ignore[arg-type]
    assert not [one for row in plain.checks for one in row if one.startswith("reduced")]
    whole = Suite(members=("pgd_full",), goal="full", steps=2)
    (told, *_) = whole(ReducedView(Worse(), CPU), samples, EPSILON, SEEDS).checks  # type: ignore[arg-type]
    assert any(one.startswith("reduced-precision:") for one in told)


class Worse(Coarse):
    """Right at first, so that a suite works on it."""

    def ask(self, images: Tensor, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        return tuple("yes" if row % 2 else "no" for row in range(len(images)))


@pytest.mark.parametrize(
    ("losses", "reduced", "exact", "fires"),
    [
        ([0.0, -1.0], -1.0, -1.0, False),
        ([0.0, -1.0], -1.0, -0.951, False),
        ([0.0, -1.0], -1.0, -0.949, True),
        ([0.0, -1.0], -1.0, -7.0, False),  # better than it seemed
        ([-64.0, -64.0], -64.0, -63.6, False),  # less than bfloat16 tells apart
        ([-64.0, -64.0], -64.0, -63.4, True),
        ([float("nan"), 0.0, -1.0], -1.0, -0.9, True),
    ],
)
def test_what_is_tolerated(losses: list[float], reduced: float, exact: float, fires: bool) -> None:
    assert (reduced_precision(losses, reduced, exact) is not None) == fires


def test_weights_that_are_not_float32_are_refused() -> None:
    plain, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert obstacle([plain], CPU) is None
    assert "bfloat16 weights" in (obstacle([plain, half], CPU) or "")
    assert "has no autocast" in (obstacle([plain], torch.device("meta")) or "")


def test_outside_of_an_attack_nothing_is_reduced() -> None:
    samples = make_batch(2)
    view: Any = ReducedView(Coarse(), CPU)  # type: ignore[arg-type]
    low = view.answer_nll(samples.images, samples.questions, samples.answers)
    assert torch.equal(low, 0.1 * samples.images.flatten(1).mean(1))
    found = descend(
        lambda images, step: -view.answer_nll(images, samples.questions, samples.answers),
        samples,
        PGD(steps=2).budget(EPSILON),
        SeedBank(SEEDS),
    )
    assert found.exact is None
