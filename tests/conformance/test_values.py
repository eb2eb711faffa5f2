"""Value features of vision towers, the continuation of an answer, and how it comes about."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, build
from torch import Tensor

from targets.base import Continuation, Knowledge
from targets.compression import FastV, Uniform, VisionZip
from targets.errors import TargetError
from targets.families.vision import VisionTap
from targets.lvlm import LVLM

QUESTIONS = ("is it red ?", "what is this thing ?")


def attention_of(target: LVLM, layer: int) -> Any:
    """The attention module of a layer of the tower, whatever the family calls it."""
    tap = target.family.tap([layer])
    modules = dict(target.family.tower.named_modules())
    out = tap._layers[layer].out or tap._layers[layer].key.proj
    home = next(name.rpartition(".")[0] for name, module in modules.items() if module is out)
    return modules[home]


def by_hand(target: LVLM, images: Tensor, layer: int) -> Tensor:
    """Projected values of every patch of the tower, ``[patches, D]``, CLS included."""
    attention, seen = attention_of(target, layer), []
    handle = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("hidden_states", *args[:1])),
        with_kwargs=True,
    )
    inputs, _, _ = target._passes.inputs(images)
    try:
        target.family.run_tower(inputs)
    finally:
        handle.remove()
    if hasattr(attention, "qkv"):
        value = attention.qkv(seen[0]).chunk(3, -1)[2]
        return attention.proj(value).flatten(0, -2)
    out = getattr(attention, "out_proj", None) or attention.projection_layer
    return out(attention.v_proj(seen[0])).flatten(0, -2)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def target(request: pytest.FixtureRequest) -> LVLM:
    model, processor = build(request.param)
    return LVLM(model, processor)


@pytest.fixture
def images(target: LVLM) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    size = (2, 3, *target.image_size)
    return torch.randint(0, 256, size, generator=generator).float() / 255


def test_values_are_those_of_every_patch(target: LVLM, images: Tensor) -> None:
    view: Any = target.view(Knowledge.ENCODER)
    with torch.no_grad():
        rows = by_hand(target, images, 0)
        (found,) = view.values(images, [0])
        key = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0))
        flat = found.reshape(-1, rows.shape[1]) @ key
        # Every patch of a token is there; CLS, and patches that belong to no token, are not.
        apart = (flat[:, None] - (rows @ key)[None]).abs().amin(1)
        assert float(apart.max()) < 1e-4
        # A small picture's only tile is the picture once more.
        assert len(set(flat.round(decimals=4).tolist())) > 0.4 * len(flat)
        hidden = view.layers(images, [0])[0].hidden
    assert found.shape[:2] == hidden.shape[:2]


def test_projected_values_have_the_width_of_the_words(target: LVLM, images: Tensor) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX)
    images = images.requires_grad_()
    projected = view.project(view.values(images, [-1], normalised=True)[0])
    words = view.concepts(["red", "what is this"])
    assert projected.shape[-1] == words.shape[-1]
    assert len(words) == 2
    assert not words.requires_grad
    assert float(words.norm(dim=-1).max()) <= 1 + 1e-5
    (gradient,) = torch.autograd.grad(projected.sum((1, 2)).square().sum(), images)
    assert float(gradient.abs().amax((1, 2, 3)).min()) > 0


def test_smoothing_mixes_within_a_picture_only(target: LVLM, images: Tensor) -> None:
    view: Any = target.view(Knowledge.ENCODER)
    with torch.no_grad():
        (plain,) = view.values(images, [-1])
        (smooth,) = view.values(images, [-1], smoothing=20, keys=0)
        (alone,) = view.values(images[:1], [-1], smoothing=20, keys=0)
    assert torch.allclose(alone[0], smooth[0], atol=1e-4)
    # Averages lie closer together than what they are of.
    assert float(smooth[0].std(0).mean()) < float(plain[0].std(0).mean())


@pytest.mark.parametrize("path", ["full", "compressed"])
def test_every_family_comes_to_say_what_it_says(target: LVLM, images: Tensor, path: Any) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX, Uniform(retention=0.5))
    said = view.continuation(images, QUESTIONS, length=4, path=path)
    images = images.requires_grad_()
    found = view.generation(images, QUESTIONS, said, path=path)
    assert torch.equal(found.logprobs.argmax(-1)[said.real], said.ids[said.real])
    (gradient,) = torch.autograd.grad(found.end[said.real].sum(), images)
    assert float(gradient.abs().amax((1, 2, 3)).min()) > 0


def test_smoothing_equals_a_slow_loop() -> None:
    target = LVLM(tiny.build_model(), tiny.build_processor())
    images = tiny.pictures(1)
    view: Any = target.view(Knowledge.ENCODER)
    family = target.family
    inputs, layout, _ = target._passes.inputs(images)
    with torch.no_grad():
        vision = family.encode(inputs, [layout], [0, 1, 2])
        keys, values = vision.layers[1].keys[0], vision.layers[2].values[0]
        mixed = []
        for head in range(len(keys)):
            rows = [row.clone() for row in values[head]]
            for _ in range(3):
                weights = [
                    torch.stack([a @ b * family.scaling for b in keys[head]]).softmax(0)
                    for a in keys[head]
                ]
                rows = [sum(w * row for w, row in zip(one, rows, strict=True)) for one in weights]
            mixed.append(torch.stack(rows))
        wanted = attention_of(target, 2).out_proj(torch.cat(mixed, -1))[1:]
        (found,) = view.values(images, [2], smoothing=3, keys=1)
    assert torch.allclose(found[0], wanted, atol=1e-5)


def test_a_family_that_hides_its_values_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    target = LVLM(tiny.build_model(), tiny.build_processor())
    full = VisionTap._pass

    def without(self: VisionTap, number: int, one: Any) -> Any:
        made = full(self, number, one)
        return type(made)(made.hidden, made.queries, made.keys)

    monkeypatch.setattr(VisionTap, "_pass", without)
    view: Any = target.view(Knowledge.ENCODER)
    with pytest.raises(TargetError, match="does not say where its vision tower makes values"):
        view.values(tiny.pictures(1), [0])


@pytest.mark.parametrize("path", ["full", "compressed"])
@pytest.mark.parametrize("compressor", [FastV(keep_tokens=9), VisionZip(keep_tokens=9)])
def test_what_is_said_is_what_the_teacher_forced_pass_finds_likeliest(
    path: Any, compressor: Any
) -> None:
    target = LVLM(tiny.build_model(), tiny.build_processor())
    view: Any = target.view(Knowledge.WHITE_BOX, compressor)
    images = tiny.pictures(3)
    said = view.continuation(images, tiny.QUESTIONS, length=7, path=path)
    assert said.ids.shape == said.real.shape
    assert bool(said.real[:, 0].all())
    with torch.no_grad():
        found = view.generation(images, tiny.QUESTIONS, said, path=path)
    likeliest = found.logprobs.argmax(-1)
    assert torch.equal(likeliest[said.real], said.ids[said.real])
    ends = sorted(target._passes.ends)
    total = found.logprobs[..., ends].exp().sum(-1)
    assert torch.allclose(found.end.exp(), total, atol=1e-6)
    logits = target.family.logits(found.hidden).float().log_softmax(-1)
    assert torch.allclose(logits[said.real], found.logprobs[said.real], atol=1e-5)


def test_a_continuation_ends_behind_the_end_token() -> None:
    target = LVLM(tiny.build_model(), tiny.build_processor())
    view: Any = target.view(Knowledge.WHITE_BOX)
    images = tiny.pictures(3)
    free = view.continuation(images, tiny.QUESTIONS, length=6)
    # Whatever is said third becomes an end token.
    target._passes.__dict__["ends"] = frozenset({int(free.ids[0, 2])})
    said = view.continuation(images, tiny.QUESTIONS, length=6)
    first = free.ids[0].tolist().index(int(free.ids[0, 2]))
    assert said.real[0].tolist() == [n <= first for n in range(said.ids.shape[1])]


def test_a_placeholder_for_pictures_that_is_said_is_no_picture() -> None:
    target = LVLM(tiny.build_model(), tiny.build_processor())
    view: Any = target.view(Knowledge.WHITE_BOX)
    images = tiny.pictures(3)
    free = view.continuation(images, tiny.QUESTIONS, length=5)
    said = Continuation(free.ids.clone(), free.real.clone())
    said.ids[1, 2], said.real[1, 3:] = target.family.image_token_id, False
    with torch.no_grad():
        wanted = view.generation(images, tiny.QUESTIONS, free)
        found = view.generation(images, tiny.QUESTIONS, said)
    assert torch.allclose(found.logprobs[1, :3], wanted.logprobs[1, :3], atol=1e-5)
    assert torch.allclose(found.logprobs[0], wanted.logprobs[0], atol=1e-5)
    target.family.image_token_id = int(free.ids[0, 1])
    cut = target._passes.continuation
    target._passes.generate = lambda *_, **__: free.ids  # type: ignore[method-assign]
    shorter = cut(images, tiny.QUESTIONS, 5)
    first = free.ids[0].tolist().index(int(free.ids[0, 1]))
    assert shorter.real[0].tolist() == [n <= first for n in range(5)]


@pytest.mark.parametrize("path", ["full", "compressed"])
def test_generation_in_a_padded_batch_equals_single_runs(path: Any) -> None:
    target = LVLM(tiny.build_model(), tiny.build_processor())
    view: Any = target.view(Knowledge.WHITE_BOX, FastV(keep_tokens=9))
    images = tiny.pictures(3)
    said = view.continuation(images, tiny.QUESTIONS, length=5, path=path)
    with torch.no_grad():
        together = view.generation(images, tiny.QUESTIONS, said, path=path)
        for row in range(3):
            here = slice(row, row + 1)
            own = view.continuation(images[here], tiny.QUESTIONS[here], length=5, path=path)
            alone = view.generation(images[here], tiny.QUESTIONS[here], own, path=path)
            real = own.real[0]
            assert torch.equal(own.ids[0][real], said.ids[row][said.real[row]])
            assert torch.allclose(
                alone.logprobs[0][real], together.logprobs[row][said.real[row]], atol=1e-4
            )
