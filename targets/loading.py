"""Load a model and its processor: safetensors only, frozen weights, and what exactly was loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import torch

from targets.errors import TargetError

ATTENTION: Final = ("auto", "eager", "sdpa", "flash_attention_2")
DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_PROCESSOR_FILES: Final = (
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
)
_AMPERE: Final = 8


def resolve_device(device: str | torch.device) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        TargetError: for a device that does not exist here.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise TargetError(f"device {device!r} is not known to torch; use auto, cpu or cuda") from (
            error
        )
    if found.type == "cuda" and not torch.cuda.is_available():
        raise TargetError(f"device {device} was asked for, but torch sees no CUDA device here")
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """A dtype by name; ``auto`` is bfloat16 on a GPU of compute capability ≥ 8, else float32.

    Raises:
        TargetError: for another than auto, float32, bfloat16, float16.
    """
    if dtype == "auto":
        fast = device is not None and device.type == "cuda"
        fast = fast and torch.cuda.get_device_capability(device)[0] >= _AMPERE
        return torch.bfloat16 if fast else torch.float32
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if str(dtype) not in DTYPES:
        raise TargetError(f"dtype {dtype!r} is not supported; one of auto, {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]


def spreads(device_map: str, source: str | Path, device: torch.device) -> bool:
    """Whether a model is spread over all GPUs.

    Args:
        device_map: ``single``, ``balanced``, or ``auto``: only where a local folder's weights are
            larger than what is free on the device.
        source: local folder or hub id.
        device: where it would be otherwise.

    Raises:
        TargetError: for another word, or ``balanced`` without several GPUs.
    """
    if device_map not in ("auto", "single", "balanced"):
        raise TargetError(f"device_map {device_map!r} is unknown; one of auto, single, balanced")
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device_map == "balanced" and count < 2:
        raise TargetError(
            f"device_map balanced needs several GPUs, torch sees {count}; use single or auto"
        )
    if device_map != "auto" or count < 2:
        return device_map == "balanced"
    folder = Path(source).expanduser()
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return weights > torch.cuda.mem_get_info(device)[0]


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention implementation that will be used.

    Args:
        name: ``auto`` is flash_attention_2 on CUDA of compute capability ≥ 8 in half precision
            where the package is installed, else sdpa.
        device: where the model will be.
        dtype: of its weights.

    Raises:
        TargetError: for an unknown name, or flash_attention_2 where it cannot run.
    """
    if name not in ATTENTION:
        raise TargetError(f"attn_implementation {name!r} is unknown; one of {', '.join(ATTENTION)}")
    if name not in ("auto", "flash_attention_2"):
        return name
    missing = _flash_missing(device, dtype)
    if name == "auto":
        return "sdpa" if missing else "flash_attention_2"
    if missing:
        raise TargetError(f"attn_implementation flash_attention_2 cannot run: {missing}")
    return name


def _flash_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlashAttention cannot run, or None if it can."""
    from transformers.utils import is_flash_attn_2_available

    if device.type != "cuda":
        return f"it needs a CUDA device, the model is on {device}; use sdpa"
    if torch.cuda.get_device_capability(device)[0] < _AMPERE:
        return "the GPU's compute capability is below 8.0; use sdpa"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, the dtype is {dtype}; use sdpa"
    if not is_flash_attn_2_available():
        return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    return None


def load(
    source: str | Path,
    *,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    asked: str,
    spread: bool,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """The model (frozen, evaluation mode) and its processor.

    Raises:
        TargetError: if there is nothing at `source`, or its weights are not safetensors.
    """
    from transformers import AutoModelForImageTextToText

    from targets.processors import load_processor

    folder = Path(source).expanduser()
    if folder.is_dir():
        check_folder(folder)
    elif folder.is_absolute() or str(source).startswith((".", "~")):
        raise TargetError(f"model folder {source} does not exist")
    where = str(folder) if folder.is_dir() else str(source)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    attention = _of_family(where, attention, asked, common)
    try:
        # Both name the revision; a bare download without it would not be repeatable.
        processor = load_processor(where, **common)
        model = AutoModelForImageTextToText.from_pretrained(  # nosec B615
            where,
            use_safetensors=True,
            dtype=dtype,
            attn_implementation=attention,
            **({"device_map": "balanced"} if spread else {}),
            **common,
        )
    except (OSError, ValueError, ImportError) as error:
        raise TargetError(
            f"model {source!s} could not be loaded"
            f"{'' if revision is None else f' at revision {revision}'}: {error}"
        ) from error
    if not spread:
        model.to(device)
    model.eval().requires_grad_(False)
    return model, processor


def _of_family(where: str, attention: str, asked: str, common: dict[str, Any]) -> str:
    """What a family needs where the user left the choice to us."""
    from transformers import AutoConfig

    from targets.families import adapter_of

    if asked != "auto":
        return attention
    try:
        config = AutoConfig.from_pretrained(where, **common)  # nosec B615
    except (OSError, ValueError):
        return attention  # loading the model will say what is wrong
    adapter = adapter_of(config.model_type)
    return (adapter.attention(config) if adapter is not None else None) or attention


def check_folder(folder: Path) -> None:
    """Refuse a folder without configuration or with pickled weights only.

    Raises:
        TargetError: naming the files found.
    """
    if not (folder / "config.json").is_file():
        raise TargetError(f"model folder {folder} has no config.json; it is no checkpoint")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    found = f"only {', '.join(pickles)}" if pickles else "none"
    raise TargetError(
        f"model folder {folder} has no safetensors weights ({found} there). Pickled weights can "
        "run code when loaded and are refused; convert them with save_pretrained"
    )


def identity(source: str | Path, model: Any, revision: str | None) -> dict[str, str]:  # noqa: ANN401
    """What exactly was loaded, without naming any place on this machine.

    Returns:
        ``class``, ``model_type``, ``dtype``, ``attention``, ``vision_attention``; for a local
        folder ``weights`` and ``processor`` (SHA-256 over names and contents of the files), for a
        hub id ``id`` and ``revision`` (the commit, where known).
    """
    config = model.config
    found = {
        "class": type(model).__name__,
        "model_type": str(config.model_type),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": _attention(config, "text_config"),
        "vision_attention": _attention(config, "vision_config"),
        "device_map": "balanced" if getattr(model, "hf_device_map", None) else "single",
    }
    folder = Path(source).expanduser()
    if folder.is_dir():
        found["name"] = folder.resolve().name
        found["weights"] = _digest(folder, ("*.safetensors", "config.json"))
        found["processor"] = _digest(folder, _PROCESSOR_FILES)
    else:
        found["id"] = str(source)
        commit = getattr(config, "_commit_hash", None) or revision
        found["revision"] = "unknown" if commit is None else str(commit)
    return found


def _attention(config: Any, part: str) -> str:  # noqa: ANN401 - of transformers
    return str(getattr(getattr(config, part, config), "_attn_implementation", "unknown"))


def _digest(folder: Path, patterns: tuple[str, ...]) -> str:
    """SHA-256 over the names and contents of files, in the order of their names."""
    names = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    total = hashlib.sha256()
    for path in names:
        if path.is_file():
            with path.open("rb") as stream:
                one = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{path.name}\0{one}\n".encode())
    return total.hexdigest()
