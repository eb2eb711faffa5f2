"""A vision tower runs once for several answers about the same pictures.

    with remembering([model.family]):
        model.answer(images, questions)
        model.answer(images, questions, compressor=FastV())   # the tower does not run again

What is remembered is found again by its inputs, value by value, so nothing can be mistaken for
anything else; a compressor that works inside the tower, and whoever asks for gradients, always gets
a run of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from targets.compression.guards import changes_tower
from targets.families.base import Family
from targets.families.vision import open_taps

MOST_BYTES: Final = 1 << 29
"""Of encoded pictures that one model may hold at a time; what is larger runs again."""
_ENCODE: Final = "get_image_features"
"""Where transformers encodes pictures, in `generate` as in ``forward``."""


@contextmanager
def remembering(families: Iterable[Family], most_bytes: int = MOST_BYTES) -> Iterator[None]:
    """Encode the same pictures once, within the ``with`` block and without gradients.

    Args:
        families: adapters of the models, each once.
        most_bytes: held for each model, ≥ 0; the oldest goes first.
    """
    with ExitStack() as stack:
        for family in families:
            stack.enter_context(_Memory(family, most_bytes))
        yield


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """One run of the tower.

    Attributes:
        what: which call it was.
        given: its arguments.
        output: what the model gets.
        seen: what taps would have captured, by layer and name; {} if the run ended early.
        size: bytes.
    """

    what: str
    given: Mapping[str, Any]
    output: Any
    seen: Mapping[tuple[int, str], Tensor]
    size: int


class _Memory:
    """What one model has encoded, while the block lasts."""

    def __init__(self, family: Family, most_bytes: int) -> None:
        self._family, self._most = family, most_bytes
        self._entries: list[_Entry] = []
        self._layers: set[int] = set()  # of the tower, that somebody has listened to
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> _Memory:
        self._stand_before(self._family.core, _ENCODE)
        self._stand_before(self._family, "encoded")
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, before in reversed(self._before):
            if before is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before
        self._before, self._entries = [], []

    def _stand_before(self, owner: Any, name: str) -> None:  # noqa: ANN401 - module or adapter
        """Answer a method's calls on this one instance."""
        original: Callable[..., Any] = getattr(owner, name)
        signature = inspect.signature(original)
        self._before.append((owner, name, owner.__dict__.get(name)))

        @functools.wraps(original)  # `generate` looks at the signature
        def encode(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            bound = dict(signature.bind(*args, **kwargs).arguments)
            given = bound.get("inputs", bound)  # an adapter takes a mapping, a model its items
            return self._encode(name, given, lambda: original(*args, **kwargs))

        owner.__dict__[name] = encode

    def _encode(self, what: str, given: Mapping[str, Any], run: Callable[[], Any]) -> Any:  # noqa: ANN401
        if torch.is_grad_enabled() or changes_tower(self._family.model):
            return run()
        taps = open_taps(self._family.tower)
        for tap in taps:
            self._layers |= tap.numbers
        for entry in self._entries:
            if entry.what == what and _same(entry.given, given):
                if all(tap.covered(entry.seen) for tap in taps):
                    for tap in taps:
                        tap.recall(entry.seen)
                    return entry.output
                self._entries.remove(entry)  # it lacks a layer; the new run will have it
                break
        return self._run(what, given, run)

    def _run(self, what: str, given: Mapping[str, Any], run: Callable[[], Any]) -> Any:  # noqa: ANN401
        seen: Mapping[tuple[int, str], Tensor] = {}
        if self._layers:
            with self._family.tap(sorted(self._layers)) as recorder:
                output = run()
            seen = recorder.seen
        else:
            output = run()
        self._family.note(output, given)
        size = _bytes([list(given.values()), output, list(seen.values())])
        if size <= self._most:
            self._entries.append(_Entry(what, given, output, seen, size))
            while sum(one.size for one in self._entries) > self._most:
                self._entries.pop(0)
        return output


def _same(one: Any, two: Any) -> bool:  # noqa: ANN401 - arguments of any kind
    """Whether arguments are equal, tensors value by value."""
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        alike = isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape == two.shape
        return alike and (one.dtype, one.device) == (two.dtype, two.device) and one.equal(two)
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(one == two)


def _bytes(value: Any) -> int:  # noqa: ANN401 - of transformers
    """Bytes of all tensors in it."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
