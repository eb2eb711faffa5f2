"""InternVL, Idefics3 and SmolVLM: tokens, scores, layouts and prompts are those of the model."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from families import idefics3, internvl, smolvlm, tiled
from torch import Tensor

from targets.errors import TargetError
from targets.families import family_of
from targets.families.shuffled import runs_of
from targets.preprocessing.layout import Layout

MODULES = {"internvl": internvl, "idefics3": idefics3, "smolvlm": smolvlm}
CLOSE = {"rtol": 0, "atol": 1e-5}
PICTURES = [case for case in tiled.CASES if case != "text only"]


@pytest.fixture(scope="module", params=sorted(MODULES))
def module(request: pytest.FixtureRequest) -> ModuleType:
    return MODULES[request.param]


@pytest.fixture(scope="module")
def model(module: ModuleType) -> Any:
    return module.build_model()


@pytest.fixture(scope="module")
def eager(module: ModuleType) -> Any:
    return module.build_model("eager")


@pytest.fixture(scope="module")
def processor(module: ModuleType) -> Any:
    return module.build_processor()


@pytest.fixture(scope="module")
def family(model: Any, processor: Any) -> Any:
    found = family_of(model)
    found.preprocessing(processor)
    return found


def placeholders(family: Any, inputs: dict[str, Any]) -> Tensor:
    return inputs["input_ids"] == family.image_token_id


def image_arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name.startswith("pixel")}


def numbers(case: str) -> list[int]:
    return [number for _, row in tiled.CASES[case] for number in row]


def same_places(one: Layout, other: Layout) -> bool:
    names = ("tile", "row", "column", "columns")
    places = all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
    return places and (one.shapes, one.base) == (other.shapes, other.base)


@pytest.mark.parametrize("case", PICTURES)
def test_projected_alone_a_token_is_the_models_own(
    module: ModuleType, family: Any, model: Any, processor: Any, case: str
) -> None:
    """The order of channels in the pixel shuffle, and of tiles in a prompt."""
    inputs = module.inputs(processor, tiled.CASES[case])
    layouts = family.images(placeholders(family, inputs), inputs)
    seen = family.encode(image_arguments(inputs), layouts)
    truth = model.get_image_features(**image_arguments(inputs)).pooler_output
    truth = torch.cat([part.flatten(0, -2) for part in truth])
    ours = torch.cat(
        [
            family.project_tokens(seen.patches[image, place])
            for image in range(len(layouts))
            for place in seen.present[image].nonzero()
        ]
    )
    assert ours.shape == truth.shape
    assert torch.allclose(ours, truth, **CLOSE)
    assert seen.present.sum(1).tolist() == [one.tokens for one in layouts]


@pytest.mark.parametrize("case", PICTURES)
def test_layouts_are_those_of_the_pictures(
    module: ModuleType, family: Any, processor: Any, case: str
) -> None:
    inputs = module.inputs(processor, tiled.CASES[case])
    found = family.images(placeholders(family, inputs), inputs)
    preprocessing = family.preprocessing(processor)
    wanted = [preprocessing.layout(tiled.SIZES[n % len(tiled.SIZES)]) for n in numbers(case)]
    assert len(found) == len(wanted)
    assert all(same_places(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("number", range(4))
def test_preprocessing_and_prompt_are_those_of_the_processor(
    module: ModuleType, family: Any, processor: Any, number: int
) -> None:
    question = tiled.QUESTIONS[0]
    truth = module.inputs(processor, ((question, (number,)),))
    preprocessing = family.preprocessing(processor)
    levels = torch.from_numpy(np.array(tiled.picture(number))).permute(2, 0, 1)[None]
    made = preprocessing.inputs(levels.float() / 255)
    assert set(made) == set(image_arguments(truth))
    for name, value in made.items():
        assert value.shape == truth[name].shape
        assert torch.allclose(value.float(), truth[name].float(), rtol=0, atol=1e-5)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    talk = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    layout = preprocessing.layout(tuple(levels.shape[-2:]))
    text = family.expand(text, processor.image_token, layout)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == truth["input_ids"][0].tolist()


def tower_attention(model: Any, inputs: dict[str, Any], layer: int) -> Tensor:
    """Attention ``[G, N, S, S]`` of a tower layer as the model itself reports it under eager."""
    tower = getattr(model.model, "vision_tower", None) or model.model.vision_model
    pixels = inputs["pixel_values"]
    pixels = pixels.flatten(0, 1) if pixels.dim() == 5 else pixels
    pixels = pixels[(pixels != 0).flatten(1).any(1)]
    attention: Tensor = tower(pixels, output_attentions=True).attentions[layer]
    return attention


@pytest.mark.parametrize("layer", [None, 0, 1])
@pytest.mark.parametrize("case", ["two images", "mixed"])
def test_scores_are_block_means_of_eager_attention(
    module: ModuleType, family: Any, eager: Any, processor: Any, case: str, layer: int | None
) -> None:
    inputs = module.inputs(processor, tiled.CASES[case])
    layouts = family.images(placeholders(family, inputs), inputs)
    tap = family.tap((0, 1))
    with tap, torch.no_grad():
        family.run_tower(image_arguments(inputs))
    assert tap.latest is not None
    seen = family.arrange(tap.latest, layouts, inputs)
    weights = tower_attention(eager, inputs, 2 if layer is None else layer)
    paid = weights[:, :, 0, 1:] if family.has_cls else weights.mean(2)
    received = weights.mean(2)[:, :, int(family.has_cls) :]
    edge, side = family.shrink, 6
    first = 0
    for image, one in enumerate(layouts):
        for place in range(one.tokens):
            row, column = int(one.row[place]) * edge, int(one.column[place]) * edge
            for truth, ours in ((paid, seen.attention(layer)), (received, seen.received(layer))):
                square = truth[first + int(one.tile[place])].unflatten(-1, (side, side))
                block = square[:, row : row + edge, column : column + edge]
                assert torch.allclose(ours[image, :, place], block.mean((1, 2)), **CLOSE)
        assert int(seen.base[image]) == first + len(one.shapes) - 1
        first += len(one.shapes)


def test_scores_are_far_from_flat(module: ModuleType, family: Any, processor: Any) -> None:
    inputs = module.inputs(processor, tiled.CASES["one image"])
    layouts = family.images(placeholders(family, inputs), inputs)
    score = family.encode(image_arguments(inputs), layouts).attention().mean(1)
    assert float(score.amax() / score.amin()) > 2


@pytest.mark.parametrize("case", tiled.CASES)
def test_encoded_once_the_model_gives_the_same(
    module: ModuleType, family: Any, model: Any, processor: Any, case: str
) -> None:
    inputs = module.inputs(processor, tiled.CASES[case])
    images = image_arguments(inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        truth = model(**inputs, position_ids=positions).logits
        encoded = family.encoded(images) if images else None
        ours = family.logits(family.run(ids, mask, encoded, images))
    assert torch.equal(ours, truth)


def test_queries_and_keys_of_the_text_model_make_its_attention(
    module: ModuleType, eager: Any, processor: Any
) -> None:
    models = [eager]
    models += [internvl.build_model("eager", text="qwen3")] if module is internvl else []
    inputs = module.inputs(processor, tiled.CASES["mixed"])
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for model in models:
        family = family_of(model)
        out = model(
            **inputs, position_ids=positions, output_attentions=True, output_hidden_states=True
        )
        for layer in (0, 2):
            hidden = out.hidden_states[layer]
            rope = family.rope(hidden, positions, layer)
            last = torch.full((len(mask), 1), mask.shape[1] - 1)
            queries = family.text_queries(layer, hidden, rope, last)
            keys = family.text_keys(layer, hidden, rope)
            logits = (queries @ keys.transpose(2, 3)) * family.text_scaling(layer)
            logits = logits.masked_fill(mask[:, None, None] == 0, torch.finfo(logits.dtype).min)
            truth = out.attentions[layer][:, :, -1:]
            assert torch.allclose(logits.softmax(-1), truth, **CLOSE)
            assert float(truth.amax()) > 0.2


def test_gradients_reach_the_original_picture(
    module: ModuleType, family: Any, model: Any, processor: Any
) -> None:
    """Through tiles, tower, shuffle and text model; everywhere, at a size that is not a tile's."""
    inputs = module.inputs(processor, tiled.CASES["one image"])
    levels = torch.from_numpy(np.array(tiled.picture(1))).permute(2, 0, 1)[None]
    images = (levels.float() / 255).requires_grad_()
    made = family.preprocessing(processor).inputs(images)
    logits = model(**{**inputs, **made}).logits
    (gradient,) = torch.autograd.grad(logits[0, -1].log_softmax(-1)[5], images)
    assert gradient.shape == (1, 3, 30, 60)
    assert float((gradient.abs().amax(1) > 0).float().mean()) > 0.99
    with torch.no_grad():
        plain = model(**inputs).logits
    assert torch.allclose(logits, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("layer", [-1, -2, 1, 3])
def test_internvl_features_of_any_layer(pooled: bool, layer: int) -> None:
    """The tower's last normalisation counts only for its last output, taken as such."""
    model = internvl.build_model(mean_pooling=pooled, feature_layer=layer)
    family, processor = family_of(model), internvl.build_processor()
    inputs = internvl.inputs(processor, tiled.CASES["one image"])
    layouts = family.images(inputs["input_ids"] == internvl.IMAGE, inputs)
    seen = family.encode(image_arguments(inputs), layouts)
    truth = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert torch.allclose(family.project_tokens(seen.patches), truth.flatten(0, 1)[None], **CLOSE)
    assert family.feature_layer == {-1: 2, -2: 1, 1: 0, 3: 2}[layer]


def test_encoding_stops_behind_the_feature_layer() -> None:
    model = internvl.build_model(feature_layer=-2)
    family, processor = family_of(model), internvl.build_processor()
    inputs = internvl.inputs(processor, tiled.CASES["one image"])
    ran = []
    for number, block in enumerate(model.model.vision_tower.encoder.layer):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    layouts = family.images(inputs["input_ids"] == internvl.IMAGE, inputs)
    family.encode(image_arguments(inputs), layouts)
    assert ran == [0, 1]


TAGGED = {
    "one token a tag": (["<row_1_col_1>"], ["<row_1_col_2>"], ["<global-img>"]),
    "tags in pieces": (["is", "a", "no"], ["is", "the", "no"], ["left", "no"]),
}


@pytest.mark.parametrize("tags", TAGGED)
@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_images_of_several_tiles_and_of_one_are_told_apart(kind: str, tags: str) -> None:
    """With text between them, none between them, and tags of which the last token is the same."""
    module = MODULES[kind]
    family = family_of(module.build_model())
    first, second, whole = TAGGED[tags]
    fake, tile = "<fake_token_around_image>", ["<image>"] * module.TOKENS
    split = [fake, *first, *tile, fake, *second, *tile, "\n\n", fake, *whole, *tile, fake]
    single = [fake, *whole, *tile, fake]
    rows = {
        (3, 1): ["<s>", *split, *single, "is", "there"],
        (1, 3, 1): ["<s>", *single, "is", *split, "the", *single],
        (1, 1): [*single, *single, "how"],
        (3,): ["how", "many", *split],
        (): ["is", "there"],
    }
    width = max(map(len, rows.values()))
    filled = [["<pad>"] * (width - len(row)) + row for row in rows.values()]
    ids = torch.tensor([[module.WORDS.index(word) for word in row] for row in filled])
    found = family.images(ids == module.IMAGE, {"input_ids": ids})
    assert [len(one.shapes) for one in found] == [count for row in rows for count in row]


def test_prompts_without_text_around_images() -> None:
    family = family_of(idefics3.build_model())
    ids = torch.tensor([[1, *[idefics3.IMAGE] * 9, 20, 21]])
    assert len(family.images(ids == idefics3.IMAGE, {"input_ids": ids})) == 1
    with pytest.raises(TargetError, match="call the model with input_ids"):
        family.images(ids == idefics3.IMAGE, {})
    with pytest.raises(TargetError, match="row 0 has 8 image placeholders"):
        family.images(ids[:, 2:] == idefics3.IMAGE, {"input_ids": ids[:, 2:]})
    family = family_of(internvl.build_model())
    with pytest.raises(TargetError, match="row 0 has 10 image placeholders"):
        family.images(torch.ones(1, 10, dtype=torch.bool), {})
    with pytest.raises(TargetError, match="two tiles, which no picture gets"):
        family.images(torch.ones(1, 18, dtype=torch.bool), {})


def test_tiles_that_do_not_fit_the_prompt_are_refused(
    module: ModuleType, family: Any, processor: Any
) -> None:
    inputs = module.inputs(processor, tiled.CASES["two images"])
    layouts = family.images(placeholders(family, inputs), inputs)
    with pytest.raises(TargetError, match="the vision tower saw"):
        family.encode(image_arguments(inputs), layouts[:1])


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_tiles_that_are_partly_padding_are_refused(kind: str) -> None:
    module = MODULES[kind]
    family, processor = family_of(module.build_model()), MODULES[kind].build_processor()
    inputs = module.inputs(processor, tiled.CASES["one image"])
    layouts = family.images(placeholders(family, inputs), inputs)
    inputs["pixel_attention_mask"][0, 1, 12:] = 0
    with pytest.raises(TargetError, match="hides a part of a tile"):
        family.encode(image_arguments(inputs), layouts)


def test_prompts_need_the_whole_processor(module: ModuleType, model: Any) -> None:
    family = family_of(model)
    layout = family.layout_of(1)
    with pytest.raises(TargetError, match=r"call preprocessing\(processor\)"):
        family.expand("<image>", "<image>", layout)


def test_other_models_are_refused() -> None:
    model = internvl.build_model()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(TargetError, match="'full'; it has to be 'default'"):
        family_of(model)
    model = internvl.build_model()
    model.config.text_config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(TargetError, match="sliding attention window"):
        family_of(model)
    model = idefics3.build_model()
    model.config.text_config.model_type = "mamba"
    with pytest.raises(TargetError, match="idefics3: text model 'mamba' is not supported"):
        family_of(model)


def test_runs() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    assert runs_of(mask) == [(0, 0, 2), (0, 3, 4), (2, 1, 4)]
