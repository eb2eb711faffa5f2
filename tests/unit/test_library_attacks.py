"""Every attack of torchattacks and ART that is offered, on an LVLM of random weights.

The list of what works is this test. Where a library is not installed its attacks are skipped, and
say so.
"""

from __future__ import annotations

import importlib
import inspect
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from attacks import ArtAttack, AttackError, AttackResult, TorchAttack
from attacks.libraries import LibraryAttack, isolated, parameters
from attacks.library_names import ART, LIBRARIES, TORCHATTACKS, Library
from targets.base import Batch, Knowledge
from targets.compression.fastv import FastV
from targets.lvlm import LVLM
from targets.scenes import build

EPSILON = 8 / 255
KNOWN = np.random.RandomState(7)
RADIUS = 2.0
"""Of l2."""
SEEDS = [1, 2, 3]
FASTV = FastV(layer=2, retention=0.25)
COLOURS = ("red", "blue", "green", "yellow")
NUMBERS = ("one", "two", "three", "four")
KINDS: dict[str, type[LibraryAttack]] = {"torchattacks": TorchAttack, "art": ArtAttack}
SMALL: dict[str, Any] = {
    **dict.fromkeys(("steps", "num_iter_set", "max_iter", "nb_steps", "restarts"), 2),
    **dict.fromkeys(("nb_iter", "binary_search_steps", "nb_random_init", "nb_restarts"), 1),
    **dict.fromkeys(("nb_sample", "popsize", "nb_parallel", "max_eval", "num_trial", "k"), 4),
    **{"max_iterations": 10, "n_queries": 20, "init_eval": 2, "init_size": 2, "sample_size": 2},
    **{"conjugate_sinkhorn_max_iter": 3, "projected_sinkhorn_max_iter": 3},
    **{"max_halving": 1, "max_doubling": 1, "query_limit": 30, "initial_query": 2},
}
"""Iterations cut down to what shows that an attack runs."""
L2 = frozenset({"PGDL2", "PGDRSL2"})
MAY_STAND_STILL = frozenset(
    {
        *("CW", "EADL1", "EADEN", "TPGD", "SparseFool"),
        *("CarliniL2Method", "CarliniLInfMethod", "ElasticNet", "NewtonFool"),
        *("ShadowAttack", "DeepFool"),
        *("AutoConjugateGradient", "RescalingAutoConjugateGradient"),
    }
)
"""Two steps are not enough for these, or their loss is not that of the answer."""
OFFERED = [
    pytest.param(library.name, attack, id=f"{library.name}.{attack}")
    for library in LIBRARIES.values()
    for attack in library.offered
]


def need(library: str) -> None:
    found = LIBRARIES[library]
    pytest.importorskip(found.module, reason=f"{found.title} is not installed: {found.install}")


@pytest.fixture(scope="module")
def target() -> LVLM:
    shape = build.Shape(width=32, mlp=32, heads=2, vision_layers=2, text_layers=3)
    return LVLM(build.build_model(shape, 0).float(), build.build_processor())


@pytest.fixture(scope="module")
def batch(target: LVLM) -> Batch:
    """Closed questions that the compressed target answers right: the truth is what it says."""
    levels = torch.randint(0, 256, (3, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    options = (COLOURS, NUMBERS, COLOURS)
    found = Batch(
        ids=("a", "b", "c"),
        images=levels.float() / 255,
        questions=("what color is it ?", "how many shapes ?", "what color is the star ?"),
        answers=("", "", ""),
        options=options,
    )
    view: Any = target.view(Knowledge.SCORES, FASTV)
    best = view.option_scores(found.images, found.questions, options).argmax(1).tolist()
    return replace(found, answers=tuple(row[i] for row, i in zip(options, best, strict=True)))


def small(library: str, attack: str, **options: Any) -> LibraryAttack:
    need(library)
    known = parameters(library, attack)
    cut = {name: value for name, value in SMALL.items() if name in known}
    norm = "l2" if attack in L2 else "linf"
    return KINDS[library].named(attack)(**{"norm": norm, **cut, **options})


def run(target: LVLM, attack: LibraryAttack, batch: Batch, seeds: list[int]) -> AttackResult:
    view = target.view(attack.needs, FASTV if attack.knows_compression else None)
    return attack(view, batch, RADIUS if attack.norm == "l2" else EPSILON, seeds)


@pytest.mark.parametrize(("library", "attack"), OFFERED)
def test_every_attack_offered_runs_inside_the_ball(
    library: str, attack: str, target: LVLM, batch: Batch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = small(library, attack)
    rows = [0] if attack == "PixelAttack" else [0, 1, 2]  # that one asks 400 times an iteration
    capfd.readouterr()
    result = run(target, found, batch.rows(rows), SEEDS[: len(rows)])
    assert capfd.readouterr() == ("", ""), "runs are silent"
    measured = result.l2 if found.norm == "l2" else result.linf
    assert float(measured.max()) <= (RADIUS if found.norm == "l2" else EPSILON)
    assert torch.equal((result.images * 255).round() / 255, result.images)
    knowledge = LIBRARIES[library].offered[attack]
    assert (result.backwards > 0) == (knowledge is Knowledge.WHITE_BOX)
    assert (result.queries > 0) == (knowledge is Knowledge.SCORES)
    assert (result.forwards > 0) == (knowledge is Knowledge.WHITE_BOX)
    if knowledge is Knowledge.WHITE_BOX:
        assert not any("zero-gradient" in one for row in result.checks for one in row)
        if attack not in MAY_STAND_STILL:
            assert all(end < start for start, end in result.loss)


@pytest.mark.parametrize("library", list(LIBRARIES.values()), ids=lambda one: one.name)
def test_every_class_of_a_library_is_offered_or_has_a_reason(library: Library) -> None:
    need(library.name)
    module = importlib.import_module(library.module)
    classes = {name for name, one in vars(module).items() if inspect.isclass(one)}
    assert classes - set(library.offered) - set(library.unsuitable) == set()
    assert set(library.offered) <= classes
    assert not set(library.offered) & set(library.unsuitable)
    assert all(len(reason) > 15 for reason in library.unsuitable.values())


@pytest.mark.parametrize("path", ["full", "compressed"])
@pytest.mark.parametrize(
    ("library", "attack"),
    [("torchattacks", "PGD"), ("torchattacks", "MIFGSM"), ("art", "FastGradientMethod")],
)
def test_only_the_compressed_path_knows_the_compressor(
    library: str, attack: str, path: str, target: LVLM, batch: Batch
) -> None:
    found = small(library, attack, path=path)
    assert found.knows_compression == (path == "compressed")
    result = run(target, found, batch, SEEDS)
    assert all(end < start for start, end in result.loss)
    assert not any("zero-gradient" in one for row in result.checks for one in row)


@pytest.mark.parametrize(
    ("library", "attack"),
    [("torchattacks", "PGD"), ("torchattacks", "Square"), ("art", "SquareAttack")],
)
def test_a_sample_does_not_depend_on_its_neighbours(
    library: str, attack: str, target: LVLM, batch: Batch
) -> None:
    found = small(library, attack)
    together = run(target, found, batch, SEEDS)
    for row in range(3):
        alone = run(target, found, batch.rows([row]), SEEDS[row : row + 1])
        assert torch.equal(alone.images[0], together.images[row])
    other = run(target, found, batch, [seed + 10 for seed in SEEDS])
    assert not torch.equal(other.images, together.images)


@pytest.mark.parametrize("attack", ["FGSM", "MIFGSM", "SINIFGSM", "UPGD", "PIFGSM", "PIFGSMPP"])
def test_a_batch_run_whole_equals_the_single_runs(attack: str, target: LVLM, batch: Batch) -> None:
    found = small("torchattacks", attack)
    together = run(target, found, batch, SEEDS)
    for row in range(3):
        alone = run(target, found, batch.rows([row]), SEEDS[row : row + 1])
        assert alone.loss[0] == pytest.approx(together.loss[row], rel=1e-3, abs=1e-3)
        # Batched kernels round differently, and a sign step turns that into whole levels.
        assert float((alone.images[0] == together.images[row]).float().mean()) > 0.98


def test_random_start_takes_samples_one_by_one(target: LVLM, batch: Batch) -> None:
    need("torchattacks")
    whole = TorchAttack.named("PGD")(steps=2, random_start=False)
    assert run(target, whole, batch, SEEDS).images.shape == batch.images.shape
    assert whole._groups(batch) == [[0, 1, 2]]
    assert TorchAttack()._groups(batch) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("library", "attack"),
    [("torchattacks", "MIFGSM"), ("torchattacks", "SPSA"), ("art", "HopSkipJump")],
)
def test_questions_with_other_numbers_of_options_share_a_batch(
    library: str, attack: str, target: LVLM, batch: Batch
) -> None:
    mixed = replace(
        batch,
        questions=("is there a red circle ?", batch.questions[1], "what does the sign say ?"),
        answers=("yes", batch.answers[1], "a b"),
        options=(("yes", "no"), batch.options[1], ()),  # type: ignore[index]
    )
    found = small(library, attack)
    result = run(target, found, mixed, SEEDS)
    again = run(target, found, batch.rows([1]), SEEDS[1:2])
    if attack == "MIFGSM":
        assert again.loss[0] == pytest.approx(result.loss[1], rel=1e-3, abs=1e-3)
    else:
        assert torch.equal(again.images[0], result.images[1])


def states() -> Iterator[object]:
    yield torch.get_rng_state().tolist()
    yield np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    yield random.getstate()


@pytest.mark.parametrize("library", list(LIBRARIES))
def test_global_random_numbers_are_left_as_they_were(
    library: str, target: LVLM, batch: Batch
) -> None:
    found = small(library, {"torchattacks": "APGD", "art": "SquareAttack"}[library])
    before = list(states())
    run(target, found, batch, SEEDS)
    assert list(states()) == before


def test_a_generator_made_without_a_seed_is_seeded_inside_only() -> None:
    drawn = []
    for seed in (1, 1, 2):
        with isolated(seed, torch.device("cpu")):
            drawn.append(np.random.RandomState().uniform())  # as HopSkipJump does
            assert np.random.RandomState(7).uniform() == KNOWN.uniform()
            KNOWN.seed(7)
    assert drawn[0] == drawn[1] != drawn[2]
    assert np.random.RandomState().uniform() != np.random.RandomState().uniform()
    assert np.random.RandomState is type(KNOWN)


@pytest.mark.parametrize(
    ("library", "attack"),
    [("torchattacks", "GN"), ("torchattacks", "OnePixel"), ("art", "PixelAttack")],
)
def test_what_leaves_the_ball_is_projected_with_a_note(
    library: str, attack: str, target: LVLM, batch: Batch
) -> None:
    # One sample: PixelAttack asks 400 times an iteration.
    result = run(target, small(library, attack), batch.rows([0]), SEEDS[:1])
    (note,) = result.notes
    assert note.startswith(f"{library}.{attack} left the ball (")
    assert note.endswith(" > 0.0314); projected")
    assert float(result.linf.max()) <= EPSILON


@pytest.mark.parametrize("factor", [1, 4])
def test_a_step_size_keeps_the_librarys_ratio_to_epsilon(factor: int, batch: Batch) -> None:
    need("torchattacks")
    budget = TorchAttack(attack="BIM").budget(factor * EPSILON)
    settings = TorchAttack(attack="BIM")._settings(4, budget, 7)
    assert settings == {"eps": factor * EPSILON, "alpha": pytest.approx(factor * EPSILON / 4)}
    given = TorchAttack.named("APGDT")(norm="l2", steps=3)
    assert given._settings(4, given.budget(1.0), 7) == {
        **{"eps": 1.0, "norm": "L2", "seed": 7, "n_classes": 4, "verbose": False, "steps": 3}
    }
    fixed = TorchAttack.named("BIM")(alpha=0.01)
    assert fixed._settings(4, budget, 7)["alpha"] == 0.01


def test_a_budget_says_how_much_is_asked() -> None:
    need("torchattacks")
    square = TorchAttack.named("Square")(n_queries=30).budget(EPSILON)
    assert (square.steps, square.queries) == (0, 30)
    apgd = TorchAttack.named("APGD")(steps=7, n_restarts=3).budget(EPSILON)
    assert (apgd.steps, apgd.restarts, apgd.queries) == (7, 3, 0)


REFUSED: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "unknown attack": ("MIFGMS", {}, "has no attack 'MIFGMS'; allowed: APGD, .*did you mean 'MIFG"),
    "unsuitable": ("LGV", {}, "LGV is not offered: it trains"),
    "unknown parameter": (
        "MIFGSM",
        {"step": 3},
        "no parameter 'step'; allowed: alpha, steps",
    ),
    "near": ("MIFGSM", {"step": 3}, "did you mean 'steps'"),
    "type": ("MIFGSM", {"steps": 2.5}, "steps is 2.5; allowed: int"),
    "bool": ("PGD", {"random_start": 1}, "random_start is 1; allowed: bool"),
    "least": ("EADL1", {"max_iterations": 9}, r"max_iterations is 9; allowed: Ge\(ge=10\)"),
    "ours": ("MIFGSM", {"eps": 0.1}, "eps is not yours to set: the budget is the scenario's"),
    "seed": ("APGD", {"seed": 1}, "seed is not yours to set: set the scenario's seed"),
    "path": ("Square", {"path": "compressed"}, "has no path: it uses no gradients"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    need("torchattacks")
    attack, options, message = REFUSED[case]
    with pytest.raises(AttackError, match=message):
        TorchAttack.named(attack)(**options)


@pytest.mark.parametrize(("attack", "own"), [("PGDL2", "l2"), ("BIM", "linf")])
def test_an_attack_of_another_norm_is_refused(attack: str, own: str) -> None:
    need("torchattacks")
    norm = "linf" if own == "l2" else "l2"
    with pytest.raises(AttackError, match=f"works in {own} only.*write norm: {own}"):
        TorchAttack.named(attack)(norm=norm).budget(EPSILON)


@pytest.mark.parametrize(
    ("attack", "options"), [("APGDT", {}), ("AutoAttack", {}), ("APGD", {"loss": "dlr"})]
)
def test_losses_of_many_classes_need_as_many_options(
    attack: str, options: dict[str, Any], target: LVLM, batch: Batch
) -> None:
    two = replace(
        batch, answers=("yes",) * 3, options=(("yes", "no"),) * 3, questions=("is it red ?",) * 3
    )
    with pytest.raises(AttackError, match=r"likeliest answers, .* of a has 2") as caught:
        run(target, small("torchattacks", attack, **options), two, SEEDS)
    assert caught.value.sample_ids == ("a",)


def test_an_error_of_the_library_names_the_attack_and_the_sample(
    target: LVLM, batch: Batch
) -> None:
    with pytest.raises(AttackError, match=r"UPGD failed on a, b, c: ValueError: odd") as caught:
        run(target, small("torchattacks", "UPGD", loss="odd"), batch, SEEDS)
    assert caught.value.sample_ids == ("a", "b", "c")


@pytest.mark.parametrize("library", list(LIBRARIES.values()), ids=lambda one: one.name)
def test_a_missing_library_says_how_to_get_it(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library.module, None)
    parameters.cache_clear()
    attack = next(iter(library.offered))
    with pytest.raises(AttackError, match="needs the package") as caught:
        KINDS[library.name](attack=attack).budget(EPSILON)
    assert library.install in str(caught.value)
    with pytest.raises(AttackError, match="needs the package"):
        KINDS[library.name].named(attack)(steps=3)
    parameters.cache_clear()


def test_the_reasons_are_at_hand_without_a_library() -> None:
    with pytest.raises(AttackError, match=r"art\.DPatch is not offered: it attacks another kind"):
        ArtAttack(attack="DPatch")
    assert TORCHATTACKS.needs("Square") is ART.needs("HopSkipJump") is Knowledge.SCORES
