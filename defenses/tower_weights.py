"""Weights of a vision tower from a folder or the hub, without pickle, by transformers' names.

Two layouts of names are read. *transformers*: `CLIPVisionModel` or `SiglipVisionModel`, alone or
inside a larger model, with or without the prefix ``vision_model.``. *OpenCLIP*: the ``visual.``
part of a CLIP with a plain ViT, whose queries, keys and values are fused in ``in_proj``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from defenses.base import DefenseError

Positions = Literal["bicubic", "bilinear", "refuse"]
"""What is done where a tower was trained on another grid of patches."""

_PREFIXES: Final = (
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
    "vision_tower.vision_model.",
    "vision_tower.",
    "vision_model.",
)
_CLASS: Final = "embeddings.class_embedding"
_POSITIONS: Final = "embeddings.position_embedding.weight"
_PATCH: Final = "embeddings.patch_embedding.weight"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PREFERRED: Final = ("model.safetensors", "open_clip_model.safetensors")
_OUTSIDE: Final = {
    "class_embedding": _CLASS,
    "positional_embedding": _POSITIONS,
    "conv1.weight": _PATCH,
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_INSIDE: Final = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK: Final = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class TowerWeights:
    """Weights as they were found.

    Attributes:
        tensors: by the names transformers has inside a tower (``encoder.layers.0.…``).
        layout: of the names they were read from.
        source: name of a shipped tower, hub id, or last part of a folder's path.
        revision: commit of a hub id; empty for a folder.
        digest: SHA-256 of the files, in the order of their names.
        activation: what the configuration beside them says; None where it does not.
    """

    tensors: dict[str, Tensor]
    layout: Literal["transformers", "openclip"]
    source: str
    revision: str
    digest: str
    activation: str | None


def read(weights: str, revision: str | None = None, file: str | None = None) -> TowerWeights:
    """Weights at a folder or hub id; safetensors only.

    Args:
        weights: folder, or hub id.
        revision: commit, tag or branch of a hub id.
        file: which file; None takes the one there is, ``model.safetensors`` or
            ``open_clip_model.safetensors`` before others.

    Raises:
        DefenseError: if there is nothing, nothing but pickles, several files of which none is
            named, or a file that is no vision tower.
    """
    folder = Path(weights).expanduser()
    local = folder.is_dir()
    if not local:
        if folder.is_absolute() or weights.startswith((".", "~")):
            raise DefenseError(
                f"defence robust_encoder: the folder of weights {weights!r} does not exist; name a "
                "folder with a .safetensors file, a hub id, or a shipped tower"
            )
        folder = _fetched(weights, revision, file)
    paths = _files(folder, weights, file)
    raw: dict[str, Tensor] = {}
    for path in paths:
        raw |= _loaded(path)
    tensors, layout = named(raw, weights)
    return TowerWeights(
        tensors=tensors,
        layout=layout,
        source=folder.resolve().name if local else weights,
        revision="" if local else folder.name,
        digest=_digest(paths),
        activation=_activation(folder),
    )


def named(
    raw: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], Literal["transformers", "openclip"]]:
    """Tensors of a tower by transformers' names, and the layout they had.

    Args:
        raw: as in the file; what belongs to no tower is left out.
        where: for messages.

    Raises:
        DefenseError: if it holds no vision tower of a kind that is read.
    """
    if any(name.startswith("visual.trunk.") for name in raw):
        raise DefenseError(
            f"defence robust_encoder: {where!r} holds a tower of timm inside OpenCLIP (names "
            "visual.trunk.…), as OpenCLIP's SigLIP models do; it cannot be read. Convert it to "
            "transformers' SiglipVisionModel and save it with save_pretrained"
        )
    visual = {
        name.removeprefix("visual."): one for name, one in raw.items() if name.startswith("visual.")
    }
    bare = raw if "conv1.weight" in raw else {}
    if "conv1.weight" in visual or bare:
        return from_openclip(visual or bare, where), "openclip"
    found: dict[str, Tensor] = {}
    for name, one in raw.items():
        inner = canonical(name)
        if inner.startswith(
            ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")
        ):
            found[inner] = one
    # The text half of a CLIP has no prefix that could be mistaken: it is below text_model.
    if _PATCH not in found:
        some = ", ".join(sorted(raw)[:3]) or "nothing"
        raise DefenseError(
            f"defence robust_encoder: {where!r} holds no vision tower of CLIP or SigLIP, in "
            f"transformers' names or OpenCLIP's; there are {len(raw)} tensors, such as {some}"
        )
    return found, "transformers"


def canonical(name: str) -> str:
    """A name inside a tower, without what the tower is in."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def from_openclip(visual: Mapping[str, Tensor], where: str = "the file") -> dict[str, Tensor]:
    """OpenCLIP's ViT by transformers' names.

    ``attn.in_proj_weight`` ``[3·D, D]`` and its bias are queries, keys and values in this order.
    The projection to the joint space (``proj``) is no part of a tower that gives patches.

    Args:
        visual: names without ``visual.``.
        where: for messages.

    Raises:
        DefenseError: for a name that a plain ViT does not have, such as layer scales or pooling.
    """
    out: dict[str, Tensor] = {}
    strange: list[str] = []
    for name, one in visual.items():
        block = _BLOCK.fullmatch(name)
        if name in _OUTSIDE:
            out[_OUTSIDE[name]] = one
        elif block is not None and _block(out, f"encoder.layers.{block[1]}.", block[2], one):
            continue
        elif name != "proj":
            strange.append(name)
    if strange:
        raise DefenseError(
            f"defence robust_encoder: {where!r} is no plain ViT of OpenCLIP; it also has "
            f"{', '.join(sorted(strange)[:3])}{' …' if len(strange) > 3 else ''}"
        )
    return out


def _block(out: dict[str, Tensor], layer: str, name: str, one: Tensor) -> bool:
    """Put one tensor of a block in its place; False if a plain block has none of this name."""
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.removeprefix("attn.in_proj_")
        for part, piece in zip("qkv", one.chunk(3), strict=True):
            out[f"{layer}self_attn.{part}_proj.{kind}"] = piece
        return True
    home, _, kind = name.rpartition(".")
    if home not in _INSIDE or kind not in ("weight", "bias"):
        return False
    out[f"{layer}{_INSIDE[home]}.{kind}"] = one
    return True


def resized(positions: Tensor, cls: bool, grid: tuple[int, int], mode: str) -> Tensor:
    """Position embeddings for another grid of patches; CLS keeps its own.

    Sampled at pixel centres (``align_corners=False``), the way transformers and OpenCLIP do it.

    Args:
        positions: ``[cls + S², D]``, rows in raster order.
        cls: whether the first is of CLS.
        grid: rows and columns wanted.
        mode: ``bicubic`` (Keys' kernel, a = −0.75) or ``bilinear``.

    Returns:
        ``[cls + rows · columns, D]`` of the same dtype; the same tensor where the grid is right.

    Raises:
        DefenseError: if the positions are of no square grid.
    """
    first, rest = positions[: int(cls)], positions[int(cls) :]
    side = isqrt(len(rest))
    if side * side != len(rest):
        raise DefenseError(
            f"defence robust_encoder: {len(rest)} position embeddings of patches are of no square "
            "grid; such towers are not read"
        )
    if (side, side) == tuple(grid):
        return positions
    square = rest.float().T.reshape(1, -1, side, side)
    new = interpolate(square, size=grid, mode=mode, align_corners=False)
    flat = new.flatten(2)[0].T.to(positions.dtype)
    return torch.cat([first, flat])


def fitted(
    weights: TowerWeights,
    tower: Any,  # noqa: ANN401 - of transformers
    grid: tuple[int, int],
    mode: Positions,
) -> tuple[dict[str, Tensor], str]:
    """Weights in the shapes of a tower, by canonical names, and what became of the positions.

    Args:
        weights: as found.
        tower: `CLIPVisionModel` or `SiglipVisionModel`.
        grid: its rows and columns of patches.
        mode: of interpolation.

    Raises:
        DefenseError: naming the first thing that does not fit.
    """
    wanted = {canonical(name): one for name, one in tower.state_dict().items()}
    where = f"defence robust_encoder: the tower {weights.source!r}"
    have = dict(weights.tensors)
    _same_depth(where, have, wanted)
    if (_CLASS in have) != (_CLASS in wanted):
        raise DefenseError(
            f"{where} {'has' if _CLASS in have else 'has no'} CLS token, the target's "
            f"{'has' if _CLASS in wanted else 'has none'}; one is of CLIP, the other of SigLIP"
        )
    missing = sorted(set(wanted) - set(have))
    if missing:
        raise DefenseError(f"{where} lacks {len(missing)} tensors, such as {missing[0]}")
    done = "as trained"
    for name, target in wanted.items():
        if name != _POSITIONS and have[name].shape != target.shape:
            raise DefenseError(
                f"{where} does not fit: {name} is {list(have[name].shape)}, the target's is "
                f"{list(target.shape)} (width, MLP and patch size have to be equal)"
            )
    rows = len(have[_POSITIONS])
    if rows != len(wanted[_POSITIONS]):
        cls = _CLASS in wanted
        side = isqrt(rows - int(cls))
        change = f"{side} × {side} to {grid[0]} × {grid[1]}"
        if mode == "refuse":
            raise DefenseError(
                f"{where} was trained on {side} × {side} patches, the target has {grid[0]} × "
                f"{grid[1]}; set positions to bicubic or bilinear to interpolate"
            )
        have[_POSITIONS] = resized(have[_POSITIONS], cls, grid, mode)
        done = f"{mode}, {change}"
    bad = [name for name in wanted if not bool(have[name].isfinite().all())]
    if bad:
        raise DefenseError(f"{where} has values that are not finite in {bad[0]}")
    return {name: have[name] for name in wanted}, done


def _same_depth(where: str, have: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    def depth(names: Mapping[str, Tensor]) -> int:
        return len({name.split(".")[2] for name in names if name.startswith("encoder.layers.")})

    if depth(have) < depth(wanted):
        raise DefenseError(f"{where} has {depth(have)} layers, the target's tower {depth(wanted)}")
    if depth(have) > depth(wanted):
        raise DefenseError(
            f"{where} has {depth(have)} layers, the target's tower only {depth(wanted)}; the "
            "target was saved without its last ones or is another architecture"
        )


def _fetched(weights: str, revision: str | None, file: str | None) -> Path:
    """The snapshot of a hub id: safetensors and configurations, nothing else."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            weights,
            revision=revision,
            allow_patterns=["*.json", file or "*.safetensors"],
        )
    except (OSError, ValueError) as error:
        raise DefenseError(
            f"defence robust_encoder: the tower {weights!r} could not be fetched from the hub"
            f"{'' if revision is None else f' at revision {revision}'}: {error}. Without a "
            "network, download it elsewhere and name the folder"
        ) from error
    return Path(found)


def _files(folder: Path, weights: str, file: str | None) -> list[Path]:
    """The files of weights in a folder."""
    if file is not None:
        path = folder / file
        if path.suffix != ".safetensors" or not path.is_file():
            raise DefenseError(
                f"defence robust_encoder: {weights!r} has no safetensors file {file!r}; {_advice()}"
            )
        return [path]
    there = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [path for path in there if path.name in parts]
    for name in _PREFERRED:
        if folder / name in there:
            return [folder / name]
    if len(there) == 1:
        return there
    if there:
        raise DefenseError(
            f"defence robust_encoder: {weights!r} has several files of weights "
            f"({', '.join(path.name for path in there)}); name one as `file`"
        )
    pickles = sorted(one.name for one in folder.iterdir() if one.suffix in _PICKLES)
    found = f"only {', '.join(pickles)}" if pickles else "none"
    raise DefenseError(
        f"defence robust_encoder: {weights!r} has no safetensors weights ({found} there). "
        f"{_advice()}"
    )


def _advice() -> str:
    return (
        "Pickled weights can run code when loaded and are refused. Convert them once, where that "
        "does no harm: torch.load(…, weights_only=True), then safetensors.torch.save_file, and "
        "name the folder"
    )


def _loaded(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DefenseError(
            f"defence robust_encoder: {path.name} could not be read as safetensors: {error}"
        ) from error


def _digest(paths: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            one = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{path.name}\0{one}\n".encode())
    return total.hexdigest()


def _activation(folder: Path) -> str | None:
    """What the configuration beside the weights says about the activation."""
    plain, openclip = folder / "config.json", folder / "open_clip_config.json"
    if plain.is_file():
        config = json.loads(plain.read_text(encoding="utf-8"))
        config = config.get("vision_config", config)
        found = config.get("hidden_act") if isinstance(config, dict) else None
        return None if found is None else str(found)
    if openclip.is_file():
        model = json.loads(openclip.read_text(encoding="utf-8")).get("model_cfg") or {}
        quick = model.get("quick_gelu")
        return None if quick is None else ("quick_gelu" if quick else "gelu")
    return None
