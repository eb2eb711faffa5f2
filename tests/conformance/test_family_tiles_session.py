"""Compression of InternVL, Idefics3 and SmolVLM does exactly what it says and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from annotated_types import Ge, Interval
from families import idefics3, internvl, smolvlm, tiled
from families.tiled_runs import STEPS, by_hand, decode, text_of

from targets.base import Knowledge
from targets.compression import DivPrune, FastV, Random, Uniform, VisionZip, compress
from targets.compression.base import Compressor, Scores, Seen, Stage
from targets.errors import CompressionError
from targets.lvlm import LVLM

CLOSE = {"rtol": 0, "atol": 1e-4}
BUILT = {"internvl": internvl, "idefics3": idefics3, "smolvlm": smolvlm}
COMPRESSORS: dict[str, Compressor] = {
    "random at the first layer": Random(layer=0, retention=0.3, positions="reindex"),
    "fastv": FastV(layer=2, retention=0.3),
    "fastv reindexed": FastV(layer=1, retention=0.3, positions="reindex"),
    "visionzip": VisionZip(retention=0.5),
    "visionzip kept": VisionZip(retention=0.5, positions="keep"),
    "divprune": DivPrune(retention=0.3),
    "divprune kept": DivPrune(keep_tokens=5, positions="keep"),
    "random inside": Random(layer=3, retention=0.3),
    "uniform": Uniform(retention=0.3),
}
PLAIN = sorted(name for name, one in COMPRESSORS.items() if not one.merges)
PROCESSORS = {name: module.build_processor() for name, module in BUILT.items()}
BATCHES = {
    name: {case: tiled.inputs(PROCESSORS[name], rows) for case, rows in tiled.CASES.items()}
    for name in BUILT
}
SEEDS = (3, 4, 5)


@pytest.fixture(scope="module", params=[(n, a) for n in BUILT for a in ("sdpa", "eager")])
def model(request: pytest.FixtureRequest) -> Any:
    name, attention = request.param
    return BUILT[name].build_model(attention)


@pytest.fixture(scope="module", params=BUILT)
def sdpa(request: pytest.FixtureRequest) -> Any:
    return BUILT[request.param].build_model("sdpa")


@pytest.fixture(params=sorted(COMPRESSORS))
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return COMPRESSORS[request.param]


def batches(model: Any) -> dict[str, dict[str, Any]]:
    return BATCHES[model.config.model_type]


def whole(one: Compressor) -> Compressor:
    return replace(one, keep_tokens=None, retention=1.0)  # type: ignore[type-var]


def hooks(model: Any) -> int:
    modules = list(model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_keeping_everything_is_the_identity(model: Any, compressor: Compressor) -> None:
    for case in ("one image", "mixed"):
        plain = decode(model, batches(model)[case])
        with compress(model, whole(compressor)) as session:
            kept = decode(model, batches(model)[case])
        assert session.trace.kept is not None
        assert torch.equal(plain, kept)


def test_text_alone_is_left_alone(sdpa: Any, compressor: Compressor) -> None:
    plain = decode(sdpa, batches(sdpa)["text only"])
    with compress(sdpa, compressor):
        assert torch.equal(plain, decode(sdpa, batches(sdpa)["text only"]))


@pytest.mark.parametrize("case", ["padded", "two images", "mixed"])
def test_dropped_tokens_equal_masked_ones(model: Any, compressor: Compressor, case: str) -> None:
    batch = batches(model)[case]
    plain = decode(model, batch)
    with compress(model, compressor, seeds=SEEDS) as hard:
        short = decode(model, batch)
    with compress(model, compressor, seeds=SEEDS, mode="masked") as masked:
        full = decode(model, batch)
    assert torch.equal(hard.trace.kept, masked.trace.kept)
    assert torch.allclose(short, full, **CLOSE)
    # Otherwise a session that does nothing would pass.
    assert float((plain - short).abs().max()) > 1e-2


@pytest.mark.parametrize("case", ["padded", "mixed"])
def test_padded_batch_equals_single_runs(sdpa: Any, compressor: Compressor, case: str) -> None:
    """Rows with other numbers of tiles, padding tiles, or no picture do not disturb each other."""
    name = sdpa.config.model_type
    with compress(sdpa, compressor, seeds=SEEDS) as batched:
        together = decode(sdpa, BATCHES[name][case])
    image = 0
    for row, prompt in enumerate(tiled.CASES[case]):
        single = tiled.inputs(PROCESSORS[name], (prompt,))
        with compress(sdpa, compressor, seeds=SEEDS[row : row + 1]) as alone:
            assert torch.allclose(together[row], decode(sdpa, single)[0], **CLOSE)
        for kept in alone.trace.kept if alone.trace.kept is not None else ():
            assert torch.equal(batched.trace.kept[image, : len(kept)], kept)
            assert not bool(batched.trace.kept[image, len(kept) :].any())
            image += 1
    assert image == len(batched.trace.kept)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("case", ["one image", "two images"])
def test_equals_calling_the_layers_by_hand(model: Any, name: str, case: str) -> None:
    """An independent road for prefill and every decoding step; text between tiles stays."""
    one, batch = COMPRESSORS[name], batches(model)[case]
    with compress(model, one, seeds=(3,)) as session:
        ours = decode(model, batch)
    image = BUILT[model.config.model_type].IMAGE
    truth = by_hand(model, image, batch, ours[:, :-1].argmax(-1), one, session.trace)
    assert torch.allclose(ours[0], truth[0, -STEPS:], **CLOSE)


def test_generate_equals_decoding_by_hand(sdpa: Any, compressor: Compressor) -> None:
    model = sdpa
    for case in ("padded", "mixed"):
        batch = batches(model)[case]
        with compress(model, compressor, seeds=SEEDS):
            logits = decode(model, batch)
        with compress(model, compressor, seeds=SEEDS):
            out = model.generate(
                **batch,
                max_new_tokens=STEPS,
                do_sample=False,
                eos_token_id=-1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        made = out.sequences[:, batch["input_ids"].shape[1] :]
        assert torch.equal(made, logits.argmax(-1))
        assert torch.allclose(torch.stack(out.logits, 1), logits, **CLOSE)


def test_cache_holds_what_the_plan_says(sdpa: Any, compressor: Compressor) -> None:
    batch = batches(sdpa)["one image"]
    tokens = 3 * BUILT[sdpa.config.model_type].TOKENS
    with compress(sdpa, compressor) as session:
        decode(sdpa, batch)
    length = batch["input_ids"].shape[1]
    start = compressor.prunes_at or 0
    plan = [length] * start + [length - tokens + compressor.budget(tokens)] * (4 - start)
    assert [session.trace.lengths[layer] for layer in range(4)] == plan
    held = [sdpa.last_cache.get_seq_length(layer) for layer in range(4)]
    assert held == [entries + STEPS - 1 for entries in plan]


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("name", BUILT)
def test_fastv_score_is_the_slice_of_eager_attention(name: str, layer: int) -> None:
    """Across the text between tiles, in rows of one and two pictures."""
    eager, batch = BUILT[name].build_model("eager"), BATCHES[name]["mixed"]
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    out = eager(**batch, position_ids=positions, output_attentions=True)
    row = out.attentions[layer - 1].mean(1)[:, -1]
    here = batch["input_ids"] == BUILT[name].IMAGE
    truth = torch.cat([row[index][here[index]] for index in range(3)])
    for model in (eager, BUILT[name].build_model("sdpa")):
        with compress(model, FastV(layer=layer, retention=0.3), mode="observe") as session:
            model(**batch, position_ids=positions)
        counts = [one.tokens for one in session.trace.cuts[0].seen.lattice.layouts]
        scores = [score[:n] for score, n in zip(session.trace.score, counts, strict=True)]
        assert torch.allclose(torch.cat(scores), truth, rtol=0, atol=1e-6)
    assert float(truth.amax() / truth.mean()) > 1.5, "too flat to test anything"


def test_nothing_stays_behind(sdpa: Any, compressor: Compressor) -> None:
    batch = batches(sdpa)["padded"]
    decode(sdpa, batch, 2)  # transformers installs hooks of its own, once
    before, names = hooks(sdpa), (set(sdpa.__dict__), set(text_of(sdpa).__dict__))
    with compress(sdpa, compressor):
        decode(sdpa, batch, 2)
        assert hooks(sdpa) > before
    assert (hooks(sdpa), (set(sdpa.__dict__), set(text_of(sdpa).__dict__))) == (before, names)


@pytest.mark.parametrize("where", ["tower", "projector", "layer", "lm_head"])
@pytest.mark.parametrize("name", ["fastv", "visionzip"])
def test_hooks_go_when_the_model_fails(sdpa: Any, name: str, where: str) -> None:
    compressor = COMPRESSORS[name]
    batch = batches(sdpa)["padded"]
    plain = decode(sdpa, batch, 2)
    before = hooks(sdpa)
    core = sdpa.model
    tower = getattr(core, "vision_tower", None) or core.vision_model
    projector = getattr(core, "multi_modal_projector", None) or core.connector
    parts = {
        "tower": tower.encoder,
        "projector": projector,
        "layer": text_of(sdpa).layers[1].mlp,
        "lm_head": sdpa.lm_head,
    }

    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    handle = parts[where].register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="injected"), compress(sdpa, compressor):
            decode(sdpa, batch, 2)
    finally:
        handle.remove()
    assert hooks(sdpa) == before
    assert torch.equal(plain, decode(sdpa, batch, 2))


@pytest.mark.parametrize("name", BUILT)
def test_bfloat16_runs(name: str, compressor: Compressor) -> None:
    model, batch = BUILT[name].build_model().to(torch.bfloat16), dict(BATCHES[name]["mixed"])
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    with compress(model, compressor) as session:
        made = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert made.shape[0] == 3
    assert session.trace.score.dtype == torch.float32
    assert bool(session.trace.score.isfinite().all())


def test_gradients_reach_the_pixels_of_kept_tiles(model: Any, compressor: Compressor) -> None:
    """And are the same as of the masked twin, which computes everything."""
    batch, found = dict(batches(model)["one image"]), []
    for mode in ("hard", "masked"):
        batch["pixel_values"] = batch["pixel_values"].detach().requires_grad_()
        with compress(model, compressor, mode=mode):  # type: ignore[arg-type]
            logits = model(**batch).logits[:, -1]
        found.append(torch.autograd.grad(logits.log_softmax(-1)[0, 5], batch["pixel_values"])[0])
    assert float(found[0].abs().max()) > 1e-5
    scale = float(found[1].abs().max())
    assert torch.allclose(found[0] / scale, found[1] / scale, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", BUILT)
def test_checkpointing_changes_nothing(name: str, compressor: Compressor) -> None:
    """Layers that are run again in the backward pass find the same cut."""
    found = []
    for again in (False, True):
        model, batch = BUILT[name].build_model(), dict(BATCHES[name]["padded"])
        if again:
            enable = getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
            model.train()
        batch["pixel_values"] = batch["pixel_values"].detach().requires_grad_()
        with compress(model, compressor, seeds=SEEDS):
            logits = model(**batch, use_cache=False).logits[:, -1]
            loss = logits.log_softmax(-1)[:, 5].sum()
            found.append(torch.autograd.grad(loss, batch["pixel_values"])[0])
    scale = float(found[0].abs().max())
    assert scale > 1e-5
    assert torch.allclose(found[0] / scale, found[1] / scale, rtol=0, atol=1e-4)


@dataclass(frozen=True, kw_only=True)
class Shortening(Compressor):
    """One that would act inside the tower."""

    name: ClassVar[str] = "shortening"
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None

    @property
    def stage(self) -> Stage:
        return Stage.TOWER

    def score(self, seen: Seen) -> Scores:
        raise AssertionError


def test_changing_the_tower_is_refused(sdpa: Any) -> None:
    with pytest.raises(CompressionError, match=r"a token is a block of \d × \d patches"):
        compress(sdpa, Shortening(retention=0.5))


# The whole road: a picture of its own size, the processor's prompt, views -----------------------


@pytest.fixture(scope="module")
def target(sdpa: Any) -> LVLM:
    return LVLM(sdpa, PROCESSORS[sdpa.config.model_type])


def images(*numbers: int) -> torch.Tensor:
    found = [np.array(tiled.picture(number)) for number in numbers]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("name", [None, "fastv", "visionzip", "divprune"])
def test_answers_are_those_of_the_model(sdpa: Any, target: LVLM, name: str | None) -> None:
    """Against `generate` on what the real processor makes."""
    kind = sdpa.config.model_type
    one = None if name is None else COMPRESSORS[name]
    ours = target.answer(images(1, 5, 9), tiled.QUESTIONS, compressor=one, max_new_tokens=5)
    rows = tuple((question, (n,)) for question, n in zip(tiled.QUESTIONS, (1, 5, 9), strict=True))
    batch = tiled.inputs(PROCESSORS[kind], rows)
    width = batch["input_ids"].shape[1]
    if one is None:
        made = sdpa.generate(**batch, max_new_tokens=5, do_sample=False)
    else:
        with compress(sdpa, one) as session:
            made = sdpa.generate(**batch, max_new_tokens=5, do_sample=False)
        assert torch.equal(ours.kept, session.trace.kept)
    texts = PROCESSORS[kind].tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
    assert ours.texts == tuple(text.strip() for text in texts)
    assert len(set(ours.texts)) > 1


def test_option_scores_are_the_models(sdpa: Any, target: LVLM) -> None:
    kind = sdpa.config.model_type
    ours = target.option_scores(images(1), tiled.QUESTIONS[:1], ("yes", "no one"))
    words = BUILT[kind].WORDS
    for column, option in enumerate(("yes", "no one")):
        batch = tiled.inputs(PROCESSORS[kind], ((tiled.QUESTIONS[0], (1,)),))
        answer = [*(words.index(word) for word in option.split()), words.index("</s>")]
        start = batch["input_ids"].shape[1] - 1
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([answer])], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with torch.no_grad():
            logits = sdpa(**batch).logits[0, start:-1].log_softmax(-1)
        truth = sum(float(logits[i, word]) for i, word in enumerate(answer))
        assert float(ours[0, column]) == pytest.approx(truth, abs=1e-3)


@pytest.mark.parametrize("name", ["fastv", "visionzip", "divprune"])
def test_views_give_gradients_to_the_original_picture(target: LVLM, name: str) -> None:
    pixels = images(1, 5).requires_grad_()
    view: Any = target.view(Knowledge.WHITE_BOX, COMPRESSORS[name])
    questions, answers = tiled.QUESTIONS[:2], ("yes", "blue")
    loss = view.answer_nll(pixels, questions, answers, path="compressed")
    (gradient,) = torch.autograd.grad(loss.sum(), pixels)
    assert gradient.shape == (2, 3, 30, 60)
    assert float((gradient.abs().amax(1) > 0).float().mean()) > 0.9
    ranking = view.rank(pixels, questions)
    (gradient,) = torch.autograd.grad(ranking.score.square().sum(), pixels)
    assert float(gradient.abs().max()) > 0
    loss = view.answer_nll(pixels, questions, answers, path="compressed", straight_through=True)
    (gradient,) = torch.autograd.grad(loss.sum(), pixels)
    assert float(gradient.abs().max()) > 0


def test_the_tower_as_an_attacker_sees_it(sdpa: Any, target: LVLM) -> None:
    view: Any = target.view(Knowledge.ENCODER)
    seen = view.encode(images(1, 5))
    tokens = 3 * BUILT[sdpa.config.model_type].TOKENS
    assert seen.features.shape[:2] == (2, tokens)
    assert seen.score.shape == (2, tokens)
    alone = view.encode(images(5))
    assert torch.allclose(seen.features[1:], alone.features, rtol=0, atol=1e-4)
