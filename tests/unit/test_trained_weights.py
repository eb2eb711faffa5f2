"""Folders of weights: found, read, matched to a model, refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import weights
from torch import nn

from targets.compression import Explainability, QueCC, TokenFLEX, trained
from targets.compression.aside import unhooked
from targets.errors import CompressionError

METHODS: dict[str, Any] = {"explainability": Explainability, "quecc": QueCC, "tokenflex": TokenFLEX}


def family(tokens: int = 36, **facts: int) -> Any:
    """An adapter as far as weights are concerned."""
    given = {**weights.TINY, **facts}
    return SimpleNamespace(
        text=SimpleNamespace(config=SimpleNamespace(hidden_size=given["text_width"])),
        layers=[None] * given["text_layers"],
        tower=SimpleNamespace(config=SimpleNamespace(hidden_size=given["vision_width"])),
        tower_depth=given["vision_layers"],
        fixed_tokens=lambda: tokens,
        model_types=("tiny",),
    )


@pytest.fixture(params=sorted(METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_numbers_come_back_rounded_to_half(name: str) -> None:
    network = weights.network(name, 3)
    found = trained.read(name, weights.folder(name, 3))
    assert found.model == weights.TINY
    for key, value in network.state_dict().items():
        assert torch.equal(found.tensors[key], value.half().float())


def test_shipped_weights_fit_the_model_they_are_shipped_with(name: str) -> None:
    found = trained.read(name, "scenes-a")
    config = trained.folder_of(name, "scenes-a").parents[1] / "config.json"
    model = json.loads(config.read_text())
    assert found.model["text_width"] == model["text_config"]["hidden_size"]
    assert found.model["vision_layers"] == model["vision_config"]["num_hidden_layers"]
    method = METHODS[name](retention=0.25)
    network = method._network
    assert not any(p.requires_grad for p in network.parameters())
    assert all(bool(p.isfinite().all()) for p in network.parameters())
    limit = 200_000 if name == "explainability" else 1_500_000
    assert (trained.folder_of(name, "scenes-a") / "model.safetensors").stat().st_size < limit


def test_weights_of_another_model_are_refused(name: str) -> None:
    method = METHODS[name](retention=0.25, weights=weights.folder(name))
    assert method.refuses(family()) is None
    reason = method.refuses(family(text_width=48, vision_layers=9))
    assert reason is not None
    assert "text width 48 instead of 32, vision layers 9 instead of 3" in reason
    assert METHODS[name](retention=0.25, weights="none").refuses(family(text_width=48)) is None


@pytest.mark.parametrize("name", ["quecc", "tokenflex"])
def test_pictures_without_one_square_grid_are_refused(name: str) -> None:
    method = METHODS[name](retention=0.25, weights="none")
    assert "depend on their size" in str(method.refuses(family(0)))
    assert "square" in str(method.refuses(family(35)))
    assert method.refuses(family(36)) is None


def test_weights_that_do_not_exist(name: str) -> None:
    method = METHODS[name](retention=0.25, weights="scenes-z")
    with pytest.raises(CompressionError, match=r"weights is 'scenes-z'.*scenes-a, none"):
        method.refuses(family())


def test_weights_of_another_compressor(name: str) -> None:
    other = "quecc" if name != "quecc" else "tokenflex"
    with pytest.raises(CompressionError, match=f"holds weights of '{other}'"):
        trained.read(name, weights.folder(other))


def test_broken_weights(name: str, tmp_path: Path) -> None:
    shutil.copytree(weights.folder(name), tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CompressionError, match="cannot be read"):
        trained.read(name, str(tmp_path / "one"))
    shutil.copytree(weights.folder(name), tmp_path / "two")
    (tmp_path / "two" / "config.json").write_text("[]")
    with pytest.raises(CompressionError, match="cannot be read"):
        trained.read(name, str(tmp_path / "two"))


def test_weights_and_configuration_that_differ(name: str, tmp_path: Path) -> None:
    shutil.copytree(weights.folder(name), tmp_path / "one")
    path = tmp_path / "one" / "config.json"
    config = json.loads(path.read_text())
    key = {"explainability": "kernel", "quecc": "text", "tokenflex": "hidden"}[name]
    config["network"][key] += 2
    path.write_text(json.dumps(config))
    with pytest.raises(CompressionError, match="do not belong together"):
        METHODS[name](retention=0.25, weights=str(tmp_path / "one"))._network  # noqa: B018


def test_starting_values_leave_the_global_generator_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert (
        METHODS[name](retention=0.25, weights="none")._network is None or name == "explainability"
    )
    assert torch.equal(before, torch.get_rng_state())


# Calls beside a session


def test_hooks_rest_and_come_back() -> None:
    model, calls = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model[1].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("keywords"), with_kwargs=True)
    model[0].gradient_checkpointing = True  # type: ignore[assignment]
    with unhooked(model):
        model(torch.zeros(1, 2))
        assert not model[0].gradient_checkpointing
    assert calls == []
    model(torch.zeros(1, 2))
    assert calls == ["before", "keywords", "after"]
    assert model[0].gradient_checkpointing


def test_hooks_come_back_after_an_exception() -> None:
    model, calls = nn.Linear(2, 2), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(RuntimeError), unhooked(model):
        model(torch.zeros(1, 3))
    model(torch.zeros(1, 2))
    assert calls == [1]
