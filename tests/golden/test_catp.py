"""CATP against loops over tokens, rows and subsets."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from seen import spoiled
from sight import Prompt, last_row, normal, prompt
from torch import Tensor

from targets.compression.base import Cut, Seen, Stage
from targets.compression.budgets import layer_average
from targets.compression.catp import CATP
from targets.compression.coverage import chosen_greedily, gain_when_chosen
from targets.compression.trace import choose
from targets.errors import CompressionError

ROWS = ((2, 9, 3, 6, 2, 7, 4), (1, 8, 3), (1, 5, 0, 4, 2))
"""Two demonstrations and a query; one image; two images without text between them."""
IMAGES = 6
QUERIES = (2, 3, 5)
DEAD = ((0, 0), (0, 4), (1, 2), (2, 6), (3, 1), (4, 0), (5, 3))
ONE = CATP(retention=0.5)
FIRST, BEFORE, AT, CONTEXT, QUERY = ONE.cuts(32)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def alike(a: Tensor, b: Tensor) -> float:
    return (1 + cosine(a, b)) / 2


def texts(one: Prompt, image: int) -> list[int]:
    """Columns of T_i."""
    row, end = int(one.seen.rows[image]), max(one.columns[image])
    words = one.text.words[row].nonzero().flatten().tolist()
    later = [min(one.columns[i]) for i in range(image + 1, IMAGES) if one.seen.rows[i] == row]
    found = [c for c in words if end < c < (later[0] if later else 10**6)]
    return found or words


def mean(one: Prompt, row: int, columns: list[int]) -> Tensor:
    return torch.stack([one.text.hidden[row, c] for c in columns]).mean(0)


def value(tokens: list[Tensor], chosen: tuple[int, ...], text: Tensor, weight: float) -> float:
    """The objective of stage 1."""
    cover = sum(max((alike(tokens[y], x) for y in chosen), default=0.0) for x in tokens)
    return cover + weight * sum(alike(tokens[y], text) for y in chosen)


def at_input(seed: int = 0, counts: Any = (4, 3, 3, 4, 2, 2), **more: Any) -> Prompt:
    return prompt(ROWS, counts, seed=seed, cut=FIRST, answers=2, **more)


@pytest.mark.parametrize("dead", [(), DEAD])
@pytest.mark.parametrize("seed", range(3))
def test_stage_1_is_the_greedy_algorithm(seed: int, dead: tuple[tuple[int, int], ...]) -> None:
    counts = (4, 3, 3, 4, 2, 2)
    one = at_input(seed, counts, dead=dead)
    scores, selection = choose(ONE, one.seen)
    for image in range(IMAGES):
        places = one.seen.valid[image].nonzero().flatten().tolist()
        tokens = [one.seen.features[image, p] for p in places]
        text = mean(one, int(one.seen.rows[image]), texts(one, image))
        chosen: tuple[int, ...] = ()
        gains: dict[int, float] = {}
        for step in range(counts[image] + 1):
            now = value(tokens, chosen, text, 0.7)
            rest = [y for y in range(len(tokens)) if y not in chosen]
            gain = {y: value(tokens, (*chosen, y), text, 0.7) - now for y in rest}
            if step == counts[image] or not rest:
                gains |= gain
                break
            best = max(rest, key=lambda y: gain[y])
            gains[best] = gain[best]
            chosen = (*chosen, best)
        kept = selection.kept[image].nonzero().flatten().tolist()
        assert kept == sorted(places[y] for y in chosen)
        ours = [float(scores.score[image, p]) for p in places]
        assert ours == pytest.approx([gains[y] for y in range(len(tokens))], abs=1e-8)


def test_greedy_is_near_brute_force_and_equals_it_for_one() -> None:
    for seed in range(20):
        unit = torch.nn.functional.normalize(normal(1, 7, 4, seed=seed), dim=-1)
        similar = (1 + unit @ unit.transpose(1, 2)) / 2
        extra = normal(1, 7, seed=seed + 50).abs()
        valid = torch.ones(1, 7, dtype=torch.bool)
        for count in (1, 3, 7):
            order = chosen_greedily(similar, extra, torch.tensor([count]), valid)[0].tolist()

            def worth(chosen: tuple[int, ...], s: Tensor = similar[0], e: Tensor = extra[0]) -> Any:
                return float(s[:, list(chosen)].amax(1).sum() + e[list(chosen)].sum())

            best = max(worth(chosen) for chosen in itertools.combinations(range(7), count))
            # Nemhauser's bound; exact for one token and for all.
            least = best if count in (1, 7) else (1 - 1 / math.e) * best
            assert worth(tuple(order)) >= least - 1e-9
            assert len(set(order)) == count


def test_where_all_tokens_are_equal_the_first_stay() -> None:
    similar, extra = torch.ones(2, 5, 5), torch.full((2, 5), 0.3)
    valid = torch.tensor([[True] * 5, [False, True, True, False, True]])
    similar, extra = similar * (valid[:, None] & valid[..., None]), extra * valid
    counts = torch.tensor([3, 2])
    order = chosen_greedily(similar, extra, counts, valid)
    assert order[0].tolist() == [0, 1, 2]
    assert order[1, :2].tolist() == [1, 2]
    gain = gain_when_chosen(similar, extra, order, counts, valid)
    assert gain[0].tolist() == pytest.approx([5.3, 0.3, 0.3, 0.3, 0.3])
    assert gain[1].tolist() == pytest.approx([0, 3.3, 0.3, 0, 0.3])


# Stage 2 ----------------------------------------------------------------------------------------


def behind(seed: int, cut: Cut, one: CATP = ONE, dead: Any = (), rows: Any = ROWS) -> Prompt:
    """What a cut behind the looks sees; the looks see two layers with other weights."""
    made = prompt(rows, 9, seed=seed, dead=dead, cut=cut, answers=2)
    for offset, look in enumerate((BEFORE, AT)):
        layer = prompt(rows, 9, seed=seed + 100 * (offset + 1), dead=dead, cut=look, answers=2)
        one.look(replace(layer.seen, **last_row(layer.text), memory=made.seen.memory))
    return made


def risen(seed: int, image: int, dead: Any = ()) -> list[float]:
    paid = []
    for offset in (1, 2):
        layer = prompt(ROWS, 9, seed=seed + 100 * offset, dead=dead, answers=2)
        paid.append(layer.mean_paid(image, [layer.text.last]))
    return [max(0.0, b - a) for a, b in zip(*paid, strict=True)]


def finals(one: Prompt, retention: float = 0.5) -> list[int]:
    totals = one.seen.totals.tolist()
    left = one.seen.valid.sum(1).tolist()
    return [min(max(1, round(retention * t)), n) for t, n in zip(totals, left, strict=True)]


@pytest.mark.parametrize("dead", [(), DEAD])
@pytest.mark.parametrize("seed", range(3))
def test_stage_2a_ranks_context_images_together(
    seed: int, dead: tuple[tuple[int, int], ...]
) -> None:
    one = behind(seed, CONTEXT, dead=dead)
    scores, selection = choose(ONE, one.seen)
    found: dict[tuple[int, int], float] = {}
    for image in range(IMAGES):
        row = int(one.seen.rows[image])
        query = max(i for i in range(IMAGES) if one.seen.rows[i] == row)
        v_q = mean(one, row, one.columns[query] + texts(one, query))
        places = one.seen.valid[image].nonzero().flatten().tolist()
        for place, rise in zip(places, risen(seed, image, dead), strict=True):
            truth = rise + 0.6 * cosine(one.seen.features[image, place], v_q)
            assert float(scores.score[image, place]) == pytest.approx(truth, abs=1e-8)
            found[image, place] = truth
    quota = finals(one)
    for context in ((0, 1), (4,)):
        here = sorted((k for k in found if k[0] in context), key=lambda k: -found[k])
        kept = [next(k for k in here if k[0] == image) for image in context]
        for token in here:
            if token not in kept and len(kept) < sum(quota[i] for i in context):
                kept.append(token)
        ours = {(i, p) for i in context for p in selection.kept[i].nonzero().flatten().tolist()}
        assert ours == set(kept)
    for image in QUERIES:
        assert torch.equal(selection.kept[image], one.seen.valid[image])


@pytest.mark.parametrize("dead", [(), DEAD])
@pytest.mark.parametrize("seed", range(3))
def test_stage_2b_ranks_the_query_image_by_the_context(
    seed: int, dead: tuple[tuple[int, int], ...]
) -> None:
    one = behind(seed, QUERY, dead=dead)
    scores, selection = choose(ONE, one.seen)
    quota = finals(one)
    for image in range(IMAGES):
        row = int(one.seen.rows[image])
        images = [i for i in range(IMAGES) if one.seen.rows[i] == row]
        if len(images) == 1:
            context = texts(one, image)
        else:
            end = min(one.columns[images[-1]])
            words = one.text.words[row].nonzero().flatten().tolist()
            context = [c for i in images[:-1] for c in one.columns[i]]
            context += [c for c in words if min(one.columns[images[0]]) < c < end]
        v_c = mean(one, row, context)
        places = one.seen.valid[image].nonzero().flatten().tolist()
        truth = {p: cosine(one.seen.features[image, p], v_c) for p in places}
        for place in places:
            assert float(scores.score[image, place]) == pytest.approx(truth[place], abs=1e-8)
        if image in QUERIES:
            best = sorted(places, key=lambda p: -truth[p])[: quota[image]]
        else:
            best = places
        assert selection.kept[image].nonzero().flatten().tolist() == sorted(best)


def test_equal_scores_keep_the_first_and_one_of_each_image() -> None:
    one = behind(0, CONTEXT, replace(ONE, relevance=0.0))
    flat = torch.zeros_like(one.seen.valid, dtype=torch.float64)
    memory = dict.fromkeys(one.seen.memory, flat)
    _, selection = choose(replace(ONE, relevance=0.0), replace(one.seen, memory=memory))
    # Quotas of 9 and 6 tokens are 4 and 3, together 7: one of the second, six of the first.
    assert selection.kept[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert selection.kept[1].nonzero().flatten().tolist() == [0]


def test_one_demonstration_can_take_the_quota_of_another() -> None:
    one = behind(1, CONTEXT)
    _, before = choose(ONE, one.seen)
    memory = dict(one.seen.memory)
    name = list(memory)[1]
    memory[name] = memory[name].clone()
    memory[name][1] += 5.0
    _, after = choose(ONE, replace(one.seen, memory=memory))
    assert int(after.kept[1].sum()) == 6 > int(before.kept[1].sum())
    assert int(after.kept[:2].sum()) == int(before.kept[:2].sum()) == 7
    assert int(after.kept[0].sum()) == 1


def test_the_overall_share_is_met() -> None:
    """⌊S_i (1 − R/2)⌋ after stage 1, and R of all tokens of a row in the end."""
    for dropped in (0.5, 0.25, 0.75):
        one = CATP(retention=1 - dropped)
        stage1 = [math.floor(total * (1 - dropped / 2)) for total in (8, 16, 4)]
        assert [one.count(FIRST, total, 32) for total in (8, 16, 4)] == stage1
    rows = ((1, 8, 2, 16, 2, 4, 1),)
    one = CATP(retention=0.25)
    valid = torch.arange(16) < torch.tensor([[5], [10], [2]])
    dead = [(i, p) for i, n in enumerate((8, 16, 4)) for p in range(n) if not valid[i, p]]
    made = behind(0, CONTEXT, one, dead, rows)
    _, context = choose(one, made.seen)
    assert int(context.kept[:2].sum()) == 6
    assert int(context.kept[2].sum()) == 2
    _, query = choose(one, behind(0, QUERY, one, dead, rows).seen)
    assert int(query.kept[2].sum()) == 1


def test_layers_and_counts() -> None:
    kinds = [(c.stage, c.layer, c.attends, c.drops, c.number) for c in ONE.cuts(32)]
    assert kinds == [
        (Stage.INPUT, None, False, True, 0),
        (Stage.LAYER, 5, True, False, 1),
        (Stage.LAYER, 6, True, False, 2),
        (Stage.LAYER, 7, False, True, 3),
        (Stage.LAYER, 8, False, True, 4),
    ]
    assert [ONE.middle(layers) for layers in (4, 8, 28, 32, 40)] == [1, 2, 5, 6, 8]
    assert replace(ONE, layer=10).cuts(40)[3].layer == 11
    counts = [CATP(keep_tokens=128).count(cut, 576, 32) for cut in ONE.cuts(32)]
    assert counts == [352, 352, 352, 352, 128]
    assert ONE.count(FIRST, 1, 32) == ONE.count(QUERY, 1, 32) == 1
    for wanted in (400, 192):
        one = CATP(keep_tokens=wanted, budget_is="average")
        stages = [one.count(cut, 576, 32) for cut in (FIRST, QUERY)]
        assert abs(layer_average(stages, (0, 8), 32, 576) - wanted) <= 0.5


def test_options_are_checked() -> None:
    for options in ({"layer": 0}, {"alignment": -0.1}, {"relevance": -1.0}):
        with pytest.raises(CompressionError, match=next(iter(options))):
            CATP(retention=0.5, **options)  # type: ignore[arg-type]
    for one, layers in ((ONE, 3), (replace(ONE, layer=30), 32)):
        with pytest.raises(CompressionError, match="it needs layers"):
            one.cuts(layers)
    with pytest.raises(CompressionError, match="has not looked"):
        ONE.score(prompt(ROWS, 3, cut=CONTEXT).seen)
    with pytest.raises(CompressionError, match="attention of the last prompt token"):
        ONE.look(prompt(ROWS, 3, cut=AT).seen)


# All stages -------------------------------------------------------------------------------------


def made_at(cut: Cut, rows: Any = ROWS, dead: Any = DEAD) -> Seen:
    if cut is FIRST:
        return prompt(rows, 3, seed=4, cut=FIRST, answers=2, dead=dead).seen
    return behind(4, cut, dead=dead, rows=rows).seen


@pytest.mark.parametrize("cut", [FIRST, CONTEXT, QUERY])
def test_a_row_alone_is_treated_as_in_the_batch(cut: Cut) -> None:
    dead = tuple(one for one in DEAD if one[0] < 3)
    both, single = made_at(cut, dead=dead), made_at(cut, ROWS[:1], dead)
    (many, kept), (one, own) = choose(ONE, both), choose(ONE, single)
    assert torch.equal(own.kept, kept.kept[:3])
    for image in range(3):
        here = single.valid[image]
        assert torch.allclose(one.score[image][here], many.score[image][here])


@pytest.mark.parametrize("cut", [FIRST, CONTEXT, QUERY])
def test_garbage_where_no_token_is_changes_nothing(cut: Cut) -> None:
    what = made_at(cut)
    text = what.text
    assert text is not None
    dirty = replace(text, hidden=text.hidden.masked_fill(~text.live[..., None], torch.nan))
    memory = {k: v.masked_fill(~what.valid, torch.nan) for k, v in what.memory.items()}
    again = replace(spoiled(what), text=dirty, memory=memory)
    (clean, kept), (other, same) = choose(ONE, what), choose(ONE, again)
    assert torch.equal(kept.kept, same.kept)
    assert torch.equal(clean.score[what.valid], other.score[what.valid])
    assert bool(other.score.isfinite().all())
    assert bool(other.log_score.isfinite().all())


@pytest.mark.parametrize("cut", [FIRST, CONTEXT, QUERY])
def test_score_gradient_agrees_with_finite_differences(cut: Cut) -> None:
    what = made_at(cut)
    weights, direction = normal(*what.valid.shape, seed=8), normal(*what.features.shape, seed=9)

    def loss(features: Tensor) -> Tensor:
        scores = ONE.score(replace(what, features=features))
        return (scores.log_score * weights)[what.valid].sum()

    features = what.features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(features), features)
    assert bool(gradient.isfinite().all())
    assert float((gradient * ~what.valid[..., None]).abs().max()) == 0
    step = 1e-6
    forth, back = (loss(what.features + s * step * direction) for s in (1, -1))
    slope = float((gradient * direction)[what.valid].sum())
    assert abs(slope) > 1e-3
    assert float(forth - back) / 2 / step == pytest.approx(slope, rel=1e-4)


def test_one_token_images_and_whole_budgets() -> None:
    rows = ((1, 1, 1, 1, 1),)
    for cut in (FIRST, CONTEXT, QUERY):
        made = (
            prompt(rows, 1, cut=cut).seen
            if cut is FIRST
            else behind(0, cut, CATP(keep_tokens=1), rows=rows).seen
        )
        scores, selection = choose(CATP(keep_tokens=1), made)
        assert bool(selection.kept.all())
        assert bool(scores.log_score.isfinite().all())
    whole = prompt(ROWS, [9, 6, 7, 8, 5, 4], cut=FIRST).seen
    assert torch.equal(choose(CATP(retention=1.0), whole)[1].kept, whole.valid)
    assert torch.equal(
        choose(CATP(retention=1.0), made_at(CONTEXT))[1].kept, made_at(CONTEXT).valid
    )


def test_half_precision_ranks_in_float32() -> None:
    what = made_at(FIRST)
    assert what.text is not None
    text = replace(what.text, hidden=what.text.hidden.bfloat16())
    half = replace(what, features=what.features.bfloat16(), text=text)
    scores, _ = choose(ONE, half)
    assert scores.score.dtype == torch.float32
    assert torch.allclose(
        scores.score[what.valid].double(), ONE.score(what).score[what.valid], atol=0.2
    )
