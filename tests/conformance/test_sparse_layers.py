"""Token Sparse Attention in a model: heads skip tokens in some layers, and nothing is removed."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, batch, build
from test_gradients import Replayed, checkpointed
from torch import Tensor
from transformers import DynamicCache

from targets.base import Knowledge
from targets.caches import cache_name
from targets.compression import FastV, TokenSparseAttention, compress
from targets.compression.token_sparse_attention import HEADS
from targets.errors import CompressionError
from targets.families import family_of
from targets.lvlm import LVLM

STEPS, CLOSE = 6, {"rtol": 0, "atol": 5e-5}
HALF = TokenSparseAttention(retention=0.5, window=4)
COVERED = TokenSparseAttention(coverage=0.2, window=4, layers=(1, 3))
OFFICIAL = TokenSparseAttention(variant="official", coverage=0.4, window=3, min_tokens=2)
ALL = {"half": HALF, "covered": COVERED, "official": OFFICIAL}


@pytest.fixture(params=sorted(ALL))
def one(request: pytest.FixtureRequest) -> TokenSparseAttention:
    return ALL[request.param]


def decode(model: Any, questions: tuple[str, ...], images: Tensor) -> Tensor:
    ids, mask, positions = tiny.prompt(questions)
    with torch.no_grad():
        return tiny.greedy(model, ids, mask, tiny.normalised(images), STEPS, positions)


def forward(model: Any, pixels: Tensor, **more: Any) -> Tensor:
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits: Tensor = model(**inputs, pixel_values=pixels, use_cache=False, **more).logits
    return logits


def heads_of(session: Any) -> dict[int, Tensor]:
    found: dict[int, Tensor] = session.trace.cuts[0].seen.memory[HEADS]
    return found


# An independent road ----------------------------------------------------------------------------


class ByHand:
    """A row through the layers, head by head, with keys and values in lists."""

    def __init__(self, model: Any, one: TokenSparseAttention) -> None:
        self.text, self.head = model.model.language_model, model.lm_head
        self.one, self.cache = one, [([], []) for _ in self.text.layers]
        self.images: list[int] = []
        self.dropped: dict[int, Tensor] = {}

    def step(self, hidden: Tensor) -> Tensor:
        """Logits of further columns ``[n, D]``; the first call is the prompt."""
        start = len(self.cache[0][0])
        for number, layer in enumerate(self.text.layers):
            hidden = hidden + self.attention(number, layer, layer.input_layernorm(hidden), start)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        out: Tensor = self.head(self.text.norm(hidden))
        return out

    def attention(self, number: int, layer: Any, normed: Tensor, start: int) -> Tensor:
        module, positions = layer.self_attn, torch.arange(start, start + len(normed))[None]
        cosine, sine = self.text.rotary_emb(normed, positions)

        def turned(values: Tensor) -> Tensor:
            first, second = values.chunk(2, -1)
            rotated = torch.cat([-second, first], -1)
            return values * cosine[0][:, None] + rotated * sine[0][:, None]

        width = module.head_dim
        q = turned(module.q_proj(normed).unflatten(-1, (-1, width)))
        keys, values = self.cache[number]
        keys += list(turned(module.k_proj(normed).unflatten(-1, (-1, width))))
        values += list(module.v_proj(normed).unflatten(-1, (-1, width)))
        k, v = (torch.stack(part).repeat_interleave(2, 1) for part in (keys, values))
        logits = torch.einsum("ihe,jhe->hij", q, k) * width**-0.5
        column = torch.arange(start, start + len(normed))
        later = torch.arange(len(keys)) > column[:, None]
        paid = logits.masked_fill(later, -torch.inf).softmax(-1)
        gone = torch.zeros(len(paid), len(keys), dtype=torch.bool)
        if start == 0 and number in self.one.sparse(len(self.text.layers)):
            gone = self.gone(paid)
            self.dropped[number] = gone
            paid = (logits.masked_fill(later | gone[:, None], -torch.inf)).softmax(-1)
            paid = paid.nan_to_num().masked_fill(gone[:, :, None], 0)
        out: Tensor = module.o_proj(torch.einsum("hij,jhe->ihe", paid, v).flatten(1))
        return out

    def gone(self, paid: Tensor) -> Tensor:
        """Columns each head drops, bool ``[N, n]``."""
        length, one = paid.shape[2], self.one
        window = one.window or 16
        if one.variant == "image_only":
            window = min(window, length - 1 - max(self.images))
        size = length - window
        mass = paid[:, size:, :size].mean(1)
        padded = torch.nn.functional.pad(mass, (3, 3))
        smooth = torch.stack([padded[:, i : i + 7].sum(1) / 7 for i in range(size)], 1)
        free = list(range(size)) if one.variant == "official" else self.images
        share = smooth[:, free].mean(0)
        share = share / (share.sum() + 1e-8)
        if one.retention is not None:
            number = len(free) - round(one.retention * len(free))
        else:
            number = int((share.sort().values.cumsum(0) < one.coverage).sum())
            number += int(number > 0)
        number = min(number, len(free) - (one.min_tokens or 1))
        gone = torch.zeros(len(paid), length, dtype=torch.bool)
        for head in range(len(paid)):
            order = smooth[head, free].argsort()[:number].tolist()
            gone[head, [free[i] for i in order]] = True
        return gone


def by_hand(
    model: Any, question: str, picture: Tensor, made: list[int], one: TokenSparseAttention
) -> tuple[Tensor, ByHand]:
    """Logits of the prompt's last column and of every decoded token."""
    ids, run = tiny.rendered(question), ByHand(model, one)
    run.images = [i for i, token in enumerate(ids) if token == 4]
    embeds = model.get_input_embeddings()(torch.tensor(ids))
    tower = model.model.vision_tower(picture, output_hidden_states=True).hidden_states[-1]
    embeds[run.images] = model.model.multi_modal_projector(tower[0, 1:])
    logits = [run.step(embeds)[-1]]
    for token in made:
        logits.append(run.step(model.get_input_embeddings()(torch.tensor([token])))[-1])
    return torch.stack(logits), run


def test_equals_heads_by_hand(model: Any, one: TokenSparseAttention) -> None:
    images = tiny.pictures(3)
    with compress(model, one) as session:
        ours = decode(model, tiny.QUESTIONS, images)
    heads = heads_of(session)
    assert sorted(heads) == list(one.sparse(4))
    for row, question in enumerate(tiny.QUESTIONS):
        pixels, made = tiny.normalised(images[row : row + 1]), ours[row, :-1].argmax(-1).tolist()
        with torch.no_grad():
            truth, run = by_hand(model, question, pixels, made, one)
        assert torch.allclose(ours[row], truth, **CLOSE)
        for layer, kept in heads.items():
            assert torch.equal(kept[row], ~run.dropped[layer][:, run.images])
            assert bool((~kept[row]).any())
    first = heads[one.sparse(4)[0]]
    assert not torch.equal(first[:, 0], first[:, 1])  # each head has its own


# Nothing is removed -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"coverage": 0.0}, {"retention": 1.0}])
@pytest.mark.parametrize("variant", ["image_only", "official"])
def test_keeping_everything_is_dense_attention(model: Any, options: Any, variant: Any) -> None:
    images = tiny.pictures(3)
    plain = decode(model, tiny.QUESTIONS, images)
    one = TokenSparseAttention(variant=variant, min_tokens=1, window=4, **options)
    with compress(model, one) as session:
        kept = decode(model, tiny.QUESTIONS, images)
    assert torch.equal(plain, kept)
    assert bool(session.trace.kept.all())
    assert all(bool(kept.all()) for kept in heads_of(session).values())


def test_official_defaults_leave_short_prompts_alone(sdpa: Any) -> None:
    plain = decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))
    with compress(sdpa, TokenSparseAttention(variant="official", coverage=0.5)):
        assert torch.equal(plain, decode(sdpa, tiny.QUESTIONS, tiny.pictures(3)))


def test_sequence_and_cache_stay_whole(sdpa: Any, one: TokenSparseAttention) -> None:
    plain = decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))
    length = tiny.prompt(tiny.QUESTIONS)[0].shape[1]
    with compress(sdpa, one) as session:
        short = decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))
    assert float((plain - short).abs().max()) > 1e-2
    held = [sdpa.last_cache.get_seq_length(layer) for layer in range(4)]
    assert held == [length + STEPS - 1] * 4
    assert set(session.trace.lengths.values()) == {length}
    assert session.trace.tokens[3].tolist() == [tiny.TOKENS] * 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_taken_apart_and_put_together_it_is_the_layer(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys, masks and cache of every family, with all columns gathered by every head."""
    model, processor = build(family, attention)
    inputs = batch(family, processor, "mixed")
    cache, other = DynamicCache(), DynamicCache()
    with torch.no_grad():
        plain = model(**inputs, **{cache_name(): cache}, use_cache=True).logits

    calls = []

    def everything(self: Any, family: Any, layer: int, state: Any, ranked: Any, parts: Any) -> Any:
        group, text = state.group(layer), ranked.seen.text
        columns = self._columns(group.slots, group.mask.bool(), text.last)
        calls.append(layer)
        return columns.prompt[:, None].expand(-1, parts[0].shape[1], -1), columns

    monkeypatch.setattr(TokenSparseAttention, "attend", everything)
    layers = len(family_of(model).layers)
    one = TokenSparseAttention(layers=tuple(range(layers)))
    with torch.no_grad(), compress(model, one):
        ours = model(**inputs, **{cache_name(): other}, use_cache=True).logits
    assert calls == list(range(layers))
    assert torch.allclose(ours[:, -1], plain[:, -1], **CLOSE)
    for layer in range(layers):
        for name in ("keys", "values"):
            first, second = (getattr(c.layers[layer], name) for c in (cache, other))
            live = inputs["attention_mask"].bool()[:, None, :, None]
            assert torch.allclose(first * live, second * live, **CLOSE)


# Batches, answers, sessions ---------------------------------------------------------------------


def test_padded_batch_equals_single_runs(model: Any, one: TokenSparseAttention) -> None:
    images = tiny.pictures(3)
    with compress(model, one) as session:
        together = decode(model, tiny.QUESTIONS, images)
    many = heads_of(session)
    for row, question in enumerate(tiny.QUESTIONS):
        with compress(model, one) as session:
            alone = decode(model, (question,), images[row : row + 1])
        assert torch.allclose(together[row], alone[0], **CLOSE)
        for layer, kept in heads_of(session).items():
            assert torch.equal(kept[0], many[layer][row])


def test_rows_with_two_images_one_and_none(model: Any, one: TokenSparseAttention) -> None:
    rows = [tiny.rendered(tiny.QUESTIONS[0], n) for n in (2, 1, 0)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    pixels = tiny.normalised(tiny.pictures(3))
    with torch.no_grad(), compress(model, one) as session:
        together = tiny.greedy(model, ids, mask, pixels, STEPS, positions)
    assert session.trace.rows.tolist() == [0, 0, 1]
    for row, pictures in enumerate((pixels[:2], pixels[2:], None)):
        alone_ids = torch.tensor([rows[row]])
        ones = torch.ones_like(alone_ids)
        with torch.no_grad(), compress(model, one):
            alone = tiny.greedy(model, alone_ids, ones, pictures, STEPS, ones.cumsum(1) - 1)
        assert torch.allclose(together[row], alone[0], **CLOSE)
    with torch.no_grad():
        plain = tiny.greedy(model, alone_ids, ones, None, STEPS, ones.cumsum(1) - 1)
    assert torch.equal(alone, plain)


def test_scored_answers_see_what_decoded_ones_see(sdpa: Any, one: TokenSparseAttention) -> None:
    """Teacher forcing, the answers padded to different lengths, against decoding with the cache."""
    images, pixels = tiny.pictures(3), tiny.normalised(tiny.pictures(3))
    with compress(sdpa, one):
        decoded = decode(sdpa, tiny.QUESTIONS, images)
    answers = decoded[:, :3].argmax(-1)
    ids, mask, _ = tiny.prompt(tiny.QUESTIONS)
    ids, mask = torch.cat([ids, answers], 1), torch.cat([mask, torch.ones_like(answers)], 1)
    mask[1, -1] = 0
    with torch.no_grad(), compress(sdpa, one, answer_columns=3):
        forced = sdpa(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            pixel_values=pixels,
        ).logits[:, -4:]
    for row, steps in enumerate((4, 3, 4)):
        assert torch.allclose(forced[row, :steps], decoded[row, :steps], **CLOSE)


def test_one_session_generates_again_and_again(sdpa: Any, one: TokenSparseAttention) -> None:
    images, others = tiny.pictures(3), tiny.pictures(3, seed=4)
    with compress(sdpa, one) as session:
        first = decode(sdpa, tiny.QUESTIONS, images)
        report = heads_of(session)
        decode(sdpa, tiny.QUESTIONS[::-1], others)
        assert heads_of(session) is not report
        again = decode(sdpa, tiny.QUESTIONS, images)
    assert torch.equal(first, again)
    assert all(torch.equal(report[layer], heads_of(session)[layer]) for layer in report)


@pytest.mark.parametrize("mode", ["hard", "masked", "observe"])
def test_nothing_stays_behind(sdpa: Any, one: TokenSparseAttention, mode: Any) -> None:
    modules = [layer.self_attn for layer in sdpa.model.language_model.layers]
    before = [dict(module.__dict__) for module in modules]
    plain = decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))
    with compress(sdpa, one, mode=mode):
        inside = decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))
        taken = [layer for layer in range(4) if "forward" in modules[layer].__dict__]
        assert taken == ([] if mode == "observe" else list(one.sparse(4)))
    assert torch.equal(plain, inside) == (mode == "observe")
    assert [set(module.__dict__) for module in modules] == [set(one) for one in before]
    assert torch.equal(plain, decode(sdpa, tiny.QUESTIONS, tiny.pictures(3)))
    with pytest.raises(RuntimeError, match="injected"), compress(sdpa, one):
        raise RuntimeError("injected")
    assert [set(module.__dict__) for module in modules] == [set(one) for one in before]


def test_a_forward_of_somebody_else_comes_back(sdpa: Any) -> None:
    module = sdpa.model.language_model.layers[3].self_attn
    own = module.forward
    module.__dict__["forward"] = own
    try:
        with compress(sdpa, HALF):
            assert module.forward is not own
        assert module.__dict__["forward"] is own
    finally:
        del module.__dict__["forward"]


# Imposed sets and other compressors -------------------------------------------------------------


def test_its_own_kept_set_changes_nothing(model: Any, one: TokenSparseAttention) -> None:
    images = tiny.pictures(3)
    with compress(model, one) as session:
        first = decode(model, tiny.QUESTIONS, images)
    with compress(model, one, kept=session.trace.selection):
        assert torch.equal(first, decode(model, tiny.QUESTIONS, images))


def test_an_imposed_set_is_kept_by_all_heads(model: Any, one: TokenSparseAttention) -> None:
    images, plain = tiny.pictures(3), decode(model, tiny.QUESTIONS, tiny.pictures(3))
    kept = torch.rand(3, tiny.TOKENS, generator=torch.Generator().manual_seed(1)) < 0.4
    with compress(model, one, kept=kept) as session:
        short = decode(model, tiny.QUESTIONS, images)
    for layer, heads in heads_of(session).items():
        assert layer in one.sparse(4)
        assert torch.equal(heads, kept[:, None].expand_as(heads))
    assert torch.equal(session.trace.kept, kept)
    for row, question in enumerate(tiny.QUESTIONS):
        with compress(model, one, kept=kept[row : row + 1]):
            alone = decode(model, (question,), images[row : row + 1])
        assert torch.allclose(short[row], alone[0], **CLOSE)
    with compress(model, one, kept=torch.ones_like(kept)):
        assert torch.equal(plain, decode(model, tiny.QUESTIONS, images))


@pytest.mark.parametrize("relax", [None, 1.0])
def test_behind_a_compressor_that_removes(
    model: Any, one: TokenSparseAttention, relax: Any
) -> None:
    images, stages = tiny.pictures(3), [FastV(layer=1, keep_tokens=20), one]
    made = []
    for mode in ("hard", "masked"):
        with compress(model, stages, mode=mode, relax=relax) as session:
            made.append(decode(model, tiny.QUESTIONS, images))
        assert session.trace.tokens[3].tolist() == [20] * 3
    assert torch.allclose(*made, **CLOSE)
    with compress(model, stages[:1]):
        assert float((made[0] - decode(model, tiny.QUESTIONS, images)).abs().max()) > 1e-3


def test_caps_on_logits_are_refused(sdpa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = sdpa.model.language_model.layers[3].self_attn
    monkeypatch.setattr(attention, "attn_logit_softcapping", 30.0, raising=False)
    with pytest.raises(CompressionError, match="cap logits"):
        compress(sdpa, HALF)


# Gradients --------------------------------------------------------------------------------------


def test_score_gradient_agrees_with_finite_differences(one: TokenSparseAttention) -> None:
    view: Any = LVLM(tiny.build_model().double(), tiny.build_processor()).view(
        Knowledge.WHITE_BOX, one
    )
    images = tiny.pictures(3).double().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(3, tiny.TOKENS, generator=generator).double()
    direction = torch.randn(images.shape, generator=generator).double()

    def loss(x: Tensor) -> Tensor:
        total: Tensor = (view.rank(x, tiny.QUESTIONS).log_score * weights).sum()
        return total

    (gradient,) = torch.autograd.grad(loss(images), images)
    slope = float((gradient * direction).sum())
    with torch.no_grad():
        forth, back = (loss(images + s * 1e-4 * direction) for s in (1, -1))
    assert abs(slope) > 1e-2
    assert float(forth - back) / 2e-4 == pytest.approx(slope, rel=2e-3)


def test_answer_gradient_agrees_with_finite_differences(one: TokenSparseAttention) -> None:
    """Through gather and scatter: the choice is hard, so a step must not change it."""
    model = tiny.build_model().double()
    pixels = tiny.normalised(tiny.pictures(3)).double().requires_grad_()
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(5)).double()

    def loss(x: Tensor) -> Tensor:
        with compress(model, one) as session:
            out = forward(model, x)[:, -1].log_softmax(-1)[:, 7].sum()
        kept.append(torch.stack(list(heads_of(session).values())))
        return out

    kept: list[Tensor] = []
    (gradient,) = torch.autograd.grad(loss(pixels), pixels)
    slope = float((gradient * direction).sum())
    with torch.no_grad():
        forth, back = (loss(pixels + s * 2e-5 * direction) for s in (1, -1))
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    assert abs(slope) > 1e-2
    assert float(forth - back) / 4e-5 == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize("road", ["checkpointed", "replayed"])
def test_checkpointing_changes_nothing(one: TokenSparseAttention, road: str) -> None:
    found = []
    for again in (False, True):
        model = tiny.build_model()
        session = compress(model, one)
        stack = model.model.language_model
        if again and road == "checkpointed":
            checkpointed(model)
            model.train()
        elif again:
            stack.layers = torch.nn.ModuleList(Replayed(layer) for layer in stack.layers)
        pixels = tiny.normalised(tiny.pictures(3)).requires_grad_()
        with session:
            logits = forward(model, pixels)
            score, first = session.trace.score, heads_of(session)
            # A second forward before the backward: replays must find their own state.
            ids = tiny.prompt(tiny.QUESTIONS[:1])[0]
            model(input_ids=ids, pixel_values=pixels[:1].flip(2), use_cache=False)
            second = {layer: kept.clone() for layer, kept in heads_of(session).items()}
            loss = logits[:, -1].log_softmax(-1)[:, 7].sum() + score.square().sum()
            (gradient,) = torch.autograd.grad(loss, pixels)
            assert all(torch.equal(second[n], heads_of(session)[n]) for n in second)
            assert all(len(first[n]) == 3 and len(second[n]) == 1 for n in first)
        found.append((logits.detach(), gradient))
        if again and road == "replayed":
            assert all(layer.runs >= 3 for layer in stack.layers)
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)
    assert float(found[0][1].abs().max()) > 1e-4


def test_views_and_bfloat16(one: TokenSparseAttention) -> None:
    target = LVLM(tiny.build_model().to(torch.bfloat16), tiny.build_processor())
    images = tiny.pictures(3).requires_grad_()
    answered = target.answer(images.detach(), tiny.QUESTIONS, compressor=one)
    assert answered.left is not None
    assert answered.left.tolist() == [tiny.TOKENS] * 3
    view: Any = target.view(Knowledge.WHITE_BOX, one)
    for straight in (False, True):
        loss = view.answer_nll(
            images, tiny.QUESTIONS, tiny.ANSWERS, path="compressed", straight_through=straight
        )
        (gradient,) = torch.autograd.grad(loss.sum(), images)
        assert bool(gradient.isfinite().all())
        assert float(gradient.abs().max()) > 0
    assert torch.equal(view.rank(images, tiny.QUESTIONS).kept, answered.kept)


def test_swapping_selections(sdpa: Any, one: TokenSparseAttention) -> None:
    target = LVLM(sdpa, tiny.build_processor())
    images, others = tiny.pictures(3), tiny.pictures(3, seed=9)
    first = target.answer(images, tiny.QUESTIONS, compressor=one)
    swapped = target.answer(others, tiny.QUESTIONS, compressor=one, kept=first.selection)
    assert torch.equal(swapped.kept, first.kept)
    back = target.answer(images, tiny.QUESTIONS, compressor=one, kept=first.selection)
    assert back.texts == first.texts
