"""LLaVA-NeXT and OneVision: what the adapter says of pictures and of the tower."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from families import llava_next, llava_onevision
from torch import Tensor

from targets.errors import TargetError
from targets.families.llava_next import LlavaNext, MixedPass
from targets.families.llava_onevision import LlavaOnevision

KINDS: dict[str, tuple[ModuleType, type[LlavaNext]]] = {
    "llava_next": (llava_next, LlavaNext),
    "llava_onevision": (llava_onevision, LlavaOnevision),
}
WITH_IMAGES = [name for name in llava_next.CASES if name != "text only"]


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def family(kind: str) -> LlavaNext:
    module, adapter = KINDS[kind]
    return adapter(module.build_model())


@pytest.fixture(scope="module")
def processor(kind: str) -> Any:
    return KINDS[kind][0].build_processor()


def batch(processor: Any, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a forward, and the image arguments among them."""
    made = llava_next.inputs(processor, llava_next.CASES[case])
    return made, {k: v for k, v in made.items() if k not in ("input_ids", "attention_mask")}


def packed(family: LlavaNext, images: dict[str, Any]) -> list[Tensor]:
    """The model's own features of each picture."""
    return list(family.core.get_image_features(**images).pooler_output)


@pytest.mark.parametrize("case", sorted(llava_next.CASES))
def test_layouts_fit_the_placeholders(family: LlavaNext, processor: Any, case: str) -> None:
    made, _ = batch(processor, case)
    placeholders = made["input_ids"] == family.image_token_id
    layouts = list(family.images(placeholders, made))
    numbers = [n for _, row in llava_next.CASES[case] for n in row]
    assert len(layouts) == len(numbers)
    counts = placeholders.sum(1).tolist()
    for (_, row), count in zip(llava_next.CASES[case], counts, strict=True):
        assert sum(layouts.pop(0).placeholders for _ in row) == count
    assert family.core.config.image_token_id == family.image_token_id


@pytest.mark.parametrize("case", WITH_IMAGES)
def test_encoding_is_the_model_s_to_the_bit(family: LlavaNext, processor: Any, case: str) -> None:
    made, images = batch(processor, case)
    ours = family.encoded(images)
    for mine, theirs in zip(ours.pooler_output, packed(family, images), strict=True):
        assert torch.equal(mine, theirs)
    mask = made["attention_mask"]
    hidden = family.run(made["input_ids"], mask, ours, images)
    truth = family.model(**made, **family.positions(mask)).logits
    assert torch.equal(family.logits(hidden), truth)


@pytest.mark.parametrize("case", WITH_IMAGES)
def test_tokens_are_their_patches(family: LlavaNext, processor: Any, case: str) -> None:
    """Tokens of a pass, projected and mixed, are what the language model gets at their places."""
    made, images = batch(processor, case)
    layouts = family.images(made["input_ids"] == family.image_token_id, made)
    vision = family.encode(images, layouts)
    hidden = vision.layers[vision.feature_layer].hidden[:, int(family.has_cls) :]
    projected = vision.per_token(family.projector(hidden)).squeeze(2)
    newline = family.core.image_newline
    for index, (one, features) in enumerate(zip(layouts, packed(family, images), strict=True)):
        assert torch.equal(vision.present[index], torch.arange(projected.shape[1]) < one.tokens)
        mine = projected[index, : one.tokens]
        assert torch.allclose(mine, features[one.columns], atol=1e-5)
        assert bool((features[one.separators] == newline).all())
        assert len(features) == one.placeholders
    if not isinstance(vision, MixedPass):
        again = family.project_tokens(vision.patches)
        assert torch.allclose(again, projected, atol=1e-5)
    starts = [0]
    for one in layouts:
        starts.append(starts[-1] + len(one.shapes))
    assert vision.base.tolist() == starts[:-1]


def test_attention_is_that_of_the_tower(kind: str, processor: Any) -> None:
    module, adapter = KINDS[kind]
    family = adapter(module.build_model("eager"))
    made, images = batch(processor, "padded")
    layouts = family.images(made["input_ids"] == family.image_token_id, made)
    vision = family.encode(images, layouts)
    runs = images["pixel_values"]
    tiles = torch.cat([one[: len(lay.shapes)] for one, lay in zip(runs, layouts, strict=True)])
    out = family.tower(tiles, output_attentions=True, return_dict=True)
    weights = out.attentions[family.feature_layer]
    cls = family.has_cls
    received = weights.mean(2)[:, :, int(cls) :]
    paid = weights[:, :, 0, 1:] if cls else received
    first = 0
    for index, one in enumerate(layouts):
        for truth, ours in ((paid, vision.attention()), (received, vision.received())):
            patches = truth[first : first + len(one.shapes)].transpose(1, 2).flatten(0, 1)
            mixed = (patches[one.patches] * one.weights[..., None]).sum(1)  # type: ignore[attr-defined]
            assert torch.allclose(ours[index, :, : one.tokens].T, mixed.float(), atol=1e-6)
        first += len(one.shapes)


def test_generate_forgets_sizes_but_the_hook_notes_them(family: LlavaNext, processor: Any) -> None:
    made, _ = batch(processor, "mixed")
    placeholders = made["input_ids"] == family.image_token_id
    found: list[Any] = []

    def look(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        if ids.shape == placeholders.shape:
            found.append((family.images(placeholders, kwargs), kwargs.get("image_sizes")))

    truth = family.images(placeholders, made)
    before = dict(family.core.__dict__)
    handles = [
        *family.attach(lambda: None),
        family.core.register_forward_pre_hook(look, with_kwargs=True),
    ]
    answers = family.model.generate(**made, max_new_tokens=3, do_sample=False)
    for handle in handles:
        handle.remove()
    ((layouts, given),) = found
    assert given is None
    for one, other in zip(layouts, truth, strict=True):
        assert torch.equal(one.columns, other.columns)
        assert torch.equal(one.boxes, other.boxes)
    assert family.core.__dict__.keys() == before.keys()
    assert torch.equal(answers, family.model.generate(**made, max_new_tokens=3, do_sample=False))


def test_pictures_nobody_knows_the_size_of_are_refused(family: LlavaNext, processor: Any) -> None:
    made, images = batch(processor, "one image")
    encoded = family.core.get_image_features(**images)
    placeholders = made["input_ids"] == family.image_token_id
    with pytest.raises(TargetError, match="pass image_sizes"):
        family.images(placeholders, {"mm_encoder_outputs": {"image": encoded}})
    assert family.images(torch.zeros(1, 5, dtype=torch.bool), {}) == []


def test_preprocessing_is_the_processor_s(family: LlavaNext, processor: Any) -> None:
    twin = family.preprocessing(processor)
    for number, size in enumerate(llava_next.SIZES):
        pixels = torch.from_numpy(np.asarray(llava_next.picture(number)).copy()) / 255
        ours = twin.inputs(pixels.permute(2, 0, 1)[None])
        question = (("how many ?", (number,)),)
        made = llava_next.inputs(processor, question)
        for name, value in ours.items():
            assert torch.allclose(value.float(), made[name].float(), atol=1e-4), name
        count = int((made["input_ids"] == family.image_token_id).sum())
        assert twin.layout(size).placeholders == count


def test_gradient_reaches_the_pixels_of_the_picture(family: LlavaNext, processor: Any) -> None:
    """From every token that is kept whole: base, tiles, and those behind newlines."""
    twin, size = family.preprocessing(processor), (41, 35)
    layout = twin.layout(size)
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    made = twin.inputs(images)
    vision = family.encode(made, [layout])
    assert int(layout.tile[-1]) > 0
    for token in (0, layout.tokens - 1):
        (gradient,) = torch.autograd.grad(
            vision.attention()[0, :, token].sum(), images, retain_graph=True
        )
        assert float(gradient.abs().max()) > 1e-6
