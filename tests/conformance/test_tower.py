"""Methods inside the vision tower of a tiny LLaVA against tokens in lists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import slow_tower
import tiny
import torch
import weights
from torch import Tensor

from targets.compression import (
    AttentiveRemoval,
    FastV,
    Sparsifiner,
    ToMe,
    VisionZip,
    compress,
    trained,
)
from targets.errors import CompressionError
from targets.scenes import WEIGHTS
from targets.scenes.compressors import train_sparsifiner, training


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build_model().double()


def emerged(model: Any, one: ToMe, images: Tensor) -> tuple[Tensor, Any, Any]:
    """What entered the projector, the trace, and what emerged."""
    ids, mask, _ = tiny.prompt(tiny.texts(len(images)))
    caught: list[Tensor] = []
    projector = model.model.multi_modal_projector
    handle = projector.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    pixels = tiny.normalised(images).double()
    with torch.no_grad(), compress(model, one) as session:
        model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    handle.remove()
    merged = one.emerge(caught[0], session._tower_memory[id(one)])
    return caught[0], session.trace, merged


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"keep_tokens": 9}, (27, 18, 9)),
        ({"keep_tokens": 35}, (36, 35, 35)),
        ({"keep_tokens": 5}, (20, 10, 5)),
        ({"keep_tokens": 12, "schedule": "decreasing"}, (20, 12, 12)),
        ({"keep_tokens": 12, "schedule": "increasing"}, (36, 24, 12)),
        ({"retention": 1.0}, (36, 36, 36)),
    ],
)
def test_merging_in_the_tower(model: Any, options: dict[str, Any], left: Sequence[int]) -> None:
    images = tiny.pictures(3)
    features, trace, merged = emerged(model, ToMe(**options), images)
    assert features.shape == (3, left[-1], 32)
    for row in range(3):
        pixels = tiny.normalised(images[row : row + 1]).double()
        tokens, score = slow_tower.tome(model, pixels, left)
        assert merged.source[row].tolist() == [token.place for token in tokens]
        truth = torch.stack([token.value for token in tokens])
        assert torch.allclose(features[row], truth, rtol=0, atol=1e-6)
        assert torch.allclose(trace.score[row].double(), torch.tensor(score).double(), atol=1e-6)
        assert sum(len(token.members) for token in tokens) == tiny.TOKENS
        places = sorted(token.place for token in tokens)
        assert trace.kept[row].nonzero().flatten().tolist() == places


def test_sizes_and_places_account_for_every_patch(model: Any) -> None:
    one = ToMe(keep_tokens=7)
    ids, mask, _ = tiny.prompt(tiny.texts(2))
    pixels = tiny.normalised(tiny.pictures(2)).double()
    with torch.no_grad(), compress(model, one) as session:
        model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    run = session._tower_memory[id(one)]["run"]
    for tokens in run.tokens.values():
        assert tokens.size[:, 1:].sum(1).tolist() == [tiny.TOKENS] * 2
        assert tokens.place[:, 0].tolist() == [-1, -1]
        inside = torch.stack([(tokens.where == n).sum(1) for n in range(tokens.size.shape[1])], 1)
        assert torch.equal(inside[:, 1:].float(), tokens.size[:, 1:])


def test_spatial_order_sorts_what_official_order_leaves(model: Any) -> None:
    images = tiny.pictures(2)
    plain, _, official = emerged(model, ToMe(keep_tokens=9), images)
    _, trace, spatial = emerged(model, ToMe(keep_tokens=9, order="spatial"), images)
    assert not torch.equal(official.source, spatial.source)
    for row in range(2):
        order = official.source[row].argsort()
        assert torch.equal(spatial.source[row], official.source[row][order])
        assert torch.equal(spatial.features[row], plain[row][order])
    # A patch's features are those of the token it went into, whatever the order.
    _, other, _ = emerged(model, ToMe(keep_tokens=9), images)
    assert torch.allclose(trace.seen.features, other.seen.features, atol=1e-9)


def test_what_does_not_fit_is_refused(model: Any) -> None:
    with pytest.raises(CompressionError, match="leave at least 5 of 36, not 4"):
        compress(model, ToMe(keep_tokens=4))
    compress(model, ToMe(keep_tokens=1, variant="post"))  # as many rounds as it takes
    with pytest.raises(CompressionError, match="no whole grid of patches left"):
        compress(model, [ToMe(keep_tokens=9), VisionZip(keep_tokens=8)])
    with pytest.raises(CompressionError, match="use mode rank"):
        compress(model, ToMe(keep_tokens=9), mode="observe")
    assert not any("forward" in b.__dict__ for b in model.model.vision_tower.encoder.layers)


def test_encoder_outputs_from_outside_are_refused(model: Any) -> None:
    ids, _, _ = tiny.prompt(tiny.QUESTIONS[:1])
    pixels = tiny.normalised(tiny.pictures(1)).double()
    encoded = model.model.get_image_features(pixel_values=pixels)
    with compress(model, ToMe(keep_tokens=9)):
        model(input_ids=ids, pixel_values=pixels)
        with pytest.raises(CompressionError, match="pass pixel_values"):
            model(input_ids=ids, mm_encoder_outputs={"image": encoded})


def test_layers_are_given_back(model: Any) -> None:
    blocks = model.model.vision_tower.encoder.layers
    with compress(model, ToMe(keep_tokens=9)):
        assert all("forward" in block.__dict__ for block in blocks)
    assert not any("forward" in block.__dict__ for block in blocks)
    assert not any(one._forward_hooks for one in blocks[0].self_attn.children())


def test_a_stage_in_the_language_model_follows() -> None:
    model = tiny.build_model()
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    pixels, found = tiny.normalised(tiny.pictures(3)), []
    for mode in ("hard", "masked"):
        with (
            torch.no_grad(),
            compress(
                model, [ToMe(keep_tokens=12), FastV(layer=2, keep_tokens=4)], mode=mode
            ) as session,
        ):
            found.append(tiny.greedy(model, ids, mask, pixels, 4, positions))
        assert session.trace.tokens[0].tolist() == [12] * 3
        assert session.trace.tokens[3].tolist() == [4] * 3
        assert session.trace.kept.sum(1).tolist() == [4] * 3
    assert torch.allclose(*found, rtol=0, atol=5e-5)


def close(product: Tensor, truth: list[float]) -> bool:
    return torch.allclose(product.double(), torch.tensor(truth).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("keep", "block", "left"), [(9, 1, 9), (1, 1, 1), (9, 2, 8), (18, 3, 18)])
def test_attentive_removal(model: Any, keep: int, block: int, left: int) -> None:
    images = tiny.pictures(3)
    one = AttentiveRemoval(keep_tokens=keep, block=block)
    features, trace, merged = emerged(model, one, images)
    assert features.shape == (3, left, 32)
    for row in range(3):
        pixels = tiny.normalised(images[row : row + 1]).double()
        tokens, score = slow_tower.attentive(model, pixels, left, block)
        assert merged.source[row].tolist() == [token.place for token in tokens]
        truth = torch.stack([token.value for token in tokens])
        assert torch.allclose(features[row], truth, rtol=0, atol=1e-6)
        assert close(trace.score[row], score)


def test_attentive_score_is_the_mean_of_eager_attention(model: Any) -> None:
    eager, images = tiny.build_model("eager", feature_layer=-2), tiny.pictures(2)
    _, trace, _ = emerged(eager.double(), AttentiveRemoval(keep_tokens=9), images)
    out = eager.model.vision_tower(tiny.normalised(images).double(), output_attentions=True)
    truth = torch.stack(out.attentions).mean((0, 2))[:, 0, 1:]  # the layer behind features too
    assert torch.allclose(trace.score.double(), truth.double(), atol=1e-6)


def test_blocks_have_to_tile_the_grid(model: Any) -> None:
    with pytest.raises(CompressionError, match="do not tile"):
        compress(model, AttentiveRemoval(keep_tokens=9, block=4))


@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({"keep_tokens": 9}, {1: 18, 2: 9}),
        ({"keep_tokens": 5, "layers": (0,)}, {0: 5}),
        ({"keep_tokens": 1, "layers": (0, 1, 2)}, {0: 11, 1: 4, 2: 1}),
        ({"keep_tokens": 10, "layers": (2,), "connections": 0.3}, {2: 10}),
        ({"keep_tokens": 9, "connections": 0.5}, {1: 18, 2: 9}),
        ({"retention": 1.0, "connections": 0.2}, {1: 36, 2: 36}),
    ],
)
def test_sparsifiner(model: Any, options: dict[str, Any], after: dict[int, int]) -> None:
    images, folder = tiny.pictures(2), weights.folder("sparsifiner")
    one = Sparsifiner(**options, weights=folder)
    features, trace, merged = emerged(model, one, images)
    state = None
    if one.connections < 1:
        state = {name: value.double() for name, value in one._network.state_dict().items()}
    for row in range(2):
        pixels = tiny.normalised(images[row : row + 1]).double()
        tokens, score = slow_tower.sparsifiner(model, pixels, after, one.connections, state)
        assert merged.source[row].tolist() == [token.place for token in tokens]
        truth = torch.stack([token.value for token in tokens])
        assert torch.allclose(features[row], truth, rtol=0, atol=1e-5)
        assert close(trace.score[row], score)


def test_every_connection_is_dense_attention(model: Any) -> None:
    """The mask of a predictor that may name every key hides nothing."""
    images, folder = tiny.pictures(2), weights.folder("sparsifiner")
    dense, _, _ = emerged(model, Sparsifiner(keep_tokens=9), images)
    all_of_them = Sparsifiner(keep_tokens=9, connections=1 - 1e-7, weights=folder)
    masked, _, _ = emerged(model, all_of_them, images)
    assert torch.allclose(dense, masked, atol=1e-9)


def test_connections_change_the_answer_and_drop_nothing() -> None:
    model, folder = tiny.build_model(), weights.folder("sparsifiner")
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    pixels = tiny.normalised(tiny.pictures(3))
    plain = tiny.greedy(model, ids, mask, pixels, 4, positions)
    one = Sparsifiner(retention=1.0, connections=0.2, weights=folder)
    with compress(model, one) as session:
        sparse = tiny.greedy(model, ids, mask, pixels, 4, positions)
        assert bool(session.trace.kept.all())
        for row in range(3):
            ones = torch.ones_like(ids[row : row + 1, mask[row] > 0])
            alone = tiny.greedy(
                model,
                ids[row : row + 1, mask[row] > 0],
                ones,
                pixels[row : row + 1],
                4,
                ones.cumsum(1) - 1,
            )
            assert torch.allclose(alone[0], sparse[row], rtol=0, atol=5e-5)
    assert float((plain - sparse).abs().max()) > 1e-2


def test_predictors_of_another_tower_are_refused(model: Any) -> None:
    other = tiny.build_model(vision_layers=4)
    one = Sparsifiner(keep_tokens=9, connections=0.5, weights=weights.folder("sparsifiner"))
    with pytest.raises(CompressionError, match="vision layers 4 instead of 3"):
        compress(other, one)
    with pytest.raises(CompressionError, match="name none behind it"):
        compress(model, Sparsifiner(keep_tokens=9, layers=(3,)))
    compress(other, Sparsifiner(keep_tokens=9, weights=weights.folder("sparsifiner")))


def test_shipped_predictors_fit_their_model() -> None:
    config = json.loads((trained.folder_of("sparsifiner", "scenes-a") / "config.json").read_text())
    model = json.loads((WEIGHTS / "scenes-a" / "config.json").read_text())["vision_config"]
    side = model["image_size"] // model["patch_size"]
    assert config["network"]["tokens"] == side**2 + 1
    assert config["network"]["width"] == model["hidden_size"] // model["num_attention_heads"]
    assert config["model"]["vision_layers"] == model["num_hidden_layers"]
    network = Sparsifiner(retention=0.5)._network
    assert all(bool(value.isfinite().all()) for value in network.parameters())
    assert not any(value.requires_grad for value in network.parameters())


def test_the_recipe_learns_attention(tmp_path: Path) -> None:
    how = training.Optimisation(seed=1, steps=30, batch=2, lr=1e-2)
    recipe = train_sparsifiner.Recipe(scenes=4, validation=2, checked=(0.25,), how=how)
    train_sparsifiner.train(recipe, "scenes-a", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / training.LOG).read_text().splitlines()]
    before, after = (line["validation"] for line in lines if "validation" in line)
    assert after["loss"] < before["loss"]
    assert after["attention caught by 0.25"] > before["attention caught by 0.25"] + 0.03
    found = trained.read("sparsifiner", str(tmp_path))
    assert found.network["tokens"] == 145
