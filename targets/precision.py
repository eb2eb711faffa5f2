"""Passes of an attack in bfloat16, with a way to look at an image in full precision.

Gradients and rankings need fewer digits than answers do. `ReducedView` runs the passes an attack
takes under `torch.autocast`; what a target *answers* stays in its own precision. The loops judge
the image they return once more without it (`exactly`), so that a loss that was only rounding is
seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor

from targets.base import CALLS, ImageView
from targets.views import View

FULL: Final = "float32"
REDUCED: Final = "bfloat16"
_OWN: Final = frozenset(
    {
        *("ask", "option_scores", "continuation"),
        *("token_mask_to_pixels", "tower_depth", "option_passes"),
    }
)
"""Calls that answer as the target does, or run no model: always in the target's own precision."""

# A loop holds an objective, not the view that its calls end in, which other views may be around.
# What is set lasts as long as one attack, or one look, and is seen in its own thread only.
_reduced: ContextVar[bool] = ContextVar("reduced", default=False)


class ReducedView(View):
    """A view whose calls run under autocast to bfloat16 while an attack works on it.

    It grants what the view inside grants. Values come out as float32, whatever made them. Outside
    of `attacking`, and inside `exactly`, its calls are those of the view inside.

    Args:
        view: the target's, a defence in it or not.
        device: where its model runs.
    """

    precision = REDUCED

    def __init__(self, view: ImageView, device: torch.device) -> None:
        calls = {
            name: call if name in _OWN else _under(call, device.type)
            for name in CALLS
            if (call := getattr(view, name, None)) is not None
        }
        super().__init__(view.knowledge, calls)
        for name in ("passes_in", "pipeline", "random"):
            if hasattr(view, name):
                self.__dict__[name] = getattr(view, name)


def _under(call: Callable[..., Any], device: str) -> Callable[..., Any]:
    def reduced(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of any call
        if not _reduced.get():
            return call(*args, **kwargs)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = call(*args, **kwargs)
        return _as_float(found)

    return reduced


def _as_float(found: Any) -> Any:  # noqa: ANN401 - whatever a call gives
    """The same with bfloat16 as float32, live."""
    if isinstance(found, Tensor):
        return found.float() if found.dtype == torch.bfloat16 else found
    if isinstance(found, tuple):
        return tuple(map(_as_float, found))
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        names = [one.name for one in dataclasses.fields(found)]
        return type(found)(**{name: _as_float(getattr(found, name)) for name in names})
    return found


def is_reduced() -> bool:
    """Whether passes made now, through a `ReducedView`, are in bfloat16."""
    return _reduced.get()


@contextmanager
def attacking(view: object) -> Iterator[None]:
    """While an attack works on a view: reduced, if the view is a `ReducedView`."""
    token = _reduced.set(getattr(view, "precision", FULL) != FULL)
    try:
        yield
    finally:
        _reduced.reset(token)


@contextmanager
def exactly() -> Iterator[None]:
    """Passes in the target's own precision, whatever the view."""
    token = _reduced.set(False)
    try:
        yield
    finally:
        _reduced.reset(token)


def obstacle(weights: Iterable[Tensor], device: torch.device) -> str | None:
    """Why passes cannot be reduced and judged in full precision; None if they can.

    Args:
        weights: of the model.
        device: where it runs.
    """
    others = {str(one.dtype).removeprefix("torch.") for one in weights} - {FULL}
    if others:
        return (
            f"the target has {', '.join(sorted(others))} weights, so there is no full precision to "
            "judge its images in; load it with dtype float32, or leave attack_precision out"
        )
    if not torch.amp.is_autocast_available(device.type):
        return f"{device.type} has no autocast to bfloat16; allowed: cpu, cuda"
    return None
