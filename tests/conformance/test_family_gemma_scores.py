"""Scores and gradients of the tiny Gemma models under compression."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from families import gemma
from families.gemma_runs import (
    CLOSE,
    KINDS,
    PICKED,
    Kind,
    batch,
    model_of,
    positions,
)
from torch import Tensor

from targets.compression import FastV, compress
from targets.compression.base import Compressor
from targets.families import family_of


@pytest.fixture(scope="module", params=sorted(KINDS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kind(name: str) -> Kind:
    return KINDS[name]


@pytest.fixture
def model(name: str) -> Any:
    return model_of(name)


@pytest.fixture(params=sorted(PICKED))
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return PICKED[request.param]


EAGER = [name for name in sorted(KINDS) if "sdpa" not in name and name != "gemma3 past its window"]


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_fastv_score_is_the_slice_of_eager_attention(name: str, layer: int) -> None:
    kind = KINDS[name]
    model, inputs = model_of(name), batch(kind, gemma.CASES["padded"])
    where = positions(kind, inputs["attention_mask"])
    out = model(**inputs, position_ids=where, output_attentions=True)
    weights = out.attentions[layer - 1].mean(1)
    image = inputs["input_ids"] == gemma.IMAGE
    truth = torch.stack([weights[row, -1][image[row]] for row in range(3)])
    with compress(model, FastV(layer=layer, keep_tokens=9), mode="observe") as session:
        model(**inputs, position_ids=where)
    assert torch.allclose(session.trace.score, truth, rtol=0, atol=1e-6)
    assert float(truth.std()) > 1e-3 or kind.window is not None


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_attention_of_text_rows_follows_the_models_mask(name: str, layer: int) -> None:
    """Rows before the last one: a prefix sees what comes later, blocks see themselves."""
    kind = KINDS[name]
    model, inputs = model_of(name), batch(kind, gemma.CASES["padded"])
    where = positions(kind, inputs["attention_mask"])
    out = model(**inputs, position_ids=where, output_attentions=True)
    image = inputs["input_ids"] == gemma.IMAGE
    with compress(model, FastV(layer=layer, keep_tokens=9), mode="observe") as session:
        model(**inputs, position_ids=where)
    sight = session.trace.cuts[0].seen.text
    assert sight is not None
    for rows in (sight.words, image):
        paid = sight.attention(rows)
        for row in range(3):
            truth = out.attentions[layer - 1][row][:, rows[row]].mean(1)[:, image[row]]
            assert torch.allclose(paid[row], truth, rtol=0, atol=1e-6)


def gradient(model: Any, kind: Kind, one: Compressor | None, **options: Any) -> Tensor:
    inputs = batch(kind, gemma.CASES["padded"])
    pixels = inputs.pop("pixel_values").clone().requires_grad_()
    where = positions(kind, inputs["attention_mask"])
    if one is None:
        logits = model(**inputs, pixel_values=pixels, position_ids=where, use_cache=False).logits
    else:
        with compress(model, one, **options):
            logits = model(
                **inputs, pixel_values=pixels, position_ids=where, use_cache=False
            ).logits
    (found,) = torch.autograd.grad(logits[:, -1].square().sum(), pixels)
    return found


def apart(one: Tensor, other: Tensor) -> float:
    """Distance of two gradients, in lengths of the second."""
    return float((one - other).norm() / other.norm())


def test_gradients_reach_the_pixels(model: Any, kind: Kind, compressor: Compressor) -> None:
    hard = gradient(model, kind, compressor)
    assert bool(hard.isfinite().all())
    assert bool((hard.flatten(1).abs().amax(1) > 0).all())
    masked = gradient(model, kind, compressor, mode="masked")
    assert apart(hard, masked) < 1e-4
    everything = gradient(model, kind, tiny.whole(compressor))
    assert apart(everything, gradient(model, kind, None)) < 1e-4
    assert apart(hard, everything) > 1e-2


@pytest.mark.parametrize("method", ["fastv", "divprune kept"])
def test_straight_through_changes_gradients_only(model: Any, kind: Kind, method: str) -> None:
    one, inputs = PICKED[method], batch(kind, gemma.CASES["padded"])
    with torch.no_grad(), compress(model, one):
        plain = model(**inputs).logits[:, -1]
    with torch.no_grad(), compress(model, one, relax=1.0):
        relaxed = model(**inputs).logits[:, -1]
    assert torch.allclose(plain, relaxed, **CLOSE)
    hard, soft = gradient(model, kind, one), gradient(model, kind, one, relax=1.0)
    assert bool(soft.isfinite().all())
    assert apart(hard, soft) > 1e-2


def test_gradient_checkpointing_replays_the_same(name: str, kind: Kind) -> None:
    checkpointed = kind.build()
    checkpointed.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}
    )
    checkpointed.train()
    assert checkpointed.model.language_model.layers[0].gradient_checkpointing
    for method in ("fastv", "divprune kept", "visionzip"):
        plain = gradient(model_of(name), kind, PICKED[method])
        assert apart(plain, gradient(checkpointed, kind, PICKED[method])) < 1e-5


@pytest.mark.parametrize("name", ["paligemma sdpa", "paligemma 2", "gemma3 sdpa"])
def test_half_precision(name: str, compressor: Compressor) -> None:
    kind = KINDS[name]
    model = kind.build().to(torch.bfloat16)
    inputs = batch(kind, gemma.CASES["padded"])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad(), compress(model, compressor) as hard:
        short = model(**inputs).logits[:, -1].float()
    with torch.no_grad(), compress(model, compressor, mode="masked", kept=hard.trace.selection):
        full = model(**inputs).logits[:, -1].float()
    assert float((short - full).abs().mean()) < 0.05 * float(full.abs().mean())


@pytest.mark.parametrize("case", ["one image", "mixed"])
def test_a_token_is_projected_as_the_model_does(model: Any, kind: Kind, case: str) -> None:
    inputs, family = batch(kind, gemma.CASES[case]), family_of(model)
    pixels = {"pixel_values": inputs["pixel_values"]}
    layouts = family.images(inputs["input_ids"] == gemma.IMAGE, inputs)
    assert sum(one.tokens for one in layouts) == int((inputs["input_ids"] == gemma.IMAGE).sum())
    truth = model.get_image_features(**pixels).pooler_output
    seen = family.encode(pixels, layouts)
    assert torch.allclose(family.project_tokens(seen.patches), truth, rtol=0, atol=1e-5)
    assert torch.equal(family.encoded(pixels).pooler_output, truth)


@pytest.mark.parametrize("name", ["paligemma eager", "gemma3 eager"])
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_tower_scores_are_means_of_eager_attention(name: str, layer: int | None) -> None:
    kind = KINDS[name]
    model, inputs = model_of(name), batch(kind, gemma.CASES["two images"])
    family = family_of(model)
    tap = family.tap((0, 1))
    with tap, torch.no_grad():
        family.run_tower({"pixel_values": inputs["pixel_values"]})
    assert tap.latest is not None
    layouts = family.images(inputs["input_ids"] == gemma.IMAGE, inputs)
    seen = family.arrange(tap.latest, layouts, inputs)
    tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    received = tower.attentions[2 if layer is None else layer].mean(2)  # [I, N, patches]
    side = round(received.shape[2] ** 0.5)
    pool = side // family.grid[0]
    map_of = received.unflatten(2, (side, side))
    truth = torch.nn.functional.avg_pool2d(map_of, pool).flatten(2)
    assert torch.allclose(seen.attention(layer), truth, rtol=0, atol=1e-6)
