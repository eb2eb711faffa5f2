"""Apply a data set's filter: ask a target about clean and black images before anything is attacked.

What is left out is written to the manifest with its reason, and counted in the summary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from redteam.datasets.base import Samples
from redteam.datasets.filters import Filter, why_left_out
from redteam.evaluation import Asker, Reply, Shot, good
from redteam.scenario import Method

UNDEFENDED = Method("defenses", "none", "none", {})


def screen(asker: Asker, samples: Samples, rule: Filter, block: int) -> dict[str, str]:
    """Why the filter leaves samples out, by id.

    A sample that cannot be read or answered is kept: the run records it as an error, which is not
    the same as a sample that does not qualify.

    Args:
        asker: of the target, at full tokens and without a defence.
        samples: what to ask about.
        rule: the filter.
        block: samples to hold in memory at a time, ≥ 1.
    """
    found: dict[str, str] = {}
    for start in range(0, len(samples), block):
        shots = {}
        for index in range(start, min(start + block, len(samples))):
            try:
                sample = samples[index]
            except Exception:  # noqa: S112 - the run reads it again, and records why it cannot
                continue
            shots[index] = Shot(sample, sample.image, "")
        found |= _screened(asker, shots, rule)
    return found


def _screened(asker: Asker, shots: Mapping[int, Shot], rule: Filter) -> dict[str, str]:
    clean = good(asker.ask(shots, None, UNDEFENDED, "filter, clean image"))
    black: dict[int, Reply] = {}
    if rule == "sighted":
        dark = {
            index: replace(shots[index], pixels=np.zeros_like(shots[index].pixels))
            for index, reply in clean.items()
            if reply.answer.correct
        }
        black = good(asker.ask(dark, None, UNDEFENDED, "filter, black image"))
    found = {}
    for index, reply in clean.items():
        right = reply.answer.correct
        if right and rule == "sighted" and index not in black:
            continue  # no answer is an error, and the run will say so
        dark_right = black[index].answer.correct if index in black else None
        why = why_left_out(rule, right, dark_right)
        if why:
            found[shots[index].sample.id] = why
    return found


def filter_of(dataset: Method) -> Filter | None:
    """The filter that a scenario's data set asks for."""
    rule = dataset.options.get("filter")
    return next((known for known in get_args(Filter) if known == rule), None)


def described(rule: Filter, asked: int, left_out: Mapping[str, str]) -> dict[str, Any]:
    """What the manifest keeps of a filter: how many were asked, and who is missing why."""
    reasons: dict[str, list[str]] = {}
    for name, why in left_out.items():
        reasons.setdefault(why, []).append(name)
    return {
        "rule": rule,
        "asked": asked,
        "kept": asked - len(left_out),
        "left_out": dict(sorted(reasons.items())),
    }


def recorded(provenance: Mapping[str, Any]) -> set[str]:
    """Ids that an earlier start of the run left out, from its manifest."""
    left_out = provenance.get("filter", {}).get("left_out", {})
    return {name for names in left_out.values() for name in names}
