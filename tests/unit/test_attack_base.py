"""What the final call promises: clear refusals, independence, determinism, counted work."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from attacks import CAA, PGD, Attack, AttackError, Budget, Noise, Proposal, SeedBank
from attacks.base import TRACE_POINTS
from targets.base import Batch, EncoderView, Knowledge
from targets.errors import KnowledgeError
from tests.fakes import FakeView, make_batch, pick

SEEDS = [11, 22, 33, 44]


@pytest.fixture
def batch() -> Batch:
    return make_batch(4)


def spoil(change: Callable[[Tensor], Tensor]) -> Callable[[Batch], Batch]:
    return lambda batch: replace(batch, images=change(batch.images))


def put(value: float) -> Callable[[Batch], Batch]:
    def change(images: Tensor) -> Tensor:
        images = images.clone()
        images[2, 0, 0, 0] = value
        return images

    return spoil(change)


@pytest.mark.parametrize(
    ("change", "says", "who"),
    [
        (spoil(Tensor.double), "torch.float64", ()),
        (spoil(lambda x: x[:, :1]), r"\[4, 1, 16, 16\]", ()),
        (spoil(lambda x: x[0]), r"\[3, 16, 16\]", ()),
        (spoil(lambda x: x[:3]), "4 ids but 3 images", ()),
        (lambda b: replace(b, questions=("one",)), "4 ids but 1 questions", ()),
        (lambda b: replace(b, answers=()), "4 ids but 0 answers", ()),
        (put(float("nan")), "NaN or infinity", ("s2",)),
        (put(float("inf")), "NaN or infinity", ("s2",)),
        (put(1.5), r"range over \[.*1.5\]", ("s2",)),
        (put(-0.25), r"\[-0.25", ("s2",)),
        (put(0.5), "multiple of 1/255", ("s2",)),
        (spoil(lambda x: x * 255), "divide", ("s0", "s1", "s2", "s3")),
    ],
)
def test_a_bad_batch_is_refused_with_its_value(
    batch: Batch, change: Callable[[Batch], Batch], says: str, who: tuple[str, ...]
) -> None:
    with pytest.raises(AttackError, match=says) as caught:
        Noise()(FakeView(), change(batch), 8 / 255, SEEDS)
    assert caught.value.sample_ids == who


def test_seeds_are_one_per_sample(batch: Batch) -> None:
    with pytest.raises(AttackError, match="4 ids but 2 seeds"):
        Noise()(FakeView(), batch, 8 / 255, [1, 2])


@pytest.mark.parametrize("epsilon", [8.0, -0.1, float("nan"), float("inf")])
def test_a_senseless_epsilon_is_refused(batch: Batch, epsilon: float) -> None:
    with pytest.raises(AttackError, match="Write 8/255, not 8"):
        Noise()(FakeView(), batch, epsilon, SEEDS)


def test_an_l2_radius_may_exceed_one(batch: Batch) -> None:
    result = Noise(norm="l2")(FakeView(), batch, 2.0, SEEDS)
    assert float(result.l2.max()) <= 2.0
    assert float(result.l2.min()) > 1.8


@pytest.mark.parametrize("attack", [Noise(), PGD(steps=3), CAA(steps=3)])
def test_epsilon_zero_returns_the_clean_images(batch: Batch, attack: Attack) -> None:
    view = FakeView()
    result = attack(view, batch, 0.0, SEEDS)
    assert torch.equal(result.images, batch.images)
    assert result.linf.tolist() == [0.0] * 4
    assert (result.forwards, result.backwards, view.calls) == (0, 0, [])


def test_an_epsilon_below_one_level_is_a_no_op_and_says_so(batch: Batch) -> None:
    result = PGD(steps=3)(FakeView(), batch, 0.5 / 255, SEEDS)
    assert torch.equal(result.images, batch.images)
    assert "below one 8-bit level" in result.notes[0]


ALL_KINDS = [
    Noise(distribution="gaussian"),
    PGD(steps=6),
    PGD(steps=6, path="compressed", restarts=2),
    PGD(steps=6, norm="l2", momentum=0.5),
    CAA(steps=6),
    CAA(steps=6, preset="strict_preserve", preserve_every=2),
]


@pytest.mark.parametrize("attack", ALL_KINDS, ids=repr)
def test_a_sample_does_not_depend_on_its_neighbours(batch: Batch, attack: Attack) -> None:
    epsilon = 2.0 if getattr(attack, "norm", "linf") == "l2" else 16 / 255
    together = attack(FakeView(), batch, epsilon, SEEDS)
    for index in range(4):
        alone = attack(FakeView(), pick(batch, index), epsilon, SEEDS[index : index + 1])
        same = (alone.images[0] == together.images[index]).float().mean()
        # Sums over a padded group may differ in the last bit, and sign() can amplify that.
        assert float(same) > 0.995
        assert alone.loss[0] == pytest.approx(together.loss[index], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("attack", ALL_KINDS, ids=repr)
def test_the_seed_decides_everything(batch: Batch, attack: Attack) -> None:
    epsilon = 2.0 if getattr(attack, "norm", "linf") == "l2" else 16 / 255
    torch.manual_seed(1)
    one = attack(FakeView(), batch, epsilon, SEEDS)
    torch.manual_seed(2)
    two = attack(FakeView(), batch, epsilon, SEEDS)
    other = attack(FakeView(), batch, epsilon, [*SEEDS[:3], 45])
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.images[:3], other.images[:3])
    assert not torch.equal(one.images[3], other.images[3])


@dataclass(frozen=True, kw_only=True)
class Reaching(Attack):
    """Declares the encoder and tries one call of its view."""

    name: ClassVar[str] = "reaching"
    knowledge: ClassVar[Knowledge] = Knowledge.ENCODER
    call: Literal["encode", "rank", "nll", "logprobs", "full_and_rank"] = "encode"

    def propose(self, view: Any, batch: Batch, budget: Budget, rng: SeedBank) -> Tensor:
        del budget, rng
        images, questions, answers = batch.images, batch.questions, batch.answers
        calls: dict[str, Callable[[], Any]] = {
            "encode": lambda: view.encode(images),
            "rank": lambda: view.rank(images, questions),
            "nll": lambda: view.answer_nll(images, questions, answers),
            "logprobs": lambda: view.answer_logprobs(images, questions, answers),
            "full_and_rank": lambda: view.full_and_rank(images, questions, answers),
        }
        calls[self.call]()
        return images


@pytest.mark.parametrize("call", ["rank", "nll", "logprobs", "full_and_rank"])
@pytest.mark.parametrize("given", [Knowledge.ENCODER, Knowledge.WHITE_BOX])
def test_reaching_outside_the_declared_view_raises(
    batch: Batch, call: Any, given: Knowledge
) -> None:
    """Even where the runner hands over more than the attack declared."""
    with pytest.raises(KnowledgeError, match="encoder"):
        Reaching(call=call)(FakeView(given), batch, 8 / 255, SEEDS)


def test_what_was_declared_may_be_used(batch: Batch) -> None:
    assert Reaching(call="encode")(FakeView(), batch, 8 / 255, SEEDS).forwards == 1


@pytest.mark.parametrize("given", [Knowledge.NONE, Knowledge.QUERY])
def test_too_small_a_view_is_refused(batch: Batch, given: Knowledge) -> None:
    with pytest.raises(AttackError, match=f"'encoder' and was given one of '{given.value}'"):
        Reaching()(FakeView(given), batch, 8 / 255, SEEDS)


@dataclass(frozen=True, kw_only=True)
class Proposing(Attack):
    """Proposes a fixed change of the clean images."""

    name: ClassVar[str] = "proposing"
    knowledge: ClassVar[Knowledge] = Knowledge.NONE
    kind: Literal["nan", "small", "double"] = "nan"

    def propose(self, view: Any, batch: Batch, budget: Budget, rng: SeedBank) -> Tensor | Proposal:
        del view, budget, rng
        images = batch.images.clone()
        if self.kind == "nan":
            images[1, 0, 0, 0] = float("nan")
        if self.kind == "double":
            return (images + 1).double()
        return images[:, :, :8] if self.kind == "small" else images


def test_a_proposal_that_is_not_finite_names_its_sample(batch: Batch) -> None:
    with pytest.raises(AttackError, match=r"NaN or infinity \(samples s1\)") as caught:
        Proposing(kind="nan")(FakeView(), batch, 8 / 255, SEEDS)
    assert caught.value.sample_ids == ("s1",)


def test_a_proposal_of_another_shape_is_refused(batch: Batch) -> None:
    with pytest.raises(AttackError, match=r"expected \[4, 3, 16, 16\]"):
        Proposing(kind="small")(FakeView(), batch, 8 / 255, SEEDS)


def test_a_proposal_of_another_dtype_is_converted(batch: Batch) -> None:
    result = Proposing(kind="double")(FakeView(), batch, 8 / 255, SEEDS)
    assert result.images.dtype == torch.float32
    assert float(result.linf.max()) == 8 / 255


def test_nan_in_one_sample_names_it_and_the_rest_can_be_repeated(batch: Batch) -> None:
    questions = (*batch.questions[:2], "is this nan?", batch.questions[3])
    broken = replace(batch, questions=questions)
    attack = CAA(steps=4)
    with pytest.raises(AttackError, match=r"step 0 for samples s2 \(loss nan\)") as caught:
        attack(FakeView(), broken, 16 / 255, SEEDS)
    assert caught.value.sample_ids == ("s2",)
    assert caught.value.step == 0
    rest = [i for i, name in enumerate(broken.ids) if name not in caught.value.sample_ids]
    kept = Batch(
        tuple(broken.ids[i] for i in rest),
        broken.images[rest],
        tuple(broken.questions[i] for i in rest),
        tuple(broken.answers[i] for i in rest),
    )
    result = attack(FakeView(), kept, 16 / 255, [SEEDS[i] for i in rest])
    assert len(result.loss) == 3


def test_an_error_survives_pickling() -> None:
    """Trials may be run in other processes."""
    error = pickle.loads(pickle.dumps(AttackError("why", sample_ids=("a",), step=3)))  # noqa: S301
    assert (str(error), error.sample_ids, error.step) == ("why", ("a",), 3)


def test_a_sample_without_gradient_is_flagged_alone(batch: Batch) -> None:
    questions = ("a dead one", *batch.questions[1:])
    result = PGD(steps=4)(FakeView(), replace(batch, questions=questions), 8 / 255, SEEDS)
    assert any(check.startswith("zero-gradient") for check in result.checks[0])
    assert not any(c.startswith("zero-gradient") for checks in result.checks[1:] for c in checks)


def test_forwards_and_backwards_are_counted_per_sample(batch: Batch) -> None:
    result = PGD(steps=5, restarts=2)(FakeView(), batch, 8 / 255, SEEDS)
    assert (result.forwards, result.backwards) == (12, 10)
    result = CAA(steps=5)(FakeView(), batch, 8 / 255, SEEDS)
    assert (result.forwards, result.backwards) == (7, 5)  # one more: the clean pass


@dataclass(frozen=True, kw_only=True)
class OwnGradient(Attack):
    """Calls autograd itself, with two passes and a gradient of each."""

    name: ClassVar[str] = "own_gradient"
    knowledge: ClassVar[Knowledge] = Knowledge.COMPRESSED

    def propose(self, view: Any, batch: Batch, budget: Budget, rng: SeedBank) -> Tensor:
        del rng
        images = batch.images.requires_grad_()
        losses = [
            view.encode(images).score.sum(),
            view.rank(images, batch.questions).log_score.square().sum(),
        ]
        gradient = sum(torch.autograd.grad(loss, images)[0] for loss in losses)
        view.rank(images.detach()[:2], batch.questions[:2])
        return images.detach() + budget.epsilon * torch.sign(torch.as_tensor(gradient))


def test_an_attack_that_calls_autograd_itself_is_counted_too(batch: Batch) -> None:
    result = OwnGradient()(FakeView(), batch, 8 / 255, SEEDS)
    assert (result.forwards, result.backwards) == (3, 2)  # 2.5 passes a sample, rounded up


def test_the_trace_is_thinned_and_keeps_its_ends(batch: Batch) -> None:
    result = PGD(steps=150)(FakeView(), batch, 8 / 255, SEEDS)
    whole = PGD(steps=40)(FakeView(), batch, 8 / 255, SEEDS)
    assert [len(trace) for trace in result.loss] == [TRACE_POINTS] * 4
    assert [len(trace) for trace in whole.loss] == [41] * 4
    assert result.loss[0][0] == whole.loss[0][0]


def test_it_works_under_inference_mode(batch: Batch) -> None:
    """A runner may evaluate under it; the attack still needs gradients."""
    view = FakeView()
    wanted = PGD(steps=3)(view, batch, 8 / 255, SEEDS)
    with torch.inference_mode():
        images = batch.images.clone()
        result = PGD(steps=3)(view, replace(batch, images=images), 8 / 255, SEEDS)
    assert torch.equal(result.images, wanted.images)


def test_the_final_call_cannot_be_overridden() -> None:
    with pytest.raises(TypeError, match="implement propose"):
        type("Cheat", (Attack,), {"__call__": lambda self: None})


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        (PGD, {"steps": -1}, r"pgd: steps is -1; allowed: Ge\(ge=0\)"),
        (PGD, {"steps": 2.5}, "steps is 2.5; allowed: int"),
        (PGD, {"steps": True}, "steps is True; allowed: int"),
        (PGD, {"restarts": 0}, "restarts is 0"),
        (PGD, {"alpha": 0.0}, "alpha is 0.0"),
        (PGD, {"alpha": "8/255"}, "alpha is '8/255'; allowed: float or None"),
        (PGD, {"momentum": 1.5}, r"momentum is 1.5; allowed: Le\(le=1\)"),
        (PGD, {"path": "half"}, "path is 'half'; allowed: 'full', 'compressed', 'both'"),
        (CAA, {"preset": "strict"}, "preset is 'strict'; allowed: 'paper', 'strict_preserve'"),
        (CAA, {"tau": 0.0}, "tau is 0.0"),
        (CAA, {"random_start": 1}, "random_start is 1; allowed: bool"),
        (Noise, {"border": 0.6}, r"border is 0.6; allowed: Le\(le=0.5\) or None"),
    ],
)
def test_a_bad_option_is_refused_with_its_value(
    method: Callable[..., Attack], options: dict[str, object], says: str
) -> None:
    with pytest.raises(AttackError, match=says):
        method(**options)


def test_the_view_protocol_is_what_the_declared_knowledge_says() -> None:
    assert isinstance(FakeView(), EncoderView)
    assert [Noise().needs, PGD().needs] == [Knowledge.NONE, Knowledge.WHITE_BOX]
    assert [CAA().needs, CAA(preset="strict_preserve").needs] == [
        Knowledge.COMPRESSED,
        Knowledge.WHITE_BOX,
    ]
    aware = [a.knows_compression for a in (Noise(), PGD(), PGD(path="compressed"), CAA())]
    assert aware == [False, False, True, True]


class TestSeedBank:
    def test_streams_belong_to_samples(self) -> None:
        both, one = SeedBank([5, 6]), SeedBank([6])
        assert torch.equal(both.uniform((3, 2))[1], one.uniform((3, 2))[0])
        assert torch.equal(both.normal((4,))[1], one.normal((4,))[0])
        assert torch.equal(both.signs((4,))[1], one.signs((4,))[0])
        assert len(both) == 2

    def test_ranges(self) -> None:
        draw = SeedBank([1]).uniform((1000,), -2.0, 3.0)
        assert -2 <= float(draw.min()) < -1.9
        assert 2.9 < float(draw.max()) < 3
        assert set(SeedBank([1]).signs((100,)).tolist()[0]) == {-1.0, 1.0}

    def test_children_do_not_depend_on_what_was_drawn(self) -> None:
        fresh, used = SeedBank([7]), SeedBank([7])
        used.normal((10,))
        assert torch.equal(fresh.child("a").normal((3,)), used.child("a").normal((3,)))
        assert fresh.child("a").seeds != fresh.child("b").seeds


def test_a_change_that_rounding_leaves_nothing_of_is_said(batch: Batch) -> None:
    """A pattern of signs in a small l2 ball is less than half a level in every value."""
    lost = Noise(distribution="sign", norm="l2")(FakeView(), batch, 0.05, SEEDS)
    assert float(lost.l2.max()) == 0
    assert any("left no change" in note for note in lost.notes)
    held = Noise(distribution="sign", norm="l2")(FakeView(), batch, 1.0, SEEDS)
    assert float(held.l2.min()) > 0
    assert not held.notes
