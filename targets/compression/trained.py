"""Weights of trained compressors: a folder with ``config.json`` and ``model.safetensors``.

The scenes LVLMs' are shipped and named like them; anything else is the path of a folder, as the
recipes in `targets.scenes.compressors` write one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from targets.errors import CompressionError

if TYPE_CHECKING:
    from targets.families.base import Family

UNTRAINED: Final = "none"
"""Value of `weights` that asks for the documented untrained mode."""
_CONFIG, _TENSORS = "config.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Trained:
    """What a folder of weights holds.

    Attributes:
        network: arguments of the network's class.
        model: facts about the model it was trained for, by name; see `facts`.
        tensors: float32, by name.
    """

    network: dict[str, Any]
    model: dict[str, int]
    tensors: dict[str, Tensor]

    def fill(self, network: nn.Module, name: str) -> None:
        """Put the tensors into a network made from `network`.

        Raises:
            CompressionError: if names or shapes differ.
        """
        try:
            network.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise CompressionError(
                f"compressor {name}: weights and their {_CONFIG} do not belong together: {error}; "
                "write both with the recipe of this version"
            ) from error
        network.eval().requires_grad_(False)


def facts(family: Family) -> dict[str, int]:
    """What weights have to fit of a model: widths and depths of its two halves."""
    tower = getattr(family.tower.config, "vision_config", family.tower.config)
    return {
        "text_width": int(family.text.config.hidden_size),
        "text_layers": len(family.layers),
        "vision_width": int(getattr(tower, "embed_dim", None) or tower.hidden_size),
        "vision_layers": family.tower_depth,
    }


def folder_of(name: str, weights: str) -> Path:
    """Where the weights of a compressor are.

    Raises:
        CompressionError: if there are none of this name.
    """
    from targets.scenes import WEIGHTS

    places = (WEIGHTS / weights / "compressors" / name, Path(weights))
    for place in places:
        if (place / _CONFIG).is_file() and (place / _TENSORS).is_file():
            return place
    shipped = sorted(
        path.parent.parent.parent.name for path in WEIGHTS.glob(f"*/*/{name}/{_CONFIG}")
    )
    raise CompressionError(
        f"compressor {name}: weights is {weights!r}, which is no folder with {_CONFIG} and "
        f"{_TENSORS}; give one, or {', '.join([*shipped, UNTRAINED])} "
        f"(python -m targets.scenes.compressors.train_{name} shows how they are made)"
    )


def read(name: str, weights: str) -> Trained:
    """Read the weights of a compressor.

    Args:
        name: of the compressor.
        weights: the name of shipped weights, or a folder.

    Raises:
        CompressionError: if they do not exist, cannot be read or are another compressor's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = folder_of(name, weights)
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        owner, network, model = config["compressor"], config["network"], config["model"]
        tensors = load_file(folder / _TENSORS)
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise CompressionError(
            f"compressor {name}: the weights in {folder} cannot be read "
            f"({type(error).__name__}: {error}); write them again with the recipe"
        ) from error
    if owner != name:
        raise CompressionError(
            f"compressor {name}: {folder} holds weights of {owner!r}; give a folder of {name}"
        )
    return Trained(network, model, {key: value.float() for key, value in tensors.items()})


def misfit(name: str, weights: str, family: Family) -> str | None:
    """Why weights do not belong to a model; None if they do, or none are used.

    Raises:
        CompressionError: if they do not exist or cannot be read.
    """
    if weights == UNTRAINED:
        return None
    wanted, found = read(name, weights).model, facts(family)
    wrong = [
        f"{fact.replace('_', ' ')} {found[fact]} instead of {value}"
        for fact, value in wanted.items()
        if found.get(fact) != value
    ]
    if not wrong:
        return None
    return (
        f"its weights {weights!r} were trained for another model (this one has "
        f"{', '.join(wrong)}); train some for this model and name their folder in `weights`, or "
        f"say weights: {UNTRAINED} for the untrained mode"
    )


def write(
    folder: Path, name: str, network: nn.Module, arguments: dict[str, Any], model: dict[str, int]
) -> None:
    """Write weights as float16.

    Args:
        folder: where; created.
        name: of the compressor.
        network: the trained network.
        arguments: of its class.
        model: `facts` of the model it was trained for.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    save_file(tensors, folder / _TENSORS)
    config = {"compressor": name, "network": arguments, "model": model}
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def seeded(make: type[nn.Module], arguments: dict[str, Any], seed: int = 0) -> nn.Module:
    """A network with starting values from `seed`; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(**arguments)
