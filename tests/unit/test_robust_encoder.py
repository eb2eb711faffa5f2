"""The robust encoder: what it swaps, what it shares, what it records, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from defenses import tower_weights
from defenses.base import AdaptiveRoute, DefenseError, DefenseKind
from defenses.robust_encoder import RobustEncoder
from targets.compression.fastv import FastV
from targets.compression.visionzip import VisionZip
from targets.lvlm import LVLM
from targets.scenes import build, hardened, load_scenes

SMALL = build.Shape(width=32, mlp=48, heads=4, vision_layers=2, text_layers=3)


def _lvlm(seed: int = 1) -> LVLM:
    return LVLM(build.build_model(SMALL, seed=seed), build.build_processor(), {"name": "small"})


def _tower_folder(path: Path, seed: int = 7) -> Path:
    """A hardened tower as transformers writes it: other values, same shape."""
    build.build_model(SMALL, seed=seed).model.vision_tower.save_pretrained(path)
    return path


def _pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 96, 96, generator=torch.Generator().manual_seed(count))


def test_its_route_is_the_plain_gradient_and_it_draws_nothing() -> None:
    one = RobustEncoder()
    assert one.kind is DefenseKind.ENCODER
    assert one.route is AdaptiveRoute.DIFFERENTIABLE
    assert not one.draws
    assert one.badge is None


@torch.no_grad()
def test_the_tower_is_swapped_all_else_is_shared_and_the_model_given_stays(tmp_path: Path) -> None:
    model = _lvlm()
    before = {name: one.clone() for name, one in model.family.model.state_dict().items()}
    wanted = build.build_model(SMALL, seed=7).model.vision_tower.state_dict()
    hardened = RobustEncoder(weights=str(_tower_folder(tmp_path))).harden(model)
    own, new = model.family.model.state_dict(), hardened.family.model.state_dict()
    assert list(own) == list(new)
    for name, one in own.items():
        assert torch.equal(one, before[name]), f"{name} of the target was changed"
        if "vision_tower" in name:
            inner = name.removeprefix("model.vision_tower.")
            torch.testing.assert_close(new[name], wanted[inner], atol=0, rtol=0)
            assert new[name].data_ptr() != one.data_ptr()
        else:
            assert new[name].data_ptr() == one.data_ptr(), f"{name} was copied"
    assert not any(one.requires_grad for one in hardened.family.model.parameters())
    assert hardened.family.model.lm_head.weight is hardened.family.text.embed_tokens.weight


@pytest.mark.parametrize(
    "compressor", [None, FastV(layer=1, retention=0.25), VisionZip(retention=0.25)]
)
def test_it_answers_as_a_model_built_with_that_tower(tmp_path: Path, compressor) -> None:  # noqa: ANN001
    model = _lvlm()
    hardened = RobustEncoder(weights=str(_tower_folder(tmp_path))).harden(model)
    inner = build.build_model(SMALL, seed=1)
    inner.model.vision_tower = build.build_model(SMALL, seed=7).model.vision_tower
    reference = LVLM(inner, build.build_processor())
    images, questions = _pictures(3), ("what is there ?", "is there a red circle ?", "what ?")
    options = ("yes", "no", "two")
    found = hardened.option_scores(images, questions, options, compressor=compressor)
    wanted = reference.option_scores(images, questions, options, compressor=compressor)
    assert torch.equal(found, wanted)
    plain = model.option_scores(images, questions, options, compressor=compressor)
    assert not torch.allclose(found, plain)
    turned = hardened.option_scores(
        images.flip(0), questions[::-1], options, compressor=compressor
    ).flip(0)
    torch.testing.assert_close(turned, found, atol=1e-4, rtol=1e-4)
    single = hardened.option_scores(images[:1], questions[:1], options, compressor=compressor)
    torch.testing.assert_close(single, found[:1], atol=1e-4, rtol=1e-4)


def test_its_own_weights_give_the_gradient(tmp_path: Path) -> None:
    hardened = RobustEncoder(weights=str(_tower_folder(tmp_path))).harden(_lvlm())
    images = _pictures(1).requires_grad_(True)
    view = hardened.view("white_box", FastV(layer=1, retention=0.5))  # type: ignore[arg-type]
    view.rank(images, ("what ?",)).log_score[0, 3].backward()  # type: ignore[attr-defined]
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


def test_identity_says_what_was_put_in(tmp_path: Path) -> None:
    folder = _tower_folder(tmp_path / "a-tower")
    model = _lvlm()
    found = RobustEncoder(weights=str(folder)).harden(model).identity
    assert model.identity == {"name": "small"}
    assert found["name"] == "small"
    assert found["encoder"] == "a-tower", "no place on this machine"
    assert len(found["encoder_weights"]) == 64
    assert found["encoder_layout"] == "transformers"
    assert found["encoder_positions"] == "as trained"
    assert found["encoder_tokens"] == "144"
    assert found["encoder_activation"] == "gelu"
    other = RobustEncoder(weights=str(_tower_folder(tmp_path / "b", seed=8))).harden(model)
    assert other.identity["encoder_weights"] != found["encoder_weights"]


def test_positions_of_another_grid_are_interpolated_recorded_or_refused(tmp_path: Path) -> None:
    folder = _tower_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(one for one in tensors if one.endswith("position_embedding.weight"))
    rest = tensors[name][1:].view(12, 12, -1)[:8, :8].reshape(64, -1)
    tensors[name] = torch.cat([tensors[name][:1], rest])
    save_file(tensors, folder / "model.safetensors")
    model = _lvlm()
    for mode in ("bicubic", "bilinear"):
        made = RobustEncoder(weights=str(folder), positions=mode).harden(model)  # type: ignore[arg-type]
        assert made.identity["encoder_positions"] == f"{mode}, 8 × 8 to 12 × 12"
        own = made.family.tower.state_dict()
        found = own[next(one for one in own if one.endswith("position_embedding.weight"))]
        assert torch.equal(found, tower_weights.resized(tensors[name], True, (12, 12), mode))
    with pytest.raises(DefenseError, match=r"8 × 8 patches, the target has 12 × 12; set positions"):
        RobustEncoder(weights=str(folder), positions="refuse").harden(model)


def _altered(folder: Path, change) -> str:  # noqa: ANN001
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.clone() for k, v in change(tensors).items()}, folder / "model.safetensors")
    return str(folder)


def _without(part: str):  # noqa: ANN202
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def _narrow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v[:20] if k.endswith("fc1.weight") else v for k, v in tensors.items()}


def _broken(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v * torch.nan if k.endswith("fc1.weight") else v for k, v in tensors.items()}


def _deeper(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {
        k.replace("layers.1.", "layers.2."): v for k, v in tensors.items() if "layers.1." in k
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("layers.1."), "has 1 layers, the target's tower 2"),
        (_deeper, "has 3 layers, the target's tower only 2"),
        (_without("class_embedding"), "has no CLS token"),
        (_without("fc2.bias"), "lacks 2 tensors, such as encoder.layers.0.mlp.fc2.bias"),
        (_narrow, r"does not fit: encoder.layers.0.mlp.fc1.weight is \[20, 32\]"),
        (_broken, "not finite in encoder.layers.0.mlp.fc1.weight"),
        (_without("patch_embedding"), "holds no vision tower of CLIP or SigLIP"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change, message: str) -> None:  # noqa: ANN001
    where = _altered(_tower_folder(tmp_path), change)
    with pytest.raises(DefenseError, match=message):
        RobustEncoder(weights=where).harden(_lvlm())


def test_another_activation_is_refused_and_silence_is_recorded(tmp_path: Path) -> None:
    folder = _tower_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "quick_gelu"}))
    with pytest.raises(DefenseError, match="activation quick_gelu, the target's tower has gelu"):
        RobustEncoder(weights=str(folder)).harden(_lvlm())
    (folder / "config.json").unlink()
    found = RobustEncoder(weights=str(folder)).harden(_lvlm()).identity
    assert found["encoder_activation"] == "gelu (the target's; the tower does not say)"
    openclip = {"model_cfg": {"quick_gelu": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(openclip))
    with pytest.raises(DefenseError, match="activation quick_gelu"):
        RobustEncoder(weights=str(folder)).harden(_lvlm())


def test_pickles_are_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(DefenseError, match=r"only open_clip_pytorch_model.bin there.*save_file"):
        RobustEncoder(weights=str(tmp_path)).harden(_lvlm())
    with pytest.raises(DefenseError, match=r"no safetensors file 'open_clip_pytorch_model.bin'"):
        RobustEncoder(weights=str(tmp_path), file="open_clip_pytorch_model.bin").harden(_lvlm())
    (tmp_path / "open_clip_pytorch_model.bin").rename(tmp_path / "a.safetensors")
    with pytest.raises(DefenseError, match=r"a.safetensors could not be read as safetensors"):
        RobustEncoder(weights=str(tmp_path)).harden(_lvlm())


def test_of_several_files_one_has_to_be_named(tmp_path: Path) -> None:
    folder = _tower_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "eps2.safetensors")
    one = RobustEncoder(weights=str(folder)).harden(_lvlm())
    (folder / "eps4.safetensors").write_bytes((folder / "eps2.safetensors").read_bytes())
    with pytest.raises(DefenseError, match=r"eps2.safetensors, eps4.safetensors.*as `file`"):
        RobustEncoder(weights=str(folder)).harden(_lvlm())
    two = RobustEncoder(weights=str(folder), file="eps2.safetensors").harden(_lvlm())
    assert one.identity["encoder_weights"] == two.identity["encoder_weights"]


def test_parts_listed_in_an_index_are_one_tower(tmp_path: Path) -> None:
    folder = _tower_folder(tmp_path)
    whole = RobustEncoder(weights=str(folder)).harden(_lvlm()).family.tower.state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = RobustEncoder(weights=str(folder)).harden(_lvlm()).family.tower.state_dict()
    assert all(torch.equal(found[name], one) for name, one in whole.items())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("scenes-a-rankin", "no folder, no hub id .* shipped: "),
        ("./not-here", "does not exist"),
        ("someone/some-tower-that-is-not-there", "could not be fetched from the hub"),
    ],
)
def test_what_is_not_there_is_told(weights: str, message: str, monkeypatch) -> None:  # noqa: ANN001
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DefenseError, match=message):
        RobustEncoder(weights=weights).harden(_lvlm())


def test_a_hub_id_is_fetched_without_pickles_and_its_commit_recorded(
    tmp_path: Path,
    monkeypatch,  # noqa: ANN001
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = _tower_folder(tmp_path / commit)
    asked = {}

    def fetch(name: str, **how: object) -> str:
        asked.update(how, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    found = RobustEncoder(weights="someone/tower", revision="v1").harden(_lvlm()).identity
    assert asked["name"] == "someone/tower"
    assert asked["revision"] == "v1"
    assert asked["allow_patterns"] == ["*.json", "*.safetensors"]
    assert found["encoder"] == "someone/tower"
    assert found["encoder_revision"] == commit


def test_towers_of_timm_and_other_vits_are_refused() -> None:
    with pytest.raises(DefenseError, match="a tower of timm inside OpenCLIP"):
        tower_weights.named({"visual.trunk.patch_embed.proj.weight": torch.zeros(1)}, "x")
    with pytest.raises(DefenseError, match=r"no plain ViT of OpenCLIP; it also has .*ls_1.gamma"):
        tower_weights.from_openclip({"transformer.resblocks.0.ls_1.gamma": torch.zeros(1)})
    with pytest.raises(DefenseError, match="of no square grid"):
        tower_weights.resized(torch.zeros(1 + 12, 4), True, (4, 4), "bicubic")


@torch.no_grad()
def test_a_siglip_tower_is_read_alone_or_inside_a_model(tmp_path: Path) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    def tower(seed: int, image: int = 32) -> SiglipVisionModel:
        torch.manual_seed(seed)
        config = SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image,
            patch_size=8,
        )
        return SiglipVisionModel(config).eval()

    source, target = tower(1), tower(2)
    source.save_pretrained(tmp_path)
    found = tower_weights.read(str(tmp_path))
    inside = {f"model.vision_tower.{k}": v for k, v in found.tensors.items()}
    text = {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(1)}
    again, layout = tower_weights.named(inside | text, "x")
    assert layout == "transformers"
    assert set(again) == set(found.tensors)
    new, done = tower_weights.fitted(found, target, (4, 4), "refuse")
    assert done == "as trained"
    names = {tower_weights.canonical(name): name for name in target.state_dict()}
    target.load_state_dict({names[name]: one for name, one in new.items()})
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(source(pixels).last_hidden_state, target(pixels).last_hidden_state)
    larger, done = tower_weights.fitted(found, tower(3, 48), (6, 6), "bilinear")
    assert done == "bilinear, 4 × 4 to 6 × 6"
    assert len(larger["embeddings.position_embedding.weight"]) == 36


def test_a_model_without_such_a_tower_is_refused() -> None:
    model = _lvlm()
    model.family.model.config.vision_config.model_type = "qwen2_5_vl"
    with pytest.raises(DefenseError, match=r"vision tower is 'qwen2_5_vl'; .* clip_vision_model"):
        RobustEncoder().harden(model)


def test_the_shipped_tower_belongs_to_scenes_a() -> None:
    assert list(hardened()) == ["scenes-a-ranking"]
    folder = hardened()["scenes-a-ranking"]
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    assert {"README.md", "config.json", "recipe.json", "training_log.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    model = load_scenes("scenes-a")
    made = RobustEncoder().harden(model)
    assert made.identity["encoder"] == "scenes-a-ranking"
    assert made.identity["weights"] == model.identity["weights"]
    with pytest.raises(DefenseError, match="was made for scenes-a; the target is scenes-b"):
        RobustEncoder().harden(load_scenes("scenes-b"))


def test_options_are_its_provenance() -> None:
    one = RobustEncoder(weights="chs20/fare2-clip", positions="refuse")
    assert "chs20/fare2-clip" in repr(one)
    assert one == replace(RobustEncoder(), weights="chs20/fare2-clip", positions="refuse")
