"""OpenCLIP's files give the tower they were made from, bit for bit; positions by the formula."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from defenses import tower_weights


def _tower(image_size: int = 32, seed: int = 0) -> CLIPVisionModel:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=8,
        hidden_act="quick_gelu",
    )
    tower = CLIPVisionModel(config).eval()
    with torch.no_grad():
        for one in tower.parameters():  # biases and norms start at 0 and 1, which hides swaps
            one.copy_(torch.randn(one.shape) * 0.3 + (1.0 if one.dim() == 1 else 0.0))
    return tower


def _openclip(tower: CLIPVisionModel) -> dict[str, Tensor]:
    """The state dict OpenCLIP would have, written out name by name."""
    own = {name.removeprefix("vision_model."): one for name, one in tower.state_dict().items()}
    out: dict[str, Tensor] = {}
    out["visual.class_embedding"] = own["embeddings.class_embedding"]
    out["visual.positional_embedding"] = own["embeddings.position_embedding.weight"]
    out["visual.conv1.weight"] = own["embeddings.patch_embedding.weight"]
    out["visual.ln_pre.weight"] = own["pre_layrnorm.weight"]
    out["visual.ln_pre.bias"] = own["pre_layrnorm.bias"]
    out["visual.ln_post.weight"] = own["post_layernorm.weight"]
    out["visual.ln_post.bias"] = own["post_layernorm.bias"]
    for i in range(tower.config.num_hidden_layers):
        a, b = f"encoder.layers.{i}.", f"visual.transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            fused = []
            for letter in ("q", "k", "v"):
                for row in own[f"{a}self_attn.{letter}_proj.{kind}"]:
                    fused.append(row)
            out[f"{b}attn.in_proj_{kind}"] = torch.stack(fused)
            out[f"{b}attn.out_proj.{kind}"] = own[f"{a}self_attn.out_proj.{kind}"]
            out[f"{b}ln_1.{kind}"] = own[f"{a}layer_norm1.{kind}"]
            out[f"{b}ln_2.{kind}"] = own[f"{a}layer_norm2.{kind}"]
            out[f"{b}mlp.c_fc.{kind}"] = own[f"{a}mlp.fc1.{kind}"]
            out[f"{b}mlp.c_proj.{kind}"] = own[f"{a}mlp.fc2.{kind}"]
    # What else a whole CLIP has.
    out["visual.proj"] = torch.randn(24, 12)
    out["logit_scale"] = torch.tensor(4.6)
    out["token_embedding.weight"] = torch.randn(9, 12)
    out["positional_embedding"] = torch.randn(7, 12)
    out["transformer.resblocks.0.ln_1.weight"] = torch.randn(12)
    return {name: one.contiguous().clone() for name, one in out.items()}


@torch.no_grad()
def test_an_openclip_file_gives_bit_identical_features(tmp_path) -> None:  # noqa: ANN001
    source, target = _tower(seed=1), _tower(seed=2)
    save_file(_openclip(source), tmp_path / "open_clip_model.safetensors")
    found = tower_weights.read(str(tmp_path))
    assert found.layout == "openclip"
    new, done = tower_weights.fitted(found, target, (4, 4), "refuse")
    assert done == "as trained"
    names = {tower_weights.canonical(name): name for name in target.state_dict()}
    target.load_state_dict({names[name]: one for name, one in new.items()})
    pixels = torch.randn(2, 3, 32, 32)
    one, two = source(pixels, output_hidden_states=True), target(pixels, output_hidden_states=True)
    for a, b in zip(one.hidden_states, two.hidden_states, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.pooler_output, two.pooler_output)


def _keys(x: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def _triangle(x: float) -> float:
    return max(0.0, 1 - abs(x))


def _sample(grid: list[list[float]], row: float, column: float, mode: str) -> float:
    """A grid's value between its cells; outside, the nearest cell."""
    kernel, reach = (_keys, 2) if mode == "bicubic" else (_triangle, 1)
    last = len(grid) - 1
    if mode == "bilinear":
        row, column = max(row, 0.0), max(column, 0.0)
    total = 0.0
    for r in range(math.floor(row) - reach + 1, math.floor(row) + reach + 1):
        for c in range(math.floor(column) - reach + 1, math.floor(column) + reach + 1):
            value = grid[min(max(r, 0), last)][min(max(c, 0), last)]
            total += value * kernel(row - r) * kernel(column - c)
    return total


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "grid"), [(4, (6, 6)), (5, (3, 3)), (2, (3, 5))])
def test_positions_are_sampled_at_pixel_centres(
    mode: str, side: int, grid: tuple[int, int]
) -> None:
    positions = torch.randn(1 + side * side, 3, generator=torch.Generator().manual_seed(side))
    found = tower_weights.resized(positions, True, grid, mode)
    assert torch.equal(found[0], positions[0])
    rows, columns = grid
    for channel in range(3):
        cells = positions[1:, channel].view(side, side).tolist()
        for r in range(rows):
            for c in range(columns):
                y = (r + 0.5) * side / rows - 0.5
                x = (c + 0.5) * side / columns - 0.5
                expected = _sample(cells, y, x, mode)
                assert float(found[1 + r * columns + c, channel]) == pytest.approx(
                    expected, abs=1e-5
                )


@torch.no_grad()
def test_interpolated_positions_are_what_transformers_makes_of_larger_pictures(tmp_path) -> None:  # noqa: ANN001
    """A tower of 32 pixels in a model of 48: as transformers runs the small tower at 48."""
    source, target = _tower(32, seed=3), _tower(48, seed=4)
    save_file(_openclip(source), tmp_path / "model.safetensors")
    found = tower_weights.read(str(tmp_path))
    new, done = tower_weights.fitted(found, target, (6, 6), "bicubic")
    assert done == "bicubic, 4 × 4 to 6 × 6"
    names = {tower_weights.canonical(name): name for name in target.state_dict()}
    target.load_state_dict({names[name]: one for name, one in new.items()})
    pixels = torch.randn(2, 3, 48, 48)
    wanted = source(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(target(pixels).last_hidden_state, wanted, atol=1e-5, rtol=1e-5)
