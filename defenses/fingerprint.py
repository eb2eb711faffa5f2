"""Hashes of what stands between a picture and an answer, to tell whether two sides used the same.

The `repr` of a compressor or a defence is its provenance, so a hash of these says what was used.
The attack's side and the deployment's side each hash the objects in their own hands; a defence
that is attacked in another form than it is deployed in then shows (rule 2 of docs/defenses.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

from defenses.guard import Guard
from defenses.selection import Protected, SelectionDefense
from targets.compression.base import Compressor


def fingerprint(method: object) -> str:
    """12 hex digits of a method with its options."""
    return _digest([repr(method)])


def pipeline(compressor: Compressor | None, guard: Guard) -> str:
    """12 hex digits of a compressor, the parts of a defence, and the decoder.

    A detector counts as if it watched every request, which is what an attack reckons with.

    Args:
        compressor: as it is without a defence; None if it is not part of the pipeline.
        guard: the parts as they are used.
    """
    parts = (guard.encoder, guard.inputs, guard.selections, guard.decoding, guard.fallback)
    watched = [] if guard.detector is None else [repr(guard.detector.watchful)]
    return _digest([repr(compressor), *map(repr, parts), *watched])


def deployed(compressor: Compressor, guard: Guard) -> str:
    """`pipeline` of a compressor that selection defences have been put into.

    Args:
        compressor: as it answers.
        guard: the other parts; its own selections count for nothing, those in the compressor do.
    """
    inside: list[SelectionDefense] = []
    while isinstance(compressor, Protected):
        inside.append(compressor.defense)
        compressor = compressor.base
    return pipeline(compressor, replace(guard, selections=tuple(reversed(inside))))


def _digest(words: Sequence[str]) -> str:
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=6).hexdigest()
