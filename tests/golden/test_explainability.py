"""Compression by explainability: the network, the score, the labels, and what was shipped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import slow_trained as slow
import torch
import weights
from sight import ROWS, Prompt, normal, prompt
from torch import Tensor

from targets.compression import Explainability, compress, trained
from targets.compression.explainability import asking
from targets.compression.explainability_net import CHANNELS, RelevanceNet
from targets.compression.trace import choose
from targets.scenes import passes, world
from targets.scenes.compressors import questions
from targets.scenes.compressors.relevance import label, relevance
from targets.scenes.compressors.train_explainability import divergence, target_of

DEAD = ((0, 2), (1, 0), (2, 11))


def ours(keep: int = 4, **more: Any) -> Explainability:
    return Explainability(keep_tokens=keep, weights=weights.folder("explainability"), **more)


def shipped_numbers() -> dict[str, Tensor]:
    """Weights as they come back from their float16 file."""
    found = trained.read("explainability", weights.folder("explainability")).tensors
    return {name: value.double() for name, value in found.items()}


def slow_score(one: Prompt, image: int) -> list[float]:
    row = int(one.seen.rows[image])
    asked = one.words(row) or [one.text.last]
    paid = one.mean_paid(image, asked)
    present = one.seen.valid[image].tolist()
    living = iter(paid)
    attention = [next(living) if there else 0.0 for there in present]
    return slow.explainability(shipped_numbers(), attention, present)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dead", [(), DEAD])
def test_score_is_the_network_on_the_attention_of_the_question(seed: int, dead: Any) -> None:
    one = prompt(ROWS, 4, seed=seed, dead=dead)
    scores = ours().score(one.seen)
    for image in range(len(one.columns)):
        truth = torch.tensor(slow_score(one, image), dtype=torch.float64)
        assert torch.allclose(scores.score[image], truth, rtol=0, atol=1e-9)
        there = one.seen.valid[image]
        assert float(scores.score[image].sum()) == pytest.approx(1, abs=1e-9)
        assert torch.allclose(scores.log_score[image][there].exp(), truth[there], atol=1e-9)
        assert not bool(scores.score[image][~there].any())


def test_without_text_behind_the_image_the_last_prompt_token_asks() -> None:
    one = prompt(((2, 9), (3, 4, 2)), 3)
    columns = asking(one.text)
    assert columns.nonzero().tolist() == [[0, 10], [1, 9], [1, 10]]
    scores = ours().score(one.seen)
    assert torch.allclose(
        scores.score[0], torch.tensor(slow_score(one, 0), dtype=torch.float64), atol=1e-9
    )


def test_an_image_scores_the_same_alone_and_in_a_batch() -> None:
    both = prompt(ROWS, 3, seed=4)
    alone = prompt(ROWS[2:], 3, seed=4 + 20)
    # Weights come from the seed too, so those of the batch are lent.
    lent = replace(alone.text, family=both.text.family)
    one = ours().score(replace(alone.seen, text=lent)).score[0]
    assert torch.allclose(ours().score(both.seen).score[-1, :12], one[:12], rtol=0, atol=1e-12)


@pytest.mark.parametrize("keep", [1, 5, 12])
def test_the_best_are_kept(keep: int) -> None:
    one = prompt(ROWS, [min(keep, n) for n in (9, 5, 7, 12)], seed=2)
    scores, selection = choose(ours(keep), one.seen)
    for image, there in enumerate(one.seen.valid):
        order = sorted(there.nonzero().flatten().tolist(), key=lambda p: -scores.score[image, p])
        truth = set(order[: int(one.seen.counts[image])])
        assert set(selection.kept[image].nonzero().flatten().tolist()) == truth


def test_ties_keep_the_first() -> None:
    """A network whose head is nil says the same of all tokens."""
    one = prompt(ROWS, 2, seed=2)
    method = ours(2)
    method._network.head.weight.zero_()
    scores, selection = choose(method, one.seen)
    assert torch.allclose(scores.score[0, :9], torch.full((9,), 1 / 9).double())
    assert selection.kept.nonzero().tolist() == [[i, p] for i in range(4) for p in (0, 1)]


def test_gradient_agrees_with_finite_differences() -> None:
    network = weights.network("explainability").double()
    attention = normal(2, 14, seed=1).softmax(1).requires_grad_()
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[1, 9:] = False
    weight = normal(2, 14, seed=2)
    assert torch.autograd.gradcheck(lambda a: (network(a, valid) * weight).sum(), attention)


def test_attention_of_nothing_gives_no_nan() -> None:
    network = weights.network("explainability")
    attention = torch.zeros(1, 6).requires_grad_()
    logs = network(attention, torch.ones(1, 6, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(logs[0, 0], attention)
    assert bool(logs.isfinite().all())
    assert bool(gradient.isfinite().all())


def test_the_network_of_the_paper() -> None:
    network: Any = trained.seeded(RelevanceNet, {})
    assert tuple(point.out_features for point in network.point) == CHANNELS
    assert [across.groups for across in network.across] == [1, 32, 64, 128, 256]
    again: Any = trained.seeded(RelevanceNet, {})
    assert torch.equal(network.head.weight, again.head.weight)


# Labels


def toy(seed: int) -> tuple[list[Tensor], Tensor]:
    """Two layers of attention of two heads over five positions, and a logit for each of 3 rows."""
    hidden, attentions = normal(3, 5, 4, seed=seed), []
    for layer in range(2):
        logits = normal(3, 2, 5, 5, seed=seed + layer + 1) + hidden.sum((1, 2))[:, None, None, None]
        causal = torch.ones(5, 5, dtype=torch.bool).tril()
        attention = logits.masked_fill(~causal, -torch.inf).softmax(-1).requires_grad_()
        attentions.append(attention)
        values = torch.stack(
            [hidden @ normal(4, 4, seed=seed + 7 * layer + h) for h in range(2)], 1
        )
        hidden = hidden + (attention @ values).sum(1).tanh()
    return attentions, (hidden[torch.arange(3), torch.tensor([4, 2, 3])] ** 2).sum(1)


@pytest.mark.parametrize("seed", range(4))
def test_relevance_is_the_authors_rule(seed: int) -> None:
    """R = I; R ← R + E_h[(A · dA)⁺] R for each layer, matrices and all."""
    attentions, logits = toy(seed)
    rows = torch.tensor([4, 2, 3])
    found = relevance(attentions, logits, rows)
    for image in range(3):
        slopes = torch.autograd.grad(logits[image], attentions, retain_graph=True)
        total = torch.eye(5).double()
        for attention, slope in zip(attentions, slopes, strict=True):
            heads = [
                (attention[image, h].detach() * slope[image, h]).clamp(min=0) for h in range(2)
            ]
            total = total + (heads[0] + heads[1]) / 2 @ total
        assert torch.allclose(found[image], total[rows[image]], rtol=0, atol=1e-12)
    assert float((found > 1e-6).double().mean()) > 0.5


def test_the_lower_half_of_a_label_is_nothing() -> None:
    found = target_of(torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]]))
    truth = [[4 / 9, 0, 3 / 9, 2 / 9, 0], [1 / 3, 1 / 3, 1 / 3, 0, 0]]
    assert torch.allclose(found, torch.tensor(truth))
    assert float(divergence(found, (found + 1e-12).log())) == pytest.approx(0, abs=1e-5)
    assert float(divergence(found[:1], torch.full((1, 5), 0.2).log())) > 0.1


def test_labels_point_at_the_evidence() -> None:
    model = questions.frozen("scenes-a", "eager")
    drawn = questions.draw("validation", 0, 4)
    found = label(model, drawn)
    assert found.question.tolist() == list(range(len(drawn)))
    asked = [q for index in range(4) for q in world.scene("validation", index).questions]
    shares, areas = [], []
    for one, question in zip(found.relevance, asked, strict=True):
        evidence = torch.from_numpy(world.tokens_of(question.evidence))
        shares.append(float(one[evidence].sum() / one.sum()))
        areas.append(float(evidence.float().mean()))
    assert sum(shares) > 5 * sum(areas)
    wrong = replace(drawn, targets=drawn.targets.clamp_max(9))
    assert len(label(model, wrong).question) < len(drawn)


def test_attention_of_a_label_is_what_the_compressor_sees() -> None:
    """Training and use read the same numbers, or the network would be useless."""
    model = questions.frozen("scenes-a", "eager")
    drawn = questions.draw("validation", 0, 2)
    found = label(model, drawn)
    method = Explainability(keep_tokens=16)
    heard: list[Tensor] = []
    method._network.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    for number in range(len(drawn)):
        words = [int(word) for word in drawn.words[number] if word > 0]
        ids = torch.tensor([[1, *[4] * 144, *words]])
        pixels = passes.pixels(drawn.images[drawn.scene[number]][None])
        with torch.no_grad(), compress(model, method):
            model(input_ids=ids, pixel_values=pixels)
        assert torch.allclose(heard[-1][0], found.attention[number], rtol=0, atol=1e-6)
