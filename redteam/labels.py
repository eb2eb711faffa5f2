"""Short, readable, unique names for the methods of a scenario: ``fastv K=2 25%``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final

from redteam.findings import Findings
from redteam.validation import Raw

UNVERIFIED: Final = "unverified"
"""Part of the label of a defence that no attack of the scenario adapts to."""
ADAPTIVE: Final = "adaptive"
"""Part of the label of an attack that adapts to defences."""


def assign_labels(methods: Sequence[Raw], findings: Findings) -> list[str]:
    """A label for each method of one kind, in order.

    A name the user gave is taken as it is. Otherwise the type, with what compressors are known by
    (layer and budget); methods that would share a label add the options in which they differ.
    """
    labels = [method.name or _own(method) for method in methods]
    for label in set(labels):
        group = [i for i, other in enumerate(labels) if other == label and not methods[i].name]
        if len(group) > 1:
            for index, extra in zip(group, _differences([methods[i] for i in group]), strict=True):
                labels[index] = f"{label} {extra}".strip()
    for index, label in enumerate(labels):
        if label in labels[:index]:
            first = methods[labels.index(label)].location
            named = methods[index].name != ""
            findings.add(
                (*methods[index].location, "name") if named else methods[index].location,
                f"{'the name' if named else 'the label'} {label!r} is taken by entry {first[-1]}",
                hint="give another name" if named else "remove one, or give it a name",
            )
    return labels


def without_mark(label: str) -> str:
    """The label of a defence that an attack of the scenario adapts to."""
    return label.replace(f" ({UNVERIFIED})", "")


def _own(method: Raw) -> str:
    label = short(method.kind, method.type, method.options)
    return f"{label} {ADAPTIVE}" if method.adaptive else label


def short(kind: str, name: str, options: Mapping[str, Any]) -> str:
    """What a method is called without a name of its own."""
    if kind == "targets":
        if "checkpoint" in options:
            return str(options["checkpoint"])
        model = str(options.get("model", ""))
        return PurePath(model).name[:48] or name
    if "stack" in options:
        names = " + ".join(str(member["type"]) for member in options["stack"])
        return f"{names} ({UNVERIFIED})"
    if kind == "defenses" and name != "none":
        return f"{name} ({UNVERIFIED})"
    if kind != "compressors":
        return name
    if "stages" in options:
        return " + ".join(_compressor(stage["type"], stage) for stage in options["stages"])
    return _compressor(name, options)


def _compressor(name: str, options: Mapping[str, Any]) -> str:
    parts = [name]
    if options.get("layer") is not None:
        parts.append(f"K={options['layer']}")
    if options.get("retention") is not None:
        parts.append(f"{100 * options['retention']:.4g}%")
    if options.get("keep_tokens") is not None:
        parts.append(f"{options['keep_tokens']} tokens")
    return " ".join(parts)


def _differences(methods: Sequence[Raw]) -> list[str]:
    """What tells methods of one type apart, in the order of their options."""
    keys = [
        key
        for key in methods[0].options
        if any(method.options[key] != methods[0].options[key] for method in methods)
    ]
    found = [" ".join(_option(key, method.options) for key in keys) for method in methods]
    if any(_beside(method) != _beside(methods[0]) for method in methods) and not keys:
        return [f"({index + 1})" for index in range(len(methods))]
    return found


def _beside(method: Raw) -> tuple[object, ...]:
    """What tells methods apart beside their options."""
    return method.epsilons, method.draws


def _option(key: str, options: Mapping[str, Any]) -> str:
    value = options[key]
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return key if value else f"no {key}"
    if isinstance(value, float):
        return f"{key}={value:.4g}"
    return f"{key}={'auto' if value is None else value}"
