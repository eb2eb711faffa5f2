"""With what a run was made: versions, hardware, hashes. No user names, no private paths."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
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
    """The machine as far as results or timings depend on it."""
    import torch

    found: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
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
