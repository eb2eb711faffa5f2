"""``redteam doctor scenarios/x.yaml``: what a scenario still lacks, before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from redteam.capabilities import mismatches
from redteam.doctor import Finding
from redteam.errors import RedteamError
from redteam.scenario import Method, Scenario

_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_PROCESSOR: Final = ("processor_config.json", "preprocessor_config.json")
_GIB: Final = 1 << 30


def examine_scenario(scenario: Scenario) -> list[Finding]:
    """Everything a scenario needs and whether it is here; downloads and loads nothing."""
    found = [Finding("ok", "scenario", f"{scenario.name} is valid (hash {scenario.hash})")]
    found += [
        Finding("broken", one.key or "scenario", one.message, one.hint or one.allowed)
        for one in mismatches(scenario)
    ]
    found.append(_device(scenario))
    for target in scenario.targets:
        found += list(_target(target))
    found += list(_dataset(scenario.dataset))
    if scenario.calibration is not None:
        found += list(_dataset(scenario.calibration))
    return found


def _device(scenario: Scenario) -> Finding:
    from targets.errors import TargetError
    from targets.loading import resolve_device

    try:
        place = resolve_device(scenario.engine.device)
    except TargetError as error:
        return Finding("broken", "engine.device", str(error), "use --device auto")
    if place.type != "cuda":
        return Finding("ok", "engine.device", f"{scenario.engine.device} is {place}")
    import torch

    free, total = torch.cuda.mem_get_info(place)
    name = torch.cuda.get_device_name(place)
    detail = f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    return Finding("ok", "engine.device", detail)


def _target(target: Method) -> Iterator[Finding]:
    what = f"target {target.label}"
    if target.type == "scenes":
        yield Finding("ok", what, "shipped with redteam")
        return
    if "model" not in target.options:
        yield Finding("note", what, f"type {target.type}: nothing is known about what it needs")
        return
    source = str(target.options["model"])
    folder = target.folder / Path(source).expanduser()
    if folder.is_dir():
        yield from _folder(what, folder, target)
    else:
        yield from _hub(what, source, target)


def _folder(what: str, folder: Path, target: Method) -> Iterator[Finding]:
    from targets.errors import TargetError
    from targets.loading import check_folder

    try:
        check_folder(folder)
    except TargetError as error:
        yield Finding("broken", what, str(error), "save the model with save_pretrained")
        return
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not any((folder / name).is_file() for name in _PROCESSOR):
        yield Finding(
            "broken",
            what,
            "there is no processor_config.json or preprocessor_config.json",
            "save the processor into the same folder with save_pretrained",
        )
    yield _family(what, folder / "config.json")
    yield Finding("ok", what, f"local folder, {weights / _GIB:.2f} GiB of weights")
    yield from _room(what, weights, target)


def _hub(what: str, source: str, target: Method) -> Iterator[Finding]:
    from huggingface_hub import try_to_load_from_cache

    revision = target.options.get("revision")
    if revision is None:
        yield Finding(
            "note",
            what,
            f"{source} has no revision, so another day may bring other weights",
            "pin a commit: revision: <40 hex digits>",
        )
    held = try_to_load_from_cache(source, "config.json", revision=revision)
    if not isinstance(held, str):
        yield Finding(
            "note",
            what,
            f"{source} is not in the local cache and would be downloaded",
            f"fetch it first: hf download {source}"
            + (f" --revision {revision}" if revision else ""),
        )
        return
    yield _family(what, Path(held))
    files = list(Path(held).parent.glob("*.safetensors"))
    if not files:
        yield Finding(
            "note", what, "its weights are not in the local cache", f"hf download {source}"
        )
        return
    weights = sum(path.stat().st_size for path in files)
    yield Finding("ok", what, f"in the local cache, {weights / _GIB:.2f} GiB of weights")
    yield from _room(what, weights, target)


def _family(what: str, config: Path) -> Finding:
    from targets.families import SUPPORTED

    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        return Finding("broken", what, f"config.json cannot be read: {error}", "save it again")
    if kind in SUPPORTED:
        return Finding("ok", what, f"family {kind}")
    return Finding(
        "broken",
        what,
        f"models of type {kind!r} are not supported; supported: {', '.join(sorted(SUPPORTED))}",
        "docs/add-a-family.md shows how to add one",
    )


def _room(what: str, weights: int, target: Method) -> Iterator[Finding]:
    """Whether the weights fit, as far as can be told."""
    import torch

    from redteam.batching import free_memory

    if not torch.cuda.is_available():
        memory = free_memory(torch.device("cpu"))
        if weights > memory:
            yield Finding(
                "broken",
                what,
                f"{weights / _GIB:.1f} GiB of weights, {memory / _GIB:.1f} GiB of memory",
                "use a machine with more memory, or a GPU",
            )
        return
    free = sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    if weights > free:
        yield Finding(
            "broken",
            what,
            f"{weights / _GIB:.1f} GiB of weights, {free / _GIB:.1f} GiB free on all GPUs",
            f"free some, or load it in half precision (dtype is {target.options.get('dtype')})",
        )


def _dataset(dataset: Method) -> Iterator[Finding]:
    what = f"{dataset.key or 'dataset'} {dataset.type}"
    options: Mapping[str, Any] = dataset.options
    tables = dataset.type == "parquet" or "repo" in options
    if tables and importlib.util.find_spec("pyarrow") is None:
        yield Finding("broken", what, "pyarrow is not installed", "pip install 'redteam[data]'")
        return
    if options.get("repo") and options.get("path") is None:
        yield from _published(what, options)
        return
    try:
        samples = dataset.create().open()
    except RedteamError as error:
        yield Finding("broken", what, str(error))
        return
    if len(samples):
        yield Finding("ok", what, f"{len(samples)} samples")
    else:
        yield Finding("broken", what, "it holds no sample", "give another file or filter")
    free = shutil.disk_usage(Path.cwd()).free
    if free < _GIB:
        yield Finding("note", "disk", f"{free / _GIB:.2f} GiB free here", "free some space")


def _published(what: str, options: Mapping[str, Any]) -> Iterator[Finding]:
    if importlib.util.find_spec("datasets") is None:
        yield Finding("broken", what, "datasets is not installed", "pip install 'redteam[data]'")
        return
    where = f"{options['repo']} on the hub"
    if options.get("revision") is None:
        yield Finding(
            "note", what, f"{where} has no revision", "pin a commit, so that results last"
        )
    yield Finding(
        "note",
        what,
        f"{where} is read through the cache of `datasets`, and downloaded if it is not there",
        "give path: <folder> to use a local copy",
    )
