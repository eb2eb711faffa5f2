"""Where the time of a run went: `redteam run --profile`.

Clocks stand around what a run is made of and are there only while a profile is active. Time is
exclusive: what a clock inside another one takes is not counted to the outer one, so the phases and
the rest add up to the wall time. On a GPU every clock waits for the device, which makes a profiled
run a little slower than a plain one.

With several workers each has clocks of its own and sends them home with every unit; the phases are
then shares of worker time, and what the driver did meanwhile stands apart.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

VISION, PREFILL, DECODE = "vision tower", "LLM prefill", "LLM decode"
SELECTION, BACKWARD, ATTACK = "token selection", "attack backward", "attack, other"
MODEL_OTHER, IO, LOAD, REPORT = "model, other", "images and ledger", "loading", "report"
HARNESS: Final = "harness"
"""What no clock stands around."""
OF_MODEL: Final = (VISION, PREFILL, DECODE, SELECTION, BACKWARD, ATTACK, MODEL_OTHER)
"""Phases that anybody who runs the same attacks and answers has to pay for."""
WAITING: Final = "waiting"
"""Of a worker: it has no unit, or one that came to nothing. Of the driver: for workers."""
ASIDE: Final = (LOAD, REPORT)
"""Phases before and after the units; not part of the overhead."""
_PLACES: Final = (
    ("attacks.base:Attack.__call__", ATTACK),
    ("torch.autograd:grad", BACKWARD),
    ("torch:Tensor.backward", BACKWARD),
    ("targets.compression.ranker:Ranker.before_text", SELECTION),
    ("targets.compression.ranker:Ranker.at_layer", SELECTION),
    ("targets.compression.ranker:Ranker.watched", SELECTION),
    ("targets.compression.ranker:Ranker.choose", SELECTION),
    ("targets.lvlm:LVLM.answer", MODEL_OTHER),
    ("redteam.engines.parcel:Parcel.save_png", IO),
    ("reports.store:RunStore.save_png", IO),
    ("reports.store:RunStore.read_png", IO),
    ("reports.store:RunStore.append", IO),
    ("redteam.engines.local:encode_png", IO),
    ("redteam.engines.local:decode_png", IO),
)


@dataclass(frozen=True, slots=True)
class Clocks:
    """What a worker sends home: seconds and calls by phase, since it last did."""

    seconds: Mapping[str, float]
    calls: Mapping[str, int]


class Crew:
    """The clocks of several workers, put together.

    Args:
        count: of workers, at least 1.
        device: they work on.
    """

    def __init__(self, count: int, device: str) -> None:
        self._count, self._device = count, device
        self._wall = 0.0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._calls: Counter[str] = Counter()

    @contextmanager
    def shift(self) -> Iterator[None]:
        """The time in which there are units for workers."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._wall += time.perf_counter() - started

    def add(self, clocks: Clocks) -> None:
        """Count what a worker sent."""
        for name, seconds in clocks.seconds.items():
            self._seconds[name] += seconds
        self._calls.update(clocks.calls)

    def as_json(self) -> dict[str, Any]:
        """Phases as shares of worker time: that of the shift, once for each worker."""
        whole = self._count * self._wall
        waiting = max(0.0, whole - sum(self._seconds.values()))
        return {
            "device": self._device,
            "workers": self._count,
            "worker_seconds": round(whole, 3),
            **_shares({**self._seconds, WAITING: waiting}, self._calls, whole),
        }


class Profile:
    """Adds up exclusive wall time by phase.

    Use it as a context manager around a run; without that it costs nothing and knows nothing.

    Attributes:
        seconds: by phase.
        calls: by phase.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._open: list[tuple[str, float]] = []  # phase, seconds of clocks inside it so far
        self._undo: list[Callable[[], None]] = []
        self._started = self._wall = 0.0
        self._device: torch.device | None = None
        self._crew: Crew | None = None

    def __enter__(self) -> Profile:
        for place, phase in _PLACES:
            self._wrap(place, phase)
        self._watch_models()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._wall += self._now() - self._started
        for undo in reversed(self._undo):
            undo()
        self._undo = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is inside to a phase."""
        started = self._enter(name)
        try:
            yield
        finally:
            self._leave(name, started)

    def take(self) -> Clocks:
        """What was added since this was last called; the clocks start anew."""
        found = Clocks(dict(self.seconds), dict(self.calls))
        self.seconds.clear()
        self.calls.clear()
        return found

    def crew(self, count: int, device: str) -> Crew:
        """The run is carried out by workers: their clocks are its phases from now on."""
        self._crew = Crew(count, device)
        return self._crew

    def as_json(self) -> dict[str, Any]:
        """Seconds, calls and shares by phase, and the overhead; see docs/cli.md."""
        wall = self._wall
        if self._undo:  # still running
            wall += self._now() - self._started
        rest = max(0.0, wall - sum(self.seconds.values()))
        own = _shares({**self.seconds, HARNESS: rest}, self.calls, wall)
        head = {"wall_seconds": round(wall, 3)}
        if self._crew is not None:
            return {**head, **self._crew.as_json(), "driver": own["phases"]}
        return {**head, "device": "cpu" if self._device is None else str(self._device), **own}

    def _now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _enter(self, name: str) -> float:
        started = self._now()
        self._open.append((name, 0.0))
        return started

    def _leave(self, name: str, started: float) -> None:
        # A hook that never ran (a forward pass that was cut short) must not shift the others.
        while self._open:
            top, inside = self._open.pop()
            if top == name:
                break
        else:
            return
        whole = self._now() - started
        self.seconds[name] += whole - inside
        self.calls[name] += 1
        if self._open:
            outer, before = self._open[-1]
            self._open[-1] = (outer, before + whole)

    def _wrap(self, place: str, phase: str) -> None:
        """Put a clock around a function, until the profile ends."""
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, attribute = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of any function
            started = self._enter(phase)
            try:
                return original(*args, **kwargs)
            finally:
                self._leave(phase, started)

        setattr(owner, attribute, timed)
        self._undo.append(lambda: setattr(owner, attribute, original))

    def _watch_models(self) -> None:
        """Put clocks into every model that is loaded from now on."""
        from targets.passes import Passes

        original = Passes.__init__

        @functools.wraps(original)
        def watched(passes: Passes, family: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            original(passes, family, *args, **kwargs)
            self._device = family.device
            self._hook(family.tower, lambda given: VISION)
            self._hook(family.text, _text_phase)

        setattr(Passes, "__init__", watched)  # noqa: B010 - a type checker forbids the assignment
        self._undo.append(lambda: setattr(Passes, "__init__", original))

    def _hook(self, module: Any, phase_of: Callable[[dict[str, Any]], str]) -> None:  # noqa: ANN401
        begun: list[tuple[str, float]] = []

        def before(module: object, args: object, kwargs: dict[str, Any]) -> None:
            del module, args
            name = phase_of(kwargs)
            begun.append((name, self._enter(name)))

        def after(module: object, args: object, output: object) -> None:
            del module, args, output
            if begun:
                self._leave(*begun.pop())

        handles = [
            module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            module.register_forward_hook(after, always_call=True),
        ]
        self._undo += [handle.remove for handle in handles]


def _text_phase(given: dict[str, Any]) -> str:
    """Whether a pass of the language model reads a prompt or says one token."""
    for name in ("inputs_embeds", "input_ids"):
        if given.get(name) is not None:
            return DECODE if given[name].shape[1] == 1 else PREFILL
    return PREFILL


def _shares(phases: Mapping[str, float], calls: Mapping[str, int], whole: float) -> dict[str, Any]:
    """Phases, longest first, as parts of a time, and the share of it that is overhead."""
    units = whole - sum(phases.get(name, 0.0) for name in ASIDE)
    model = sum(phases.get(name, 0.0) for name in OF_MODEL)
    return {
        "phases": {
            name: {
                "seconds": round(seconds, 3),
                "calls": calls.get(name, 0),
                "share": round(seconds / whole, 4) if whole else 0.0,
            }
            for name, seconds in sorted(phases.items(), key=lambda one: -one[1])
        },
        "overhead": round(1 - model / units, 4) if units > 0 else None,
    }
