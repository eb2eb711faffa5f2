"""One forward pass of several that decode side by side, with its own cache and session.

Only one session can be open in a model, so a branch opens its session for each of its forwards and
closes it again; what the session knows of the prompt stays with it in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from targets.compression.layout import find_slots, last_position
from targets.compression.session import CompressionSession
from targets.decoding.attention import Attending, AttentionRule, Columns
from targets.errors import TargetError
from targets.families.base import Family
from targets.prompts import Dialogue, Prompt


@dataclass(frozen=True, slots=True)
class Reading:
    """What a forward shows of R answer positions.

    Attributes:
        hidden: ``[B, R, D]`` last hidden states.
        depths: hidden states of the depths asked for, ``[B, R, D]`` each.
    """

    hidden: Tensor
    depths: dict[int, Tensor]


@dataclass(slots=True)
class Branch:
    """A prompt being continued.

    Attributes:
        family: the model's adapter.
        prompt: with or without answers behind (`targets.prompts.Dialogue`).
        inputs: of the images; None for a prompt without image tokens.
        session: the compressor's, or None.
        rule: a change to attention, or None.
        depths: depths to look at.
        entry: whether to remember what entered the language model.
        entered: ``[B, n, D]``, that.
        visual: bool ``[B, n]``, visual tokens among it.
    """

    family: Family
    prompt: Prompt
    inputs: dict[str, Tensor] | None
    session: CompressionSession | None
    rule: AttentionRule | None
    depths: Sequence[int] = ()
    entry: bool = False
    entered: Tensor | None = None
    visual: Tensor | None = None
    _mask: Tensor = field(init=False)
    _last: Tensor = field(init=False)
    _columns: Columns | None = None
    _cache: Any = None
    _state: object = None
    _positions: Tensor | None = None
    _attending: Attending | None = None
    _seen: dict[int, Tensor] = field(default_factory=dict)
    _entry: Tensor | None = None

    def __post_init__(self) -> None:
        """Begin in front of the prompt."""
        self._mask = self.prompt.mask
        if self.rule is not None:
            self._attending = Attending(self.family, self.rule, self._look)

    def start(self) -> Reading:
        """Prefill; what is said of the first answer token."""
        from targets.decoding.cache import growing

        self._cache = growing(self.family.model.config)
        found = self._read(lambda: self._run(self._cache, 0), 1, 0)
        self._state = self.family.prompt_state()
        length = self._mask.shape[1]
        positions = self._positions
        if positions is None:
            positions = torch.arange(length, device=self._mask.device)[None]
        positions = positions.expand(*positions.shape[:-2], *self._mask.shape)
        self._last = last_position(positions, self._mask.bool())
        return found

    def step(self, tokens: Tensor) -> Reading:
        """One more token of each row ``[B]``; what is said of the next."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._last = self._last + 1
        self.family.resume(self._state)
        positions = self._last[:, None]
        generated = self._mask.shape[1] - self.prompt.ids.shape[1]

        def run() -> Tensor:
            return self.family.step(tokens[:, None], self._mask, positions, self._cache)

        return self._read(run, 1, generated)

    def forced(self) -> Reading:
        """What is said of every token of a `Dialogue`'s answers, in the graph."""
        if not isinstance(self.prompt, Dialogue):
            raise TargetError("only a dialogue has answers that could be scored")
        rows = self.prompt.targets.shape[1]
        return self._read(lambda: self._run(None, rows - 1), rows, rows - 1)

    def select(self, rows: Tensor) -> None:
        """Go on with some rows, long ``[n]``; they may be repeated."""
        self._cache.batch_select_indices(rows)
        self._mask, self._last = self._mask[rows], self._last[rows]
        if self.session is not None:
            self.session.select(rows)
        if self._attending is not None:
            self._attending.select(rows)
        if self.entered is not None and self.visual is not None:
            self.entered, self.visual = self.entered[rows], self.visual[rows]

    def mark(self) -> Callable[[], None]:
        """Remember where all rows stand; what it returns goes back there, as often as called.

        Nothing is copied here: the next token said makes new tensors of keys and values.
        """
        from targets.decoding.cache import apart

        backs: list[Callable[[], None]] = []
        if self.session is not None:
            backs.append(self.session.mark())
        if self._attending is not None:
            backs.append(self._attending.mark())
        cache, mask, last = apart(self._cache), self._mask, self._last
        entered, visual = self.entered, self.visual

        def back() -> None:
            self._cache, self._mask, self._last = apart(cache), mask, last
            self.entered, self.visual = entered, visual
            for one in backs:
                one()

        return back

    def exchange(self, rows: Tensor) -> None:
        """Reorder rows, long ``[B]``, each to the place of one of its own sample.

        These differ in what was generated only, so that all that is known of the prompt stays.
        """
        from targets.decoding.cache import exchange

        exchange(self._cache, rows)
        if self.rule is not None:
            self.rule.select(rows)

    def _run(self, cache: Any, answers: int) -> Tensor:  # noqa: ANN401 - of transformers
        prompt, family = self.prompt, self.family
        if self.inputs is None:
            # Models that count positions from the grids of images have none to count from here.
            given = Family.positions(family, prompt.mask) | family.positions(prompt.mask)
            with _positions_given(family, given):
                return family.run(prompt.ids, prompt.mask, None, {}, answers, cache)
        encoded = family.encoded(self.inputs)
        return family.run(prompt.ids, prompt.mask, encoded, self.inputs, answers, cache)

    def _read(self, run: Callable[[], Tensor], rows: int, generated: int) -> Reading:
        """Run inside session, rule and taps; the last `rows` columns of what came."""
        prefill = generated == 0 or rows > 1
        if self._attending is not None:
            self._attending.rows, self._attending.generated = rows, generated
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._tapped(rows, entry=prefill and self.entry))
            if self.session is not None:
                stack.enter_context(self.session)
            if self._attending is not None:
                stack.enter_context(self._attending)
            hidden = run()
            if prefill and self.entry:
                self.entered, self.visual = self._entry, self._look(0).visual
        depths, self._seen, self._entry = self._seen, {}, None
        return Reading(hidden[:, hidden.shape[1] - rows :], depths)

    @contextlib.contextmanager
    def _tapped(self, rows: int, *, entry: bool) -> Iterator[None]:
        """Hooks that note position ids, and hidden states at the last `rows` columns."""
        family, handles = self.family, []

        def positions(module: object, args: object, kwargs: dict[str, Any]) -> None:
            del module, args
            self._positions = kwargs.get("position_ids")

        def enters(module: object, args: tuple[Any, ...], kwargs: object, output: object) -> None:
            del module, kwargs, output
            self._seen[0] = args[0][:, args[0].shape[1] - rows :]
            self._entry = args[0] if entry else None

        def leaves(depth: int) -> Callable[..., None]:
            def hook(module: object, args: object, output: Any) -> None:  # noqa: ANN401
                del module, args
                states: Tensor = output[0] if isinstance(output, tuple) else output
                self._seen[depth] = states[:, states.shape[1] - rows :]

            return hook

        # In front of a session's hooks, which may change the positions.
        handles.append(family.text.register_forward_pre_hook(positions, with_kwargs=True))
        if entry or 0 in self.depths:
            handles.append(family.layers[0].register_forward_hook(enters, with_kwargs=True))
        for depth in self.depths:
            if depth:
                handles.append(family.layers[depth - 1].register_forward_hook(leaves(depth)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, layer: int) -> Columns:
        """What the columns of a layer are, at prefill."""
        if self.session is not None:
            session = self.session
            return Columns(*session.columns(layer), session.restored(layer), session.settled)
        if self._columns is None:
            live = self.prompt.mask.bool()
            visual = torch.zeros_like(live)
            holders = self.prompt.ids == self.family.image_token_id
            if self.inputs is not None and bool(holders.any()):
                sizes = {"input_ids": self.prompt.ids, **self.inputs}
                slots = find_slots(holders, self.family.images(holders, sizes))
                if slots is not None:
                    rows, length = live.shape
                    visual = slots.spread(slots.alive.long(), length, rows).bool()
            self._columns = Columns(visual, live, 0)
        return self._columns


@contextlib.contextmanager
def _positions_given(family: Family, given: dict[str, Tensor]) -> Iterator[None]:
    """Hand position ids to a model that would count them itself."""

    def hook(
        module: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        return args, {**kwargs, **given}

    handle = family.core.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
