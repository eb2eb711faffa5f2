"""Change the attention of some layers while a model answers, whatever family it is of.

The attention module of each such layer gets a configuration of its own that names one function of
ours as its kernel, for the length of a ``with`` block; the function hands the call on to the rule.
It receives queries and keys behind the rotary embedding and the cache, so that nothing of a family
has to be taken apart. The prompt's own attention goes through the model's kernel, always.

Shapes: B rows, N heads, n key columns, q query columns, R answer positions, E width of a head.
"""

from __future__ import annotations

import copy
import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from targets.compression.aside import is_aside
from targets.compression.scoring import precise
from targets.errors import TargetError
from targets.families.base import Family

KERNEL: Final = "redteam_decoding"
_RULE: Final = "_redteam_attention"


@dataclass(frozen=True, slots=True)
class Columns:
    """What the key columns of a layer are.

    Attributes:
        visual: bool ``[B, n]``, living visual tokens.
        live: bool ``[B, n]``, columns that are no padding.
        start: first layer that has these columns; another number means another selection.
        restored: bool ``[B, n]``, visual tokens that a defence of the selection has put back; None
            where none does that.
        settled: whether the compressor has ranked for the last time, so that a change to attention
            here cannot change its choice; True without one.
    """

    visual: Tensor
    live: Tensor
    start: int
    restored: Tensor | None = None
    settled: bool = True

    def fitted(self, length: int) -> Columns:
        """With generated columns behind; of a cache that forgets, the last `length`."""
        more = max(0, length - self.visual.shape[1])
        visual = torch.nn.functional.pad(self.visual, (0, more))[:, -length:]
        live = torch.nn.functional.pad(self.live, (0, more), value=True)[:, -length:]
        restored = self.restored
        if restored is not None:
            restored = torch.nn.functional.pad(restored, (0, more))[:, -length:]
        return Columns(visual, live, self.start, restored, self.settled)

    def select(self, rows: Tensor) -> Columns:
        """Some rows of the batch."""
        restored = None if self.restored is None else self.restored[rows]
        return Columns(self.visual[rows], self.live[rows], self.start, restored, self.settled)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of a layer's attention kernel; tensors are live.

    Attributes:
        layer: 0-based.
        query: ``[B, N, q, E]``; key, value: ``[B, M, n, E]`` with N a multiple of M.
        mask: as the kernel takes it: None, ``[B, n]``, or ``[B, 1, q, n]`` bool or added.
        scaling: factor on query · key.
        softcap: cap on attention logits, or None.
        causal: whether a mask of None hides what follows a query.
        rows: R, the last query columns, which are answer positions.
        generated: answer tokens among the key columns, the last ones.
        columns: what the key columns are.
        kernel: the model's own, given a mask → ``[B, q, N, E]``.
        hidden: ``[B, q, D]`` the layer's input, of rules that want it (`AttentionRule.states`).
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    causal: bool
    rows: int
    generated: int
    columns: Columns
    kernel: Callable[[Tensor | None], Tensor]
    hidden: Tensor | None = None

    def dots(self, query: Tensor, key: Tensor | None = None) -> Tensor:
        """``query · key`` ``[B, N, r, n]`` of queries ``[B, N, r, E]``, at least float32."""
        key = self.key if key is None else key
        rows, heads, count, width = query.shape
        grouped = query.reshape(rows, key.shape[1], -1, width)  # [B, M, N/M · r, E]
        found = precise(grouped @ key.transpose(2, 3))
        return found.view(rows, heads, count, -1)

    def scaled(self, dots: Tensor) -> Tensor:
        """Attention logits of `dots`, scaled and capped as the model does."""
        logits = dots * self.scaling
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def added(self, first: int, last: int) -> Tensor | None:
        """What the mask adds to the logits of queries first … last − 1, ``[B, 1, r, n]``."""
        q, n, mask = self.query.shape[2], self.key.shape[2], self.mask
        if mask is not None and mask.dim() == 4:
            part = mask[:, :, first:last, :n]
            return hidden(part) if part.dtype == torch.bool else precise(part)
        if mask is None and (q == 1 or not self.causal):
            return None
        order = torch.arange(n, device=self.key.device)
        visible = (order <= order[n - q + first : n - q + last, None])[None, None]
        if mask is not None:
            visible = visible & mask[:, None, None, -n:].bool()
        return hidden(visible)

    def answers(self) -> Tensor:
        """Queries of the answer positions, ``[B, N, R, E]``."""
        return self.query[:, :, self.query.shape[2] - self.rows :]

    def answers_added(self) -> Tensor | None:
        """`added` of the answer positions."""
        return self.added(self.query.shape[2] - self.rows, self.query.shape[2])

    def attend(self, weights: Tensor) -> Tensor:
        """Values summed up by weights ``[B, N, R, n]`` → ``[B, R, N, E]``."""
        rows, heads, count, length = weights.shape
        grouped = weights.to(self.value.dtype).reshape(rows, self.value.shape[1], -1, length)
        return (grouped @ self.value).view(rows, heads, count, -1).transpose(1, 2)

    def put(self, out: Tensor) -> Tensor:
        """The call's result: the model's own, with ``[B, R, N, E]`` at the answer positions."""
        if self.rows == self.query.shape[2]:
            return out
        whole = self.kernel(self.mask)
        return torch.cat([whole[:, : whole.shape[1] - self.rows], out.to(whole.dtype)], 1)


def hidden(visible: Tensor) -> Tensor:
    """0 where visible, else the lowest float32: a mask to be added to logits."""
    zero = torch.zeros(visible.shape, device=visible.device)
    return zero.masked_fill(~visible, torch.finfo(zero.dtype).min)


def softmax(logits: Tensor, added: Tensor | None) -> Tensor:
    """Attention of masked logits."""
    return (logits if added is None else logits + added).softmax(-1)


class AttentionRule(ABC):
    """A change to attention, for one batch from its prefill to its last token."""

    masks: bool = False
    """Whether it hands the kernel a mask of its own, which flash attention does not take."""
    states: bool = False
    """Whether it wants the layer's input (`AttentionCall.hidden`)."""

    @abstractmethod
    def layers(self, depth: int) -> Iterable[int]:
        """The layers it changes, of `depth` of them."""

    @abstractmethod
    def __call__(self, call: AttentionCall) -> Tensor:
        """Attention's output ``[B, q, N, E]``."""

    def select(self, rows: Tensor) -> None:  # noqa: B027 - most remember nothing row by row
        """Go on with some rows of the batch, long ``[n]``, as the cache does."""

    def mark(self) -> Callable[[], None]:
        """Remember what it remembers; what this returns goes back there, as often as called.

        Right for rules that keep tensors, or dictionaries of them, and never write into one.
        """

        def copied(state: dict[str, Any]) -> dict[str, Any]:
            return {
                name: dict(value) if isinstance(value, dict) else value
                for name, value in state.items()
            }

        state = copied(self.__dict__)

        def back() -> None:
            self.__dict__.update(copied(state))

        return back


@dataclass(slots=True)
class Attending:
    """A rule at work in a model, inside ``with``; nothing is changed outside.

    Attributes:
        family: the model's adapter.
        rule: the change.
        look: what the columns of a layer are, asked at prefill.
        rows: answer positions of the forward that runs.
        generated: answer tokens among its key columns.
        known: columns by layer, at prefill.
    """

    family: Family
    rule: AttentionRule
    look: Callable[[int], Columns]
    rows: int = 1
    generated: int = 0
    known: dict[int, Columns] = field(default_factory=dict)
    _fitted: dict[tuple[int, int], Columns] = field(default_factory=dict)
    _before: dict[int, Any] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _hidden: dict[int, Tensor] = field(default_factory=dict)
    _own: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse kernels that a rule cannot stand before; make the configurations."""
        _register()
        for layer in self.rule.layers(len(self.family.layers)):
            config = self.family.layers[layer].self_attn.config
            implementation = str(config._attn_implementation)
            if self.rule.masks and implementation not in ("sdpa", "eager"):
                raise TargetError(
                    f"{type(self.rule).__name__} hides columns from attention, which "
                    f"{implementation} cannot; load the model with attn_implementation sdpa or "
                    "eager"
                )
            own = copy.copy(config)
            own._attn_implementation_internal = KERNEL
            self._own[layer] = own

    def __enter__(self) -> Attending:
        for layer, own in self._own.items():
            module = self.family.layers[layer].self_attn
            self._before[layer] = module.config
            module.config = own
            module.__dict__[_RULE] = functools.partial(self._run, layer)
            if self.rule.states:
                # Behind a session's hook, which may have shortened the input.
                hook = self._enters(layer)
                handle = self.family.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
                self._handles.append(handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for layer, config in self._before.items():
            module = self.family.layers[layer].self_attn
            module.config = config
            module.__dict__.pop(_RULE, None)
        for handle in self._handles:
            handle.remove()
        self._before, self._handles, self._hidden, self._fitted = {}, [], {}, {}

    def _enters(self, layer: int) -> Callable[..., None]:
        def hook(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            self._hidden[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def mark(self) -> Callable[[], None]:
        """Remember what is known of the rows; what it returns goes back there."""
        known, rule = dict(self.known), self.rule.mark()

        def back() -> None:
            self.known = dict(known)
            rule()

        return back

    def select(self, rows: Tensor) -> None:
        """Go on with some rows of the batch."""
        apart = {id(one): one.select(rows) for one in self.known.values()}
        self.known = {layer: apart[id(one)] for layer, one in self.known.items()}
        self.rule.select(rows)

    def _run(
        self,
        layer: int,
        module: Any,  # noqa: ANN401 - modules of transformers are untyped
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        kwargs: dict[str, Any],
    ) -> Tensor:
        def kernel(own: Tensor | None) -> Tensor:
            original = _kernel_of(module, self._before[layer]._attn_implementation)
            found: Tensor = original(module, query, key, value, own, scaling=scaling, **kwargs)[0]
            return found

        if is_aside():
            return kernel(mask)  # a compressor asks the model something else meanwhile
        causal = kwargs.get("is_causal")
        softcap = kwargs.get("softcap")
        return self.rule(
            AttentionCall(
                layer=layer,
                query=query,
                key=key,
                value=value,
                mask=mask,
                scaling=scaling,
                softcap=None if softcap is None else float(softcap),
                causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
                rows=self.rows,
                generated=self.generated,
                columns=self._columns(layer, key.shape[2]),
                kernel=kernel,
                hidden=self._hidden.get(layer),
            )
        )

    def _columns(self, layer: int, length: int) -> Columns:
        """What the columns of a layer are now; layers of one selection share it in a forward."""
        if layer not in self.known:
            self.known[layer] = self.look(layer)
        known = self.known[layer]
        key = id(known), length
        if key not in self._fitted:
            self._fitted[key] = known.fitted(length)
        return self._fitted[key]


def _dispatch(
    module: Any,  # noqa: ANN401 - modules of transformers are untyped
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    run = module.__dict__[_RULE]
    return run(module, query, key, value, attention_mask, scaling, kwargs), None


@functools.cache
def _register() -> None:
    """Let transformers know our kernel by name; no model uses it unless its module says so."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(KERNEL, _dispatch)


def _kernel_of(module: Any, implementation: str) -> Callable[..., Any]:  # noqa: ANN401
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    home = sys.modules[type(module).__module__]
    default = getattr(home, "eager_attention_forward", None)
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, default)
    return found
