"""Hashes of what stands between a picture and an answer, to tell whether two sides used the same.

The `repr` of a compressor or a defence is its provenance, so a hash of these says what was used.
The attack's side and the deployment's side each hash the objects in their own hands; a defence
that is attacked in another form than it is deployed in then shows (rule 2 of docs/defenses.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from defenses.base import Defense
from defenses.selection import Protected
from targets.compression.base import Compressor


def fingerprint(method: object) -> str:
    """12 hex digits of a method with its options."""
    return _digest([repr(method)])


def pipeline(compressor: Compressor | None, parts: Iterable[object]) -> str:
    """12 hex digits of a pipeline.

    Args:
        compressor: as it is without a defence; None if it is not part of the pipeline.
        parts: the acts of the defence in it, in any order: where each acts is fixed by its kind.
    """
    return _digest([repr(compressor), *sorted(map(repr, parts))])


def deployed(compressor: Compressor, parts: Iterable[object] = ()) -> str:
    """`pipeline` of a compressor that selection defences may have been put into.

    Args:
        compressor: as it answers, with the defences of the selection in it.
        parts: the other acts of the defence.
    """
    inside: list[Defense] = []
    while isinstance(compressor, Protected):
        inside.append(compressor.defense)
        compressor = compressor.base
    return pipeline(compressor, [*inside, *parts])


def _digest(words: list[str]) -> str:
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=6).hexdigest()
