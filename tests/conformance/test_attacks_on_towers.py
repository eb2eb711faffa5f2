"""Layers of real vision towers, and encoder attacks that touch the tower and nothing behind it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import families
import pytest
import tiny
import torch
from torch import Tensor, nn

from attacks import CAGE, CIRA, FATA, AttentionOnly, VEAttack
from attacks.encoder import EncoderAttack
from targets.base import Batch, Knowledge
from targets.compression import VisionZip
from targets.errors import TargetError
from targets.lvlm import LVLM

ATTACKS = [
    CAGE(steps=5),
    FATA(steps=5, alpha=1 / 255),
    AttentionOnly(steps=5),
    CIRA(steps=5),
    VEAttack(steps=5),
]
KINDS = {"CLS": "llava", "no CLS": "paligemma", "packed": "qwen2_vl", "shuffled": "internvl"}
SIZE = (40, 56)
"""Not the size any of the models has."""


@functools.cache
def target(family: str) -> LVLM:
    return LVLM(*families.build(family))


def pictures(count: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return tiny.pictures(count, size=max(size))[:, :, : size[0], : size[1]]


def batch(count: int = 2) -> Batch:
    ids = tuple(str(number) for number in range(count))
    return Batch(ids, pictures(count), ("is there a red circle ?",) * count, ("yes",) * count)


def blocks(one: LVLM) -> Any:
    """Layers of the tower, wherever a family has them."""
    tower = one._passes.family.tower
    for home in (tower, getattr(tower, "vision_model", tower)):
        encoder = getattr(home, "encoder", home)
        for name in ("layers", "layer", "blocks"):
            if hasattr(encoder, name):
                return getattr(encoder, name)
    raise AssertionError(type(tower))


@contextmanager
def counted(modules: dict[str, nn.Module]) -> Iterator[dict[str, int]]:
    """How often each module begins to run; one that is stopped in the middle counts."""
    counts = dict.fromkeys(modules, 0)

    def hook(name: str) -> Any:
        def count(*_: object) -> None:
            counts[name] += 1

        return count

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", families.FAMILIES)
def test_layers_of_every_family(family: str) -> None:
    one = target(family)
    view: Any = one.view(Knowledge.ENCODER)
    images = pictures()
    tokens = one._passes.layout(SIZE).tokens
    depth = view.tower_depth()
    assert depth == len(blocks(one))
    seen = view.layers(images, range(depth))
    for number, layer in enumerate(seen):
        assert layer.hidden.shape[:2] == layer.score.shape == (2, tokens)
        assert bool((layer.score > 0).all())
        (alone,) = view.layers(images, (number - depth,))  # its negative number
        assert torch.equal(alone.score, layer.score)
        assert torch.equal(alone.hidden, layer.hidden)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_pass_ends_behind_the_deepest_layer(family: str) -> None:
    one = target(family)
    view: Any = one.view(Knowledge.ENCODER)
    model = one._passes.family
    behind = {"projector": model.projector, "text": model.text}
    layers = {f"layer {number}": block for number, block in enumerate(blocks(one))}
    for numbers in ((0,), (1, 0), (-1,)):
        with counted(layers | behind) as counts:
            view.layers(pictures(), numbers)
        deepest = max(number % len(layers) for number in numbers)
        ran = [int(number <= deepest) for number in range(len(layers))]
        assert [counts[name] for name in layers] == ran
        assert [counts[name] for name in behind] == [0, 0]


@pytest.mark.parametrize("family", ["llava", "paligemma"])
@pytest.mark.parametrize("normalised", [False, True])
def test_layers_are_those_of_transformers(family: str, normalised: bool) -> None:
    """An eager tower of the same weights says what each layer gives and where it looks."""
    model, processor = families.build(family, "sdpa")
    one = LVLM(model.double(), processor)
    eager, _ = families.build(family, "eager")
    tower = eager.double().model.vision_tower
    images = pictures()
    inputs, _, _ = one._passes.inputs(images)
    truth = tower(
        inputs["pixel_values"].double(), output_hidden_states=True, output_attentions=True
    )
    view: Any = one.view(Knowledge.ENCODER)
    seen = view.layers(images, (2, -2, 0, -1), normalised=normalised)
    for number, layer in zip((2, 1, 0, 2), seen, strict=True):
        # Before any layer stand the embeddings.
        hidden = truth.hidden_states[number + 1]
        if normalised:
            hidden = getattr(tower, "vision_model", tower).post_layernorm(hidden)
        attention = truth.attentions[number].mean(1)
        if family == "llava":
            hidden, score = hidden[:, 1:], attention[:, 0, 1:]
        else:
            score = attention.mean(1)
        # Eager attention makes its softmax in single precision, whatever the weights have.
        torch.testing.assert_close(layer.hidden, hidden, rtol=0, atol=5e-6)
        torch.testing.assert_close(layer.score.double(), score, rtol=0, atol=1e-6)


def test_the_final_normalisation_is_asked_for() -> None:
    view: Any = target("llava").view(Knowledge.ENCODER)
    (plain,), (normed,) = (
        view.layers(pictures(), (-1,), normalised=normalised) for normalised in (False, True)
    )
    assert not torch.allclose(plain.hidden, normed.hidden, atol=1e-2)
    assert torch.equal(plain.score, normed.score)


@pytest.mark.parametrize("numbers", [(3,), (-4,), (0, 7), ()])
def test_layers_that_do_not_exist_are_refused(numbers: tuple[int, ...]) -> None:
    view: Any = target("llava").view(Knowledge.ENCODER)
    with pytest.raises(TargetError, match="this tower has 3, so they are from -3 to 2"):
        view.layers(pictures(), numbers)


@pytest.mark.parametrize("family", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attacks_run_on_every_kind_of_tower(family: str, attack: EncoderAttack) -> None:
    one = target(family)
    result = attack(one.view(Knowledge.ENCODER), batch(), 8 / 255, [1, 2])
    assert result.linf.tolist() == [8 / 255] * 2
    assert (result.forwards, result.backwards) == (7, 5)
    assert all(min(trace) < trace[0] for trace in result.loss)
    assert not any(check.startswith("zero-gradient") for row in result.checks for check in row)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attacks_touch_nothing_behind_the_tower(attack: EncoderAttack) -> None:
    model = tiny.build_model(vision_layers=6, feature_layer=-2)
    one = LVLM(model, tiny.build_processor())
    core = model.model
    modules = {"projector": core.multi_modal_projector, "text": core.language_model}
    modules |= {"head": model.lm_head}
    modules |= {f"text {number}": layer for number, layer in enumerate(core.language_model.layers)}
    tower = {f"layer {number}": layer for number, layer in enumerate(blocks(one))}
    with counted(modules | tower) as counts:
        attack(one.view(Knowledge.ENCODER), batch(), 8 / 255, [1, 2])
    assert {name: counts[name] for name in modules} == dict.fromkeys(modules, 0)
    deepest = 4 if isinstance(attack, CAGE) else 5  # CAGE looks at the last but one
    assert [counts[name] for name in tower] == [7 * (number <= deepest) for number in range(6)]
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_one_image_serves_every_compressor(attack: EncoderAttack) -> None:
    """What a wider view adds, the compressor among it, changes nothing."""
    one = target("llava")
    views = (
        one.view(Knowledge.ENCODER),
        one.view(Knowledge.WHITE_BOX, VisionZip(retention=0.25)),
    )
    images = [attack(view, batch(), 8 / 255, [1, 2]).images for view in views]
    assert torch.equal(*images)


def test_adaptive_cira_on_a_real_tower() -> None:
    one = target("llava")
    attack = CIRA(steps=5, views="translations")
    result = attack(one.view(Knowledge.ENCODER), batch(), 8 / 255, [1, 2])
    # One pass over one image tells the number of tokens, for the shift.
    assert (result.forwards, result.backwards) == (29, 20)
    assert all(min(trace) < trace[0] for trace in result.loss)
