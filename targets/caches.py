"""The key-value cache by its two names: ``past_key_values``; ``cache`` from transformers 5.24.

Newer releases still take the old name from callers, but pass the new one on to the modules
inside, where the hooks of a session read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache as once
from typing import Any

_OLD, _NEW = "past_key_values", "cache"


@once
def cache_name() -> str:
    """What the installed transformers calls the cache in calls and in outputs."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return _NEW if _NEW in BaseModelOutputWithPast.__dataclass_fields__ else _OLD


def cache_of(kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a Cache of transformers or None
    """The cache among a module's keyword arguments, whichever name it was given under, or None."""
    found = kwargs.get(_NEW)
    return kwargs.get(_OLD) if found is None else found
