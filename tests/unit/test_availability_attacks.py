"""V-Attack, verbose images and token counts through real views, on a LLaVA of random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attacks import Attack, AttackError, TokenCount, VAttack, Verbose
from attacks.token_count import FIXED
from targets.base import Batch, Knowledge
from targets.compression import FastV, PruMerge, SparseVLM, TokenSparseAttention, VisionZip
from targets.compression.base import Compressor
from targets.errors import KnowledgeError
from targets.lvlm import LVLM
from targets.scenes import build
from tests.fakes import FakeView, make_batch, pick

SEEDS = [1, 2, 3]
EPSILON = 16 / 255
FASTV = FastV(layer=2, retention=0.25)


@pytest.fixture(scope="module")
def target() -> LVLM:
    shape = build.Shape(width=32, mlp=32, heads=2, vision_layers=2, text_layers=3)
    return LVLM(build.build_model(shape, 0).float(), build.build_processor())


@pytest.fixture
def batch() -> Batch:
    levels = torch.randint(0, 256, (3, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    return Batch(
        ids=("a", "b", "c"),
        images=levels.float() / 255,
        questions=("what colour is the star ?", "is there a ring ?", "how many shapes ?"),
        answers=("red", "yes", "two"),
        options=(("blue", "red", "green"), ("yes", "no"), ("one", "two")),
    )


def run(target: LVLM, attack: Attack, batch: Batch, compressor: Compressor | None = None) -> Any:
    view = target.view(attack.needs, compressor)
    return attack(view, batch, EPSILON, list(range(len(batch.ids))))


# V-Attack ---------------------------------------------------------------------------------------


def test_v_attack_swaps_concepts_without_knowing_the_compression(
    target: LVLM, batch: Batch
) -> None:
    attack = VAttack(steps=20, judge_every=5, layers=2)
    assert not attack.knows_compression
    result = run(target, attack, batch)
    assert all(len(trace) == 5 for trace in result.loss)  # steps 0, 5, 10, 15 and 20
    assert all(trace[-1] < trace[0] - 0.02 for trace in result.loss)
    assert (result.forwards, result.backwards) == (22, 20)
    assert float(result.linf.max()) <= EPSILON


def test_v_attack_moves_masked_values_to_the_target_word(target: LVLM, batch: Batch) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX)
    attack = VAttack(steps=20, judge_every=5, layers=1, crop=1.0)
    result = run(target, attack, batch)
    source, other = view.concepts(batch.answers), view.concepts(("green", "no", "one"))

    def gain(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            (values,) = view.values(images, [-1], normalised=True)
            values = view.project(values)
        near = torch.nn.functional.cosine_similarity
        return near(values, other[:, None], dim=-1) - near(values, source[:, None], dim=-1)

    before, after = gain(batch.images), gain(result.images)
    most = before.quantile(0.5, dim=1)
    assert bool((after.quantile(0.5, dim=1) > most).all() or (after.mean(1) > before.mean(1)).all())


def test_v_attack_needs_a_target_and_says_for_which_samples(target: LVLM, batch: Batch) -> None:
    open_ended = replace(batch, options=(("blue", "red"), (), ("one", "two")))
    with pytest.raises(AttackError, match=r"no closed set of answers.*samples b\)") as caught:
        run(target, VAttack(steps=1), open_ended)
    assert caught.value.sample_ids == ("b",)
    with pytest.raises(AttackError, match="replace 'Two' by itself") as caught:
        run(target, VAttack(steps=1, source="Two", target="two"), pick(batch, 0))
    assert caught.value.sample_ids == ("a",)
    assert run(target, VAttack(steps=1, target="a ring"), open_ended).backwards == 1


def test_v_attack_says_what_a_family_lacks(
    target: LVLM, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from targets.errors import TargetError
    from targets.families.vision import VisionPass

    def none(*args: object, **kwargs: object) -> None:
        raise TargetError("the adapter of this family does not say where it makes values")

    monkeypatch.setattr(VisionPass, "values", none)
    with pytest.raises(AttackError, match="v_attack cannot work on this target: the adapter"):
        run(target, VAttack(steps=1), batch)


def test_v_attack_declares_all_it_reaches_for() -> None:
    view: Any = FakeView(Knowledge.ENCODER)
    assert view.values(make_batch(2).images, [0])[0].shape[0] == 2
    for name, argument in (("project", torch.zeros(1, 1, 16)), ("concepts", ("a",))):
        with pytest.raises(KnowledgeError, match="white_box"):
            getattr(view, name)(argument)


# Verbose ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["full", "compressed"])
def test_verbose_prolongs_answers_of_a_model_that_may_stop(
    target: LVLM, batch: Batch, path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what a random model says first ends its answer, it is made to say more."""
    view: Any = target.view(Knowledge.WHITE_BOX, FASTV)
    first = view.continuation(batch.images, batch.questions, length=1, path=path).ids[:, 0]
    monkeypatch.setitem(target._passes.__dict__, "ends", frozenset(first.tolist()))
    before = view.continuation(batch.images, batch.questions, length=8, path=path).real.sum(1)
    assert before.tolist() == [1, 1, 1]
    attack = Verbose(steps=40, refresh=5, length=8, path=path, alpha=4 / 255)
    assert attack.knows_compression == (path == "compressed")
    result = run(target, attack, batch, FASTV)
    after = view.continuation(result.images, batch.questions, length=8, path=path).real.sum(1)
    assert int(after.sum()) > int(before.sum())
    assert all(trace[-1] <= trace[0] for trace in result.loss)
    # 41 passes with gradients or at the end, 9 of them asked afresh.
    assert (result.forwards, result.backwards) == (50, 40)


def test_the_trace_of_verbose_is_the_length_it_reached(target: LVLM, batch: Batch) -> None:
    result = run(target, Verbose(steps=4, refresh=2, length=5), batch)
    view: Any = target.view(Knowledge.WHITE_BOX)
    said = view.continuation(result.images, batch.questions, length=5)
    lengths = said.real.sum(1).tolist()
    best = [min(trace) for trace in result.loss]
    assert [-length <= value <= 1 - length for length, value in zip(lengths, best, strict=True)]
    assert all(-n <= value <= 1 - n for n, value in zip(lengths, best, strict=True))


# Token counts -----------------------------------------------------------------------------------

VARYING: list[Compressor] = [
    PruMerge(),
    SparseVLM(variant="rank", retention=1.0),
    TokenSparseAttention(coverage=0.3),
]


@pytest.mark.parametrize("compressor", VARYING, ids=lambda one: one.name)
@pytest.mark.parametrize("direction", ["more", "fewer"])
def test_the_relaxed_count_moves_as_asked(
    target: LVLM, batch: Batch, compressor: Compressor, direction: Any
) -> None:
    attack = TokenCount(direction=direction, preserve="none", steps=8)
    assert attack.needs is Knowledge.COMPRESSED
    result = run(target, attack, batch, compressor)
    view: Any = target.view(Knowledge.COMPRESSED, compressor)
    with torch.no_grad():
        before = view.rank(batch.images, batch.questions).soft_count
        after = view.rank(result.images, batch.questions).soft_count
    assert float((after - before).sum()) * (1 if direction == "more" else -1) > 0
    assert attack.idle(compressor) is None


def test_more_outliers_are_really_kept(target: LVLM, batch: Batch) -> None:
    attack = TokenCount(preserve="none", steps=20)
    result = run(target, attack, batch, PruMerge())
    left = [
        target.answer(images, batch.questions, compressor=PruMerge(), max_new_tokens=1).left
        for images in (batch.images, result.images)
    ]
    assert left[0] is not None and left[1] is not None  # noqa: PT018
    assert int(left[1].sum()) > int(left[0].sum())


@pytest.mark.parametrize("preserve", ["full", "compressed"])
def test_the_answer_is_held_where_it_is_asked_for(
    target: LVLM, batch: Batch, preserve: Any
) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX, PruMerge())

    def moved(weight: float) -> float:
        attack = TokenCount(preserve=preserve, preserve_weight=weight, steps=8)
        images = run(target, attack, batch, PruMerge()).images
        with torch.no_grad():
            both = [
                view.answer_logprobs(one, batch.questions, batch.answers, path=preserve)[0]
                for one in (batch.images, images)
            ]
        return float((both[0].exp() * (both[0] - both[1])).sum(-1).mean())

    assert moved(1e4) < moved(1e-6)


@pytest.mark.parametrize("compressor", [FASTV, VisionZip(retention=0.25), PruMerge(keep_tokens=9)])
def test_a_fixed_budget_gives_the_clean_images_and_a_note(
    target: LVLM, batch: Batch, compressor: Compressor
) -> None:
    attack = TokenCount(steps=2)
    result = run(target, attack, batch, compressor)
    assert torch.equal(result.images, batch.images)
    assert result.backwards == 0
    assert result.notes == (f"nothing was changed: {FIXED}",)
    assert attack.idle(compressor) == FIXED


@pytest.mark.parametrize(
    "attack",
    [
        VAttack(steps=2, judge_every=1),
        Verbose(steps=2, refresh=1, length=4),
        TokenCount(steps=2, preserve="full"),
    ],
    ids=lambda attack: attack.name,
)
def test_a_sample_does_not_depend_on_its_neighbours(
    target: LVLM, batch: Batch, attack: Attack
) -> None:
    view = target.view(attack.needs, PruMerge())
    together = attack(view, batch, EPSILON, SEEDS)
    for row in range(3):
        alone = attack(view, pick(batch, row), EPSILON, SEEDS[row : row + 1])
        assert alone.loss[0] == pytest.approx(together.loss[row], rel=1e-3, abs=1e-3)
        # Batched kernels round differently, and a sign step turns that into whole levels.
        assert float((alone.images[0] == together.images[row]).float().mean()) > 0.97
