"""With what a run was made: versions, hardware, hashes. No user names, no private paths."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

_PACKAGES: Final = (
    "redteam",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "pydantic",
)
_ROOT: Final = Path(__file__).resolve().parent.parent


def scrub(text: str) -> str:
    """Take the private parts of paths out of a text."""
    places = {
        sysconfig.get_paths()["purelib"]: "site-packages",
        sysconfig.get_paths()["stdlib"]: "python",
        str(_ROOT): "redteam-root",
        str(Path.cwd()): ".",
        str(Path.home()): "~",
    }
    for place in sorted(places, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, places[place])
    return text


def command_line(arguments: Sequence[str]) -> str:
    """The command as typed; absolute paths are shortened to their last part."""
    shown = []
    for argument in arguments:
        path = Path(argument)
        shown.append(f"…/{path.name}" if path.is_absolute() else scrub(argument))
    return shlex.join(["redteam", *shown])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages results depend on; "absent" where missing."""
    return {
        "python": platform.python_version(),
        **{name: version_of(name) for name in _PACKAGES},
    }


def version_of(package: str) -> str:
    """Version of an installed package; "absent" where it is missing."""
    try:
        return str(version(package))
    except PackageNotFoundError:
        return "absent"


def commit() -> str | None:
    """The git commit of our checkout, marked if it was changed; None outside of one."""
    git = shutil.which("git")
    if git is None or not (_ROOT / ".git").exists():
        return None
    head = _git(git, "rev-parse", "HEAD")
    if not head:
        return None
    changed = _git(git, "status", "--porcelain", "--untracked-files=no")
    return f"{head} (with uncommitted changes)" if changed else head


def _git(git: str, *arguments: str) -> str:
    command = [git, "-C", str(_ROOT), *arguments]
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command on our own folder
            command, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def hardware(device: str) -> dict[str, Any]:
    """The machine as far as results or timings depend on it, and what sums are rounded by.

    Two runs that agree in all of this, in the versions and in the hashes give the same ledger up
    to timings; where one differs, sums may be rounded otherwise.
    """
    import torch

    found: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "cpu": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
        found["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {**found, "arithmetic": _arithmetic(on_gpu=device.startswith("cuda"))}


def _processor() -> str:
    """Name of the CPU; the library that multiplies matrices chooses its kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown"


def _arithmetic(*, on_gpu: bool) -> dict[str, Any]:
    """Switches of torch that decide how a sum is rounded, and whether twice in the same way."""
    import torch

    found: dict[str, Any] = {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
        "onednn": torch.backends.mkldnn.enabled,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    if on_gpu:
        cuda: Any = torch.backends.cuda
        cudnn = torch.backends.cudnn
        found |= {
            "tf32_matmul": cuda.matmul.allow_tf32,
            "tf32_cudnn": cudnn.allow_tf32,
            "bf16_reduced_precision": cuda.matmul.allow_bf16_reduced_precision_reduction,
            "fp16_reduced_precision": cuda.matmul.allow_fp16_reduced_precision_reduction,
            "cudnn_deterministic": cudnn.deterministic,
            "cudnn_benchmark": cudnn.benchmark,
            "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG", "not set"),
            "attention_kernels": [
                name
                for name, enabled in (
                    ("flash", cuda.flash_sdp_enabled()),
                    ("efficient", cuda.mem_efficient_sdp_enabled()),
                    ("cudnn", cuda.cudnn_sdp_enabled()),
                    ("math", cuda.math_sdp_enabled()),
                )
                if enabled
            ],
        }
    return found


def collect(
    machine: dict[str, Any], identity: dict[str, Any], engine: dict[str, Any]
) -> dict[str, Any]:
    """Everything for the manifest.

    Args:
        machine: that it is run on, see `hardware`.
        identity: hashes of what must not change under a run; a resume compares them.
        engine: options of the engine.
    """
    return {
        "identity": identity,
        "versions": versions(),
        "hardware": machine,
        "engine": engine,
        "commit": commit(),
        "command": command_line(sys.argv[1:]),
    }


def made_otherwise(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what a session of a run is not like the first one: hardware, arithmetic, versions.

    Args:
        before: provenance of the manifest; what it does not name is not compared.
        now: that of this session.

    Returns:
        One text for each, such as ``threads 1 instead of 2``; the workers of Ray are not compared.
    """
    found = []
    for part in ("hardware", "versions"):
        old, new = dict(_flat(before.get(part) or {})), dict(_flat(now.get(part) or {}))
        found += [
            f"{key} {new[key]} instead of {old[key]}"
            for key in old.keys() & new.keys()
            if old[key] != new[key]
        ]
    return sorted(found)


def _flat(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        if key == "workers":
            continue
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield key, str(value)
