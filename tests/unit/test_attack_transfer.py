"""Transfer CAA: what moves, what is asked of whom, and what the loss is an expectation of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks import AttackError, TransferCAA
from attacks.budget import Budget
from attacks.objectives import (
    answer_divergence,
    bpr,
    query_misalignment,
    remaining_content,
)
from attacks.seeds import SeedBank
from attacks.transfer.borders import frame, framed, token_boxes
from attacks.transfer.expectation import (
    Expectation,
    Member,
    Views,
    Weights,
    _Within,
    layers_for,
    scorers_of,
)
from attacks.transfer_caa import GENERIC
from targets.base import Knowledge, Surrogate
from targets.compression.fastv import FastV
from targets.errors import KnowledgeError
from targets.lvlm import LVLM
from targets.scenes import build
from targets.views import OtherModels
from tests.fakes import FakeSurrogates, FakeView, make_batch, pick

SEEDS = [1, 2, 3, 4]
EPSILON = 16 / 255
QUICK: dict[str, Any] = {"steps": 4, "alpha": 4 / 255, "judge_every": 2, "border": 0.25}


@dataclass
class Listening(FakeView):
    """A fake that remembers what it was asked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked: set[str] = set()
        self.under: list[Any] = []

    def rank(self, images: Tensor, questions: tuple[str, ...], *, under: Any = None) -> Any:
        self.asked |= set(questions)
        self.under.append(under)
        return super().rank(images, questions, under=under)


def others(*views: FakeView, depth: int = 2) -> Any:
    surrogates = [Surrogate(f"s{i}", depth, (16, 16), view) for i, view in enumerate(views)]
    return OtherModels(surrogates)


@pytest.mark.parametrize("template", [None, 8])
@pytest.mark.parametrize("ensemble", ["mean", "cwa"])
@pytest.mark.parametrize("where", ["inside", "added"])
def test_only_the_frame_moves(where: Any, ensemble: Any, template: int | None) -> None:
    batch = make_batch(3)
    attack = TransferCAA(**QUICK, frame=where, ensemble=ensemble, template=template)
    result = attack(FakeSurrogates(), batch, EPSILON, SEEDS[:3])
    base = framed(batch.images, 0.25) if where == "added" else batch.images
    assert torch.allclose(result.base, base, rtol=0, atol=0.5 / 255 + 1e-6)
    moved = result.images != result.base
    inside = frame(batch.images, 0.25).expand_as(moved) == 0
    assert not bool(moved[inside].any())
    assert float(moved[~inside].float().mean()) > 0.8
    assert float(result.linf.max()) <= EPSILON


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    batch = make_batch(3)
    for options in ({"template": 8}, {"neighbours": 2, "spectra": 2, "over": "kept"}):
        attack = TransferCAA(**QUICK, **options)  # type: ignore[arg-type]
        together = attack(FakeSurrogates(), batch, EPSILON, SEEDS[:3]).images
        for row in range(3):
            alone = attack(FakeSurrogates(), pick(batch, row), EPSILON, SEEDS[row : row + 1])
            assert torch.equal(alone.images[0], together[row])


def test_surrogates_are_all_or_those_named() -> None:
    batch = make_batch(1)
    views = Listening(seed=3), Listening(seed=4), Listening(seed=5)
    TransferCAA(**QUICK, surrogates=("s0", "s2"))(others(*views), batch, EPSILON, [1])
    assert [bool(view.under) for view in views] == [True, False, True]
    result = TransferCAA(**QUICK)(others(*views), batch, EPSILON, [1])
    assert all(view.under for view in views)
    assert "s0 (layer 1, CLS), s1 (layer 1, CLS), s2" in result.notes[0]
    with pytest.raises(AttackError, match=r"\['s7'\].*\['s0', 's1', 's2'\]"):
        TransferCAA(**QUICK, surrogates=("s7",))(others(*views), batch, EPSILON, [1])


def test_the_question_is_the_users_or_a_general_one() -> None:
    batch = make_batch(2)
    view = Listening()
    TransferCAA(**QUICK)(others(view), batch, EPSILON, SEEDS[:2])
    assert view.asked == set(batch.questions)
    view = Listening()
    TransferCAA(**QUICK, questions="generic")(others(view), batch, EPSILON, SEEDS[:2])
    assert view.asked == {GENERIC}


def test_it_has_nothing_but_surrogates() -> None:
    view = others(FakeView())
    for call in ("rank", "encode", "answer_nll", "ask", "token_mask_to_pixels"):
        with pytest.raises(KnowledgeError):
            getattr(view, call)
    assert TransferCAA().needs is Knowledge.SURROGATE
    assert not TransferCAA().knows_compression


@pytest.mark.parametrize("options", [{"nesterov": True}, {"neighbours": 2}])
def test_what_cwa_leaves_no_place_for_is_noted(options: dict[str, Any]) -> None:
    view: Any = FakeSurrogates()
    batch, seeds = make_batch(2), [1, 2]
    common: dict[str, Any] = {"steps": 2, "template": None, "border": 0.25}
    plain = TransferCAA(**common, ensemble="cwa")(view, batch, 8 / 255, seeds)
    with_it = TransferCAA(**common, **options, ensemble="cwa")
    result = with_it(view, batch, 8 / 255, seeds)
    assert torch.equal(result.images, plain.images)
    assert [one for one in result.notes if f"{next(iter(options))} had no effect" in one]
    assert not [one for one in plain.notes if "no effect" in one]
    mean = TransferCAA(**common, **options)(view, batch, 8 / 255, seeds)
    assert not [one for one in mean.notes if "no effect" in one]


@pytest.mark.parametrize(
    ("depth", "wanted"),
    [(32, (2, 8, 16)), (17, (2, 8, 16)), (16, (1, 4, 8)), (6, (1, 2, 3)), (5, (1, 2)), (2, (1,))],
)
def test_layers_are_shares_of_the_depth_where_a_model_is_shallow(
    depth: int, wanted: tuple[int, ...]
) -> None:
    assert layers_for(depth, (8, 2, 16)) == wanted


def test_every_score_the_target_may_rank_by_is_imagined() -> None:
    surrogate = Surrogate("s", 6, (16, 16), FakeView())
    found = scorers_of(surrogate, (2, 8, 16), ("llm", "cls"))
    assert [(one.name, getattr(one, "layer", None)) for one in found] == [
        ("fastv", 1),
        ("fastv", 2),
        ("fastv", 3),
        ("fastervlm", None),
    ]
    with pytest.raises(AttackError, match="1 layers, too few"):
        scorers_of(Surrogate("s", 1, (16, 16), FakeView()), (2,), ("llm",))


def test_scores_take_turns_and_full_takes_all() -> None:
    batch = make_batch(1)
    for expectation, calls in (("sampled", 8), ("full", 24)):
        view = Listening()
        attack = TransferCAA(
            **{**QUICK, "steps": 8, "judge_every": 8},
            expectation=expectation,  # type: ignore[arg-type]
            query_weight=0,
            erase_weight=0,
            crops=0,
        )
        attack(others(view, depth=5), batch, EPSILON, [1])
        steps = view.under[3:-3]  # the first and last picture are judged under all three
        assert len(steps) == calls
        layers = [one.layer for one in steps if isinstance(one, FastV)]
        assert (layers.count(1), layers.count(2)) in {(3, 3), (8, 8)}
        assert len(steps) - len(layers) in {2, 8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0, 2)}, "layers"),
        ({"layers": ()}, "layers"),
        ({"scores": ()}, "llm, cls or both"),
        ({"scores": ("tower",)}, "llm, cls or both"),
        ({"retention": (0.5, 0.1)}, "retention"),
        ({"retention": (0.1,)}, "two numbers"),
        ({"smoothing": 4}, "odd"),
        ({"border": 0.5}, "border"),
        ({"diversity": 1.5}, "diversity"),
        ({"template": 0}, "template"),
        ({"questions": "generic", "preserve_weight": 1}, "no answer to preserve"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AttackError, match=message):
        TransferCAA(**options)


def test_a_clamp_lets_descent_come_back_and_not_go_further() -> None:
    values = torch.tensor([-0.2, -0.2, 0.0, 0.5, 1.0, 1.3, 1.3]).requires_grad_()
    weight = torch.tensor([1.0, -1.0, -1.0, 3.0, 2.0, 1.0, -1.0])
    clamped: Tensor = _Within.apply(values)
    assert clamped.tolist() == [0, 0, 0, 0.5, 1, 1, 1]
    (gradient,) = torch.autograd.grad((clamped * weight).sum(), values)
    # A positive gradient means that descent goes down.
    assert gradient.tolist() == [0, -1, -1, 3, 2, 1, 0]


def expectation(view: FakeView, **options: Any) -> tuple[Expectation, Any]:
    """A plain expectation over one member: no transformation, one scorer, all of the loss."""
    batch = make_batch(3)
    mask = frame(batch.images, 0.25)
    surrogate = Surrogate("s", 2, (16, 16), view)
    weights = Weights(
        tau=0.8,
        over="interior",
        retention=(0.3, 0.3),
        query=0.5,
        erase=0.25,
        preserve=0.0,
        similarity=0.0,
    )
    views = Views(
        crops=0,
        crop_scale=1.0,
        diversity=0.0,
        diversity_rate=1.1,
        scales=1,
        spectra=0,
        spectrum_sigma=0.0,
        spectrum_rho=0.0,
    )
    made = Expectation(
        (Member(surrogate, scorers_of(surrogate, (1,), ("llm",))),),
        batch,
        mask,
        (0, 0, 16, 16),
        weights=replace(weights, **options.pop("weights", {})),
        views=replace(views, **options.pop("views", {})),
        sampled=True,
    )
    return made, batch


@pytest.mark.parametrize("over", ["interior", "kept"])
@pytest.mark.parametrize("preserve", [0.0, 0.7])
def test_the_gradient_is_that_of_the_formula(over: str, preserve: float) -> None:
    view = FakeView()
    problem, batch = expectation(view, weights={"over": over, "preserve": preserve})
    delta = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.03
    found = problem.gradient(0, delta, SeedBank(SEEDS[:3]), 0)
    live = delta.clone().requires_grad_()
    images = (batch.images + live).clamp(0, 1)
    loss = formula(view, batch, images, over)
    if preserve:
        asked = batch.questions, batch.answers
        before, real = view.answer_logprobs(batch.images, *asked)
        after, _ = view.answer_logprobs(images, *asked)
        loss = loss + preserve * answer_divergence(before, after, real)
    (wanted,) = torch.autograd.grad(loss.sum(), live)
    free = (images.detach() > 0) & (images.detach() < 1)
    torch.testing.assert_close(found[free], wanted[free], atol=1e-6, rtol=1e-4)


def formula(view: FakeView, batch: Any, images: Tensor, over: str = "interior") -> Tensor:
    """BPR + 0.5·query + 0.25·erase where nothing is transformed."""
    ranking, clean = view.rank(images, batch.questions), view.rank(batch.images, batch.questions)
    # Patches of 4 pixels in a frame of 4: the border is the outer ring of the 4 × 4 tokens.
    ring = torch.ones(4, 4, dtype=torch.bool)
    ring[1:3, 1:3] = False
    up = ring.flatten().expand(3, -1)
    down = ~up
    if over == "kept":
        order = ranking.score.argsort(dim=1, descending=True)
        kept = torch.zeros_like(down)
        for row in range(3):
            kept[row, order[row, : round(0.3 * 16)]] = True
        down = down & kept
        assert int(down.sum()) > 0
    assert clean.query is not None
    assert ranking.keys is not None
    return (
        bpr(ranking.log_score, up, down, 0.8)
        + 0.5 * query_misalignment(ranking.keys, clean.query, up)
        + 0.25 * remaining_content(ranking.features, clean.features.detach(), up)
    )


def test_the_judge_takes_the_finished_picture_as_it_is() -> None:
    problem, batch = expectation(FakeView(), views={"diversity": 1.0, "crops": 2})
    images = (batch.images + 0.05).clamp(0, 1)
    torch.testing.assert_close(problem.judge(images), formula(FakeView(), batch, images))


def test_similarity_pulls_the_features_on_a_crop_towards_those_on_the_picture() -> None:
    rng, view = SeedBank(SEEDS[:3]), FakeView()
    delta = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.01
    crops = {"crops": 2, "crop_scale": 0.2}
    plain, batch = expectation(view, views=crops)
    pulled, _ = expectation(view, views=crops, weights={"similarity": 0.5})
    calm = replace(batch, images=0.2 + 0.6 * batch.images)  # far from the ends of the clamp
    plain.batch = pulled.batch = calm
    found = pulled.gradient(0, delta, rng, 0) - plain.gradient(0, delta, rng, 0)
    live = delta.clone().requires_grad_()
    ring = (frame(delta, 0.25)[:, :, 2::4, 2::4] > 0).view(3, 16, 1)
    seen = [
        (view.rank(one + live, batch.questions).features * ring).flatten(1)
        for one in plain._backdrops(rng)
    ]
    alike = sum(torch.nn.functional.cosine_similarity(seen[0], crop) for crop in seen[1:]) / 2
    assert isinstance(alike, Tensor)
    (wanted,) = torch.autograd.grad(-0.5 * alike.sum(), live)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-3)


def test_padding_of_input_diversity_is_in_no_group() -> None:
    member = Member(Surrogate("s", 2, (16, 16), FakeView()), (FastV(retention=0.5),))
    border, interior = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    border[..., 4:8, 4:16] = 1  # a picture that begins at 4, 4: its frame and its inside
    interior[..., 8:16, 4:16] = 1
    first, second = member.groups(16, border, interior)
    assert first.view(4, 4).tolist() == [[False] * 4, [False, True, True, True], *[[False] * 4] * 2]
    assert second.view(4, 4).tolist() == [[False] * 4] * 2 + [[False, True, True, True]] * 2


@pytest.fixture(scope="module")
def models() -> list[LVLM]:
    shapes = (
        build.Shape(width=32, mlp=32, heads=2, vision_layers=2, text_layers=3),
        build.Shape(width=48, mlp=32, heads=3, vision_layers=1, text_layers=4),
    )
    return [
        LVLM(build.build_model(shape, seed).float(), build.build_processor())
        for seed, shape in enumerate(shapes)
    ]


def test_boxes_of_real_tokens(models: list[LVLM]) -> None:
    boxes = token_boxes(models[0].view(Knowledge.NONE), 144, (96, 96))
    assert boxes[0].tolist() == [0, 0, 8, 8]
    assert boxes[13].tolist() == [8, 8, 16, 16]
    assert boxes[-1].tolist() == [88, 88, 96, 96]


@pytest.mark.parametrize("size", [(96, 96), (60, 120)])
def test_it_works_on_real_models_of_different_shape(
    models: list[LVLM], size: tuple[int, int]
) -> None:
    levels = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0))
    batch = replace(
        make_batch(2),
        images=levels.float() / 255,
        questions=("is there a red circle ?", "how many shapes ?"),
    )
    view: Any = OtherModels([model.surrogate(f"m{i}") for i, model in enumerate(models)])
    attack = TransferCAA(steps=2, judge_every=1, template=24, border=0.125, frame="added")
    result = attack(view, batch, EPSILON, SEEDS[:2])
    assert result.images.shape == batch.images.shape
    assert "m0 (layer 1, layer 2, CLS), m1 (layer 1, layer 2, CLS)" in result.notes[0]
    assert result.backwards == 2 * 2 * 2  # steps × surrogates × (picture and crop)
    assert result.queries == 0
    assert not any(one.startswith("zero-gradient") for row in result.checks for one in row)


def test_the_budget_steps_by_a_sixteenth() -> None:
    assert TransferCAA().budget(0.1) == Budget(0.1, "linf", 0.1 / 16, 300)
    assert TransferCAA(alpha=0.02, steps=7).budget(0.1) == Budget(0.1, "linf", 0.02, 7)
