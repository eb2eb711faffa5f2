"""Protected compressors keep every promise of a compressor, and attacks really go through them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from shifted import shifted_scores
from torch import Tensor

from attacks.caa import CAA
from attacks.cage import CAGE
from attacks.cira import CIRA
from attacks.pgd import PGD
from defenses.adaptive import defended, mean_of, passes_of
from defenses.base import AdaptiveRoute, DefenseError, InputDefense
from defenses.guard import Guard
from defenses.hybrid import Hybrid
from defenses.oracle import Oracle
from defenses.pai import PAI
from defenses.random_floor import RandomFloor
from defenses.rank_fusion import RankFusion
from defenses.resize_pad import ResizePad
from defenses.sap import TokenRestoration
from defenses.score_smoothing import ScoreSmoothing
from defenses.selection import Protected, SelectionDefense, rank_quantiles
from defenses.sid import SID
from defenses.stack import Stack
from defenses.translation_consensus import TranslationConsensus
from defenses.vasparse import VASparse
from targets import passes
from targets.base import Batch, Knowledge, Ranking
from targets.compression import FasterVLM, FastV, VisionZip, compress
from targets.compression.base import Compressor
from targets.compression.pipeline import Pipeline
from targets.compression.scoring import top_k_mask
from targets.errors import CompressionError, KnowledgeError
from targets.lvlm import LVLM

COUNT = 2
QUESTIONS = tiny.QUESTIONS[:COUNT]
ANSWERS = tiny.ANSWERS[:COUNT]
SEEDS = (4, 9)
DEFENSES: dict[str, SelectionDefense] = {
    "consensus": TranslationConsensus(),
    "random consensus": TranslationConsensus(views="random", number=3),
    "smoothing": ScoreSmoothing(copies=2),
    "smoothed indicator": ScoreSmoothing(copies=2, statistic="indicator"),
    "fusion": RankFusion(),
    "vote": RankFusion(fusion="vote"),
    "hybrid": Hybrid(),
    "floor": RandomFloor(rho=0.4),
    "restoration": TokenRestoration(rho=0.4),
}
NOTHING: dict[str, SelectionDefense] = {
    "consensus": TranslationConsensus(shift=0),
    "smoothing": ScoreSmoothing(sigma=0),
    "fusion": RankFusion(layers=()),
    "hybrid": Hybrid(diverse=0),
    "floor": RandomFloor(rho=0),
    "restoration": TokenRestoration(rho=0),
}
SOME = ("fastv", "visionzip", "vispruner", "hired", "divprune", "tome post")


@pytest.fixture(scope="module")
def target() -> LVLM:
    return LVLM(tiny.build_model(), tiny.build_processor())


@pytest.fixture
def images() -> Tensor:
    return tiny.pictures(COUNT, seed=3)


@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize("kind", SOME)
def test_right_or_refused(name: str, kind: str, target: LVLM, images: Tensor) -> None:
    """An equal number of tokens, no influence of neighbours, gradients, and the swap test."""
    defense, plain = DEFENSES[name], tiny.COMPRESSORS[kind]
    reason = defense.refuses(plain)
    if reason is not None:
        with pytest.raises(DefenseError, match="does not go with compressor"):
            defense.protect(plain)
        return
    one = defense.protect(plain, salt=5)
    base = target.answer(images, QUESTIONS, compressor=plain, seeds=SEEDS, max_new_tokens=2)
    found = target.answer(images, QUESTIONS, compressor=one, seeds=SEEDS, max_new_tokens=2)
    assert found.kept is not None
    assert base.kept is not None
    assert found.kept.sum(1).tolist() == base.kept.sum(1).tolist()
    assert found.left is not None
    assert found.left.tolist() == (base.left.tolist() if base.left is not None else None)
    alone = target.answer(
        images[1:], QUESTIONS[1:], compressor=one, seeds=SEEDS[1:], max_new_tokens=2
    )
    assert torch.equal(alone.kept[0], found.kept[1])  # type: ignore[index]
    swapped = target.answer(
        images.flip(0),
        QUESTIONS,
        compressor=one,
        kept=found.selection,
        seeds=SEEDS,
        max_new_tokens=1,
    )
    assert torch.equal(swapped.kept, found.kept)  # type: ignore[arg-type]
    live = images.clone().requires_grad_()
    view: Any = target.view(Knowledge.WHITE_BOX, one)
    ranking = view.rank(live, QUESTIONS)
    assert torch.equal(ranking.kept.sum(1), found.kept.sum(1)) or plain.merges
    loss = view.answer_nll(live, QUESTIONS, ANSWERS, path="compressed", straight_through=True)
    for value in (ranking.log_score.square().sum(), loss.sum()):
        (gradient,) = torch.autograd.grad(value, live, retain_graph=True)
        assert bool(gradient.isfinite().all())
        assert bool((gradient.flatten(1).abs().amax(1) > 0).all())


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("kind", ["fastv", "visionzip"])
def test_at_nothing_it_is_no_defence(name: str, kind: str, target: LVLM, images: Tensor) -> None:
    plain = tiny.COMPRESSORS[kind]
    one = NOTHING[name].protect(plain)
    base = target.answer(images, QUESTIONS, compressor=plain, max_new_tokens=3)
    found = target.answer(images, QUESTIONS, compressor=one, max_new_tokens=3)
    assert found.texts == base.texts
    assert torch.equal(found.kept, base.kept)  # type: ignore[arg-type]
    assert torch.equal(found.score, base.score)  # type: ignore[arg-type]


@pytest.mark.parametrize("plain", [FasterVLM(keep_tokens=9), FastV(layer=2, keep_tokens=9)])
def test_consensus_of_the_whole_model(plain: Compressor, target: LVLM, images: Tensor) -> None:
    """Four pictures ranked one by one, moved back by the middle of two tokens, top K."""
    found = [
        rank_quantiles(score, torch.ones_like(score, dtype=torch.bool))
        for score in shifted_scores(target, plain, images, QUESTIONS)
    ]
    wanted = torch.stack(found).mean(0)
    one = TranslationConsensus().protect(plain)
    answered = target.answer(images, QUESTIONS, compressor=one, max_new_tokens=1)
    torch.testing.assert_close(answered.score, wanted)
    assert torch.equal(answered.kept, top_k_mask(wanted, 9))  # type: ignore[arg-type]


def test_features_are_those_of_the_picture_itself(target: LVLM, images: Tensor) -> None:
    plain = VisionZip(keep_tokens=9)
    one = TranslationConsensus().protect(plain)
    rankings = [
        target.view(Knowledge.COMPRESSED, c).rank(images, QUESTIONS)  # type: ignore[attr-defined]
        for c in (plain, one)
    ]
    assert torch.equal(rankings[0].features, rankings[1].features)
    assert not torch.equal(rankings[0].kept, rankings[1].kept)


def test_views_are_ranked_in_one_batch(target: LVLM, images: Tensor) -> None:
    runs: list[int] = []
    tower = target.family.model.model.vision_tower
    handle = tower.register_forward_pre_hook(
        lambda m, a, k: runs.append(len(k.get("pixel_values", a[0] if a else ()))),
        with_kwargs=True,
    )
    one = TranslationConsensus().protect(VisionZip(keep_tokens=9))
    target.answer(images, QUESTIONS, compressor=one, max_new_tokens=1)
    handle.remove()
    assert runs == [3 * COUNT, COUNT]


@pytest.mark.parametrize(
    ("plain", "says"),
    [
        (Pipeline(stages=(VisionZip(keep_tokens=9),)), "made of several"),
        (tiny.COMPRESSORS["pyramiddrop"], "drops tokens at"),
        (tiny.COMPRESSORS["tome"], "stage tower"),
        (tiny.COMPRESSORS["pool"], "what it merges is its own choice"),
    ],
)
def test_what_has_no_meaning_is_refused(plain: Compressor, says: str) -> None:
    with pytest.raises(DefenseError, match=says):
        RandomFloor().protect(plain)


@pytest.mark.parametrize("kind", sorted(tiny.COMPRESSORS))
def test_consensus_goes_with_what_ranks_by_attention(kind: str) -> None:
    plain = tiny.COMPRESSORS[kind]
    fits = {"fastv", "visionzip", "fastervlm", "vispruner", "hired"}
    assert (TranslationConsensus().refuses(plain) is None) == (plain.name in fits)


def test_a_session_of_ones_own_says_what_is_missing(target: LVLM) -> None:
    one = TranslationConsensus().protect(VisionZip(keep_tokens=9))
    ids = torch.tensor([tiny.rendered(QUESTIONS[0])])
    with (
        pytest.raises(CompressionError, match="has not looked at these pictures"),
        compress(target.family.model, one),
        torch.no_grad(),
    ):
        target.family.model(input_ids=ids, pixel_values=tiny.normalised(tiny.pictures(1)))


# Attacks that know the defence ------------------------------------------------------------------


def batch(images: Tensor) -> Batch:
    ids = tuple(f"s{i}" for i in range(COUNT))
    return Batch(ids=ids, images=images, questions=QUESTIONS, answers=ANSWERS)


def through(
    target: LVLM, defense: Any, needs: Knowledge, plain: Compressor | None, draws: int = 2
) -> Any:
    return defended(
        lambda c: target.view(needs, c),
        needs,
        defense,
        compressor=plain,
        layout=target.layout,
        draws=draws,
    )


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Compressor]:
    """The compressors of all sessions opened by passes, those that rank views aside."""
    found: list[Compressor] = []
    real = passes.compress

    def spy(model: Any, compressor: Compressor, **more: Any) -> Any:
        found.append(compressor)
        return real(model, compressor, **more)

    monkeypatch.setattr(passes, "compress", spy)
    return found


@pytest.mark.parametrize("name", ["consensus", "smoothing", "fusion", "hybrid", "floor"])
def test_caa_goes_through_the_defence(
    name: str, target: LVLM, images: Tensor, opened: list[Compressor]
) -> None:
    defense, plain = DEFENSES[name], VisionZip(keep_tokens=9)
    attack = CAA(steps=2)
    view = through(target, defense, attack.needs, plain)
    found = attack(view, batch(images), 16 / 255, SEEDS)
    draws = 2 if defense.draws else 1
    calls = (1 + 2 + 1) * draws  # the clean ranking, two steps, the last iterate
    protected = [one for one in opened if isinstance(one, Protected)]
    assert len(protected) == calls
    assert len(opened) == calls * (2 if defense.looks else 1)
    if draws > 1:
        assert len({one.salt for one in protected}) == calls, "every call has draws of its own"
    assert found.forwards == (1 + 2 + 1) * passes_of(defense, 2)
    assert found.backwards == 2 * passes_of(defense, 2)
    blind = attack(target.view(attack.needs, plain), batch(images), 16 / 255, SEEDS)
    if name != "floor":  # its ranking is the compressor's own; which tokens it draws, nobody knows
        assert not torch.equal(found.images, blind.images)


def test_an_imagined_compressor_is_protected_too(
    target: LVLM, images: Tensor, opened: list[Compressor]
) -> None:
    view = through(target, RankFusion(), Knowledge.WHITE_BOX, None)
    view.rank(images, QUESTIONS, under=FastV(layer=1, keep_tokens=9))
    assert [type(one) for one in opened] == [Protected]


def test_a_compressor_that_does_not_fit_is_refused_at_once(target: LVLM) -> None:
    with pytest.raises(DefenseError, match="does not go with compressor divprune"):
        through(target, RankFusion(), Knowledge.COMPRESSED, tiny.COMPRESSORS["divprune"])
    with pytest.raises(DefenseError, match="names no route"):
        through(target, Oracle(), Knowledge.COMPRESSED, VisionZip(keep_tokens=9))


def test_encoder_attacks_see_the_consensus_of_the_tower(target: LVLM, images: Tensor) -> None:
    defense = TranslationConsensus(views="random", number=3)
    plain: Any = target.view(Knowledge.ENCODER)
    one = through(target, defense, Knowledge.ENCODER, None)
    ours, theirs = one.layers(images, (-1,))[0], plain.layers(images, (-1,))[0]
    torch.testing.assert_close(ours.hidden, theirs.hidden)
    assert not torch.allclose(ours.score, theirs.score)
    assert ours.score.shape == theirs.score.shape
    assert torch.equal(
        through(target, TranslationConsensus(shift=0), Knowledge.ENCODER, None)
        .layers(images, (-1,))[0]
        .score,
        theirs.score,
    )
    attack = CAGE(steps=2)
    found = attack(through(target, defense, Knowledge.ENCODER, None), batch(images), 8 / 255, SEEDS)
    blind = attack(plain, batch(images), 8 / 255, SEEDS)
    assert found.backwards == 2 * 3 * 2
    assert not torch.equal(found.images, blind.images)


def test_cira_takes_its_published_form_against_public_views() -> None:
    attack = CIRA(steps=3)
    found = attack.against("translation_consensus", {"views": "public", "shift": None})
    assert found == CIRA(steps=3, views="translations")
    found = attack.against("translation_consensus", {"views": "public", "shift": 5})
    assert found == CIRA(steps=3, views="translations", shift=5)
    for defense, options in (
        ("translation_consensus", {"views": "random", "shift": None}),
        ("translation_consensus", {"views": "public", "shift": 0}),
        ("score_smoothing", {}),
    ):
        assert attack.against(defense, options) is None
    assert PGD().against("translation_consensus", {"views": "public"}) is None


def test_an_input_defence_is_in_front_of_every_call(target: LVLM, images: Tensor) -> None:
    defense = ResizePad(smallest=0.6)
    plain: Any = target.view(Knowledge.WHITE_BOX, VisionZip(keep_tokens=9))
    shown: list[Tensor] = []

    class Spy(ResizePad):
        def transform(self, images: Tensor, generators: Any) -> Tensor:
            shown.append(super().transform(images, generators))
            return shown[-1]

    one = through(target, Spy(smallest=0.6), Knowledge.WHITE_BOX, VisionZip(keep_tokens=9), 3)
    live = images.clone().requires_grad_()
    for path in ("full", "compressed"):
        shown.clear()
        found = one.answer_nll(live, QUESTIONS, ANSWERS, path=path)
        parts = [plain.answer_nll(part, QUESTIONS, ANSWERS, path=path) for part in shown]
        assert len(shown) == 3
        assert not torch.equal(shown[0], shown[1])
        torch.testing.assert_close(found, torch.stack(parts).mean(0))
        (gradient,) = torch.autograd.grad(found.sum(), live)
        assert bool((gradient.flatten(1).abs().amax(1) > 0).all())
    shown.clear()
    one.ask(images, QUESTIONS)
    assert len(shown) == 1, "a deployed target draws once a question"
    assert one.passes_in("rank", {}) == passes_of(defense, 3) == 3
    attack = PGD(steps=2)
    view = through(target, defense, attack.needs, None, 2)
    found = attack(view, batch(images), 8 / 255, SEEDS)
    assert found.backwards == 2 * 2
    # A sample meets its draws in any batch: a view begins anew, so the first calls agree.
    views = [through(target, defense, Knowledge.WHITE_BOX, None, 2) for _ in range(2)]
    whole = views[0].answer_nll(images, QUESTIONS, ANSWERS)
    alone = views[1].answer_nll(images[1:], QUESTIONS[1:], ANSWERS[1:])
    torch.testing.assert_close(whole[1:], alone)
    assert not torch.allclose(views[0].answer_nll(images, QUESTIONS, ANSWERS), whole)


def test_the_mean_over_draws() -> None:
    def ranking(score: list[float], kept: list[int]) -> Ranking:
        values = torch.tensor([score], dtype=torch.float32)
        mask = torch.tensor([[i in kept for i in range(4)]])
        return Ranking(values, values, None, None, values[..., None], mask)

    found = mean_of([ranking([4, 3, 2, 1], [0, 1]), ranking([4, 3, 2, 3], [0, 3])])
    assert found.score.tolist() == [[4, 3, 2, 2]]
    assert found.kept.tolist() == [[True, True, False, False]]
    assert found.query is None
    assert mean_of([("yes",), ("no",)]) == ("yes",)
    real = torch.tensor([True, False])
    logprobs, mask = mean_of([(torch.tensor([0.0]), real), (torch.tensor([2.0]), real)])
    assert logprobs.tolist() == [1.0]
    assert torch.equal(mask, real)


def test_every_defence_can_be_an_input_or_a_selection() -> None:
    for defense in DEFENSES.values():
        assert not isinstance(defense, InputDefense)
        assert defense.verifiable
        assert passes_of(defense, 4) == (1 + defense.looks) * (4 if defense.draws else 1)


# Decoders, stacks and what need not be repeated --------------------------------------------------


def made(target: LVLM, needs: Knowledge) -> Any:
    def make(compressor: Compressor | None, decoding: Any = None, draw: int = 0) -> Any:
        return target.view(needs, compressor, decoding=decoding, draw=draw)

    return make


def against(target: LVLM, defense: Any, plain: Compressor | None, draws: int = 2) -> Any:
    needs = Knowledge.WHITE_BOX
    how: dict[str, Any] = {"compressor": plain, "layout": target.layout, "draws": draws}
    return defended(made(target, needs), needs, defense, **how)


@pytest.mark.parametrize("path", ["full", "compressed"])
@pytest.mark.parametrize("decoding", [PAI(), SID(), VASparse()], ids=lambda one: one.name)
def test_answers_are_scored_as_they_are_decoded(
    decoding: Any, path: str, target: LVLM, images: Tensor
) -> None:
    plain = FastV(layer=1, keep_tokens=9)
    view = against(target, decoding, plain)
    live = images.clone().requires_grad_()
    found = view.answer_nll(live, QUESTIONS, ANSWERS, path=path)
    wanted = target.answer_logprob(
        images,
        QUESTIONS,
        ANSWERS,
        compressor=plain if path == "compressed" else None,
        decoding=decoding,
    )
    undecoded = target.view(Knowledge.WHITE_BOX, plain).answer_nll(  # type: ignore[attr-defined]
        images, QUESTIONS, ANSWERS, path=path
    )
    logprobs, real = view.answer_logprobs(images, QUESTIONS, ANSWERS, path=path)
    torch.testing.assert_close(found * real.sum(1), -wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, undecoded)
    assert logprobs.shape[0] == COUNT
    (gradient,) = torch.autograd.grad(found.sum(), live)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())


def test_a_decoder_hides_distributions_that_are_not_its_own(target: LVLM, images: Tensor) -> None:
    view = against(target, PAI(), None)
    said = view.continuation(images, QUESTIONS, length=2)
    with pytest.raises(KnowledgeError, match=r"under decoding method 'pai'"):
        view.generation(images, QUESTIONS, said)


def test_a_stack_is_its_members_one_after_the_other(target: LVLM, images: Tensor) -> None:
    plain = VisionZip(keep_tokens=9)
    inside = Hybrid()
    stack = Stack(members=(SpatialLike(), inside, PAI()))
    guard = Guard.of(stack)
    assert (len(guard.inputs), guard.selections, guard.decoding) == (1, (inside,), PAI())
    shown = SpatialLike()(images, SEEDS)
    wanted = target.view(Knowledge.WHITE_BOX, inside.protect(plain), decoding=PAI())
    found = against(target, stack, plain).answer_nll(images, QUESTIONS, ANSWERS, path="compressed")
    torch.testing.assert_close(
        found,
        wanted.answer_nll(shown, QUESTIONS, ANSWERS, path="compressed"),  # type: ignore[attr-defined]
    )


def test_two_selections_in_a_stack_both_act(target: LVLM, images: Tensor) -> None:
    plain = VisionZip(keep_tokens=9)
    first, second = TranslationConsensus(), Hybrid(diverse=0.5)
    stack = Stack(members=(first, second))
    one = Guard.of(stack).protect(plain, salt=3)
    kept = [
        target.answer(images, QUESTIONS, compressor=c, max_new_tokens=1).kept
        for c in (one, first.protect(plain, 3), second.protect(plain, 3))
    ]
    assert torch.equal(kept[0].sum(1), kept[1].sum(1))  # type: ignore[union-attr]
    assert not torch.equal(kept[0], kept[1])  # type: ignore[arg-type]
    assert not torch.equal(kept[0], kept[2])  # type: ignore[arg-type]


def test_the_path_with_all_tokens_is_run_once_for_all_draws(
    target: LVLM, images: Tensor, opened: list[Compressor]
) -> None:
    plain, floor = VisionZip(keep_tokens=9), RandomFloor(rho=0.5)
    view, runs = against(target, floor, plain, draws=5), 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    handle = target.family.layers[-1].register_forward_hook(count)
    full = view.answer_nll(images, QUESTIONS, ANSWERS)
    logprobs, _, ranking = view.full_and_rank(images, QUESTIONS, ANSWERS)
    handle.remove()
    assert runs == 2
    assert len(opened) == 5, "five rankings, each under a draw of its own"
    assert len({one.salt for one in opened if isinstance(one, Protected)}) == 5
    plainly: Any = target.view(Knowledge.WHITE_BOX, plain)
    torch.testing.assert_close(full, plainly.answer_nll(images, QUESTIONS, ANSWERS))
    torch.testing.assert_close(logprobs, plainly.answer_logprobs(images, QUESTIONS, ANSWERS)[0])
    assert torch.equal(ranking.kept.sum(1), plainly.rank(images, QUESTIONS).kept.sum(1))
    assert view.passes_in("answer_nll", {"path": "full"}) == 1
    assert view.passes_in("answer_nll", {"path": "compressed"}) == 5
    assert view.passes_in("full_and_rank", {}) == 5


class SpatialLike(InputDefense):
    """Blurs; differentiable and without randomness."""

    name = "blur"
    adaptive = AdaptiveRoute.DIFFERENTIABLE

    def transform(self, images: Tensor, generators: Any) -> Tensor:
        del generators
        return torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
