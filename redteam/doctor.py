"""Checks of an installation, each with its remedy."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from redteam.provenance import versions
from redteam.scenario import packaged

State = Literal["ok", "note", "broken"]
_MINIMUM_DISK: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One check.

    Attributes:
        state: ``broken`` keeps redteam from running; a ``note`` does not.
        what: was checked.
        detail: what was found.
        remedy: what to do; "" for nothing.
    """

    state: State
    what: str
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Run all checks; a check that raises is itself a finding."""
    found = []
    for check in (
        _python,
        _packages,
        _torch,
        _torchvision,
        _flash_attention,
        _libraries,
        _scenarios,
        _weights,
        _disk,
        _writing,
    ):
        found.append(_guarded(check))
    return found


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        # A doctor that dies of the illness helps nobody.
        name = check.__name__.strip("_").replace("_", " ")
        return Finding("broken", name, f"{type(error).__name__}: {error}", "reinstall redteam")


def _python() -> Finding:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("ok", "python", detail)


def _packages() -> Finding:
    found = versions()
    detail = ", ".join(f"{name} {number}" for name, number in found.items() if name != "python")
    missing = [name for name, number in found.items() if number == "absent" and name != "redteam"]
    if missing:
        return Finding("broken", "packages", detail, f"pip install {' '.join(missing)}")
    return Finding("ok", "packages", detail)


def _torch() -> Finding:
    import torch

    threads = f"{torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("ok", "device", f"CUDA {torch.version.cuda}: {', '.join(names)}; {threads}")
    if torch.version.cuda:
        return Finding(
            "note",
            "device",
            f"a CUDA build of torch ({torch.version.cuda}), but no GPU is visible; {threads}",
            "on a machine without a GPU the CPU build is smaller; else check the driver",
        )
    return Finding("ok", "device", f"CPU, {threads}")


def _torchvision() -> Finding:
    if importlib.util.find_spec("torchvision") is None:
        return Finding("ok", "torchvision", "absent; it is not needed")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        # Any way in which it breaks breaks transformers too.
        return Finding(
            "broken",
            "torchvision",
            f"installed but cannot be imported ({error}); transformers then fails as well",
            "pip uninstall torchvision, or install the build that matches torch",
        )
    return Finding("ok", "torchvision", "importable")


def _flash_attention() -> Finding:
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        return Finding("ok", "flash-attn", "available")
    return Finding("ok", "flash-attn", "absent; sdpa is used (it matters on GPUs only)")


def _libraries() -> Finding:
    from attacks.library_names import LIBRARIES

    parts, remedies = [], []
    for library in LIBRARIES.values():
        try:
            parts.append(f"{library.title} {importlib.metadata.version(library.title)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{library.title} absent")
            remedies.append(f"for {library.name}.* attacks: {library.install}")
    return Finding("ok", "attack libraries", ", ".join(parts), "; ".join(remedies))


def _scenarios() -> Finding:
    names = packaged()
    if "quickstart" not in names:
        return Finding("broken", "scenarios", "the packaged ones are missing", "reinstall redteam")
    return Finding("ok", "scenarios", ", ".join(names))


def _weights() -> Finding:
    from targets.scenes import checkpoints, load_scenes

    names = checkpoints()
    if "scenes-a" not in names:
        return Finding(
            "broken",
            "embedded LVLM",
            "its weights are missing",
            "reinstall redteam, or train them: python -m targets.scenes.train",
        )
    model = load_scenes("scenes-a")
    rows, columns = model.layout((96, 96)).shapes[0]
    detail = f"{', '.join(names)}; scenes-a loads, {rows} × {columns} visual tokens"
    return Finding("ok", "embedded LVLM", detail)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / (1 << 30):.1f} GiB free here"
    if free < _MINIMUM_DISK:
        return Finding("note", "disk", detail, "a run stores all its images; free some space")
    return Finding("ok", "disk", detail)


def _writing() -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir=Path.cwd(), prefix=".redteam-"):
            pass
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        return Finding(
            "note", "writing", f"not possible here: {why}", "give run an --out elsewhere"
        )
    return Finding("ok", "writing", "possible here")
