"""Hardening a scenes tower: its losses by hand, its attack in the ball, a short run that learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from targets.scenes import WEIGHTS, harden, packing, passes


def test_the_distance_is_in_units_of_each_channels_variance() -> None:
    wanted = passes.Seen(torch.randn(2, 5, 3), torch.rand(2, 4), torch.rand(2, 4, 1))
    seen = passes.Seen(wanted.hidden + torch.tensor([1.0, 0.0, 2.0]), wanted.cls, wanted.keys)
    spread = [float(wanted.hidden[..., c].reshape(-1).var()) for c in range(3)]
    expected = (1 / spread[0] + 4 / spread[2]) / 3
    assert float(harden.distance(seen, wanted)) == pytest.approx(expected, rel=1e-5)
    moved = wanted.hidden.clone()
    moved[0, 2] += 1
    seen = passes.Seen(moved, wanted.cls, wanted.keys)
    weight = torch.zeros(2, 5)
    weight[0, 2] = weight[1, 1] = 1
    one = sum(1 / s for s in spread) / 3
    assert float(harden.distance(seen, wanted, weight)) == pytest.approx(one / 2, rel=1e-5)


def test_the_hinge_asks_for_a_margin_over_the_kth_other_token() -> None:
    score = torch.tensor([[5.0, 1.0, 4.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    wanted = torch.tensor([[True, True, False, False, False], [False] * 5])
    # The second of the others has 3: token 0 is 2 above it, token 1 is 2 below.
    found = harden.hinge(score, wanted, boundary=2, margin=0.5)
    assert float(found) == pytest.approx((0.0 + 2.5) / 2)
    assert float(harden.hinge(score, torch.zeros_like(wanted), 2, 0.5)) == 0


def test_the_gap_is_the_others_mean_minus_that_of_the_wanted() -> None:
    score = torch.tensor([[4.0, 1.0, 3.0], [9.0, 9.0, 9.0]])
    wanted = torch.tensor([[True, False, False], [False, False, False]])
    assert float(harden.gap(score, wanted)) == pytest.approx(2.0 - 4.0)
    assert float(harden.gap(score, torch.zeros_like(wanted))) == 0


def test_the_divergence_is_of_the_normalised_rows() -> None:
    a, b = torch.tensor([[0.2, 0.3]]), torch.tensor([[0.1, 0.4]])
    rest = torch.zeros(1, 3, 1)
    found = harden.divergence(passes.Seen(rest, b, rest), passes.Seen(rest, a, rest))
    expected = 0.4 * math.log(0.4 / 0.2) + 0.6 * math.log(0.6 / 0.8)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_attack_stays_in_the_ball_and_goes_up(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 8, 8, generator=generator)
    slope = torch.randn(images.shape, generator=generator)
    radius = torch.tensor([0.0, 0.02, 0.1])
    found = harden.perturb(images, radius, steps, lambda x: (x * slope).sum(), generator)
    assert torch.equal(found[0], images[0])
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    change = (found - images).abs().amax((1, 2, 3))
    assert (change <= radius + 1e-6).all()
    if steps:
        corner = (images + radius.view(-1, 1, 1, 1) * slope.sign()).clamp(0, 1)
        torch.testing.assert_close(found, corner, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_short_run_changes_the_tower_alone_learns_and_can_be_repeated(tmp_path: Path) -> None:
    recipe = harden.Recipe(
        scenes=16, batch=4, feature_steps=24, feature_planned=24, answer_steps=12
    )
    data = packing.pack("train", 0, 16)
    runs: list[harden.Hardener] = []
    for name in ("one", "two"):
        runs.append(harden.Hardener(recipe, data, tmp_path / name))
        runs[-1].features()
        runs[-1].answers()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = set()
    for name, one in runs[0].model.state_dict().items():
        if not torch.equal(one, runs[0].original.state_dict()[name]):
            changed.add(name)
    assert changed
    assert all(name.startswith("model.vision_tower.") for name in changed)
    assert json.loads((tmp_path / "one" / "recipe.json").read_text())["feature_steps"] == 24
    for key, one in runs[0].mean.state_dict().items():
        own = next(v for k, v in first.items() if k.removeprefix("vision_model.") == key)
        assert torch.equal(own, one.to(torch.bfloat16))


@torch.no_grad()
def test_the_shipped_tower_was_made_by_the_shipped_recipe() -> None:
    folder = WEIGHTS / "scenes-a" / "robust" / "ranking"
    recipe = json.loads((folder / "recipe.json").read_text())
    known = json.loads(json.dumps(harden.asdict(harden.PRESETS["ranking"])))
    assert recipe == known
    log = [json.loads(x) for x in (folder / "training_log.jsonl").read_text().splitlines()]
    for stage in ("features", "answers"):
        steps = [one["step"] for one in log if one.get("stage") == stage]
        assert max(steps) == recipe[f"{stage.removesuffix('s')}_steps"]


def test_the_card_reports_what_the_benchmark_measured() -> None:
    folder = WEIGHTS / "scenes-a" / "robust" / "ranking"
    found = json.loads((folder / "evaluation.json").read_text())
    card = (folder / "README.md").read_text().splitlines()
    assert found["split"] == "test"
    assert {one["model"] for one in found["rows"]} == {"original", "hardened"}
    for one in found["rows"]:
        figures = f"{one['csfr']:.2f} / {one['asr']:.2f}"
        start = f"| {one['epsilon']}/255 | {one['attack']} | {one['compression']} |"
        rows = [line for line in card if line.startswith(start)]
        assert len(rows) == 1, start
        cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
        assert cells[3 if one["model"] == "original" else 4] == figures, rows[0]
