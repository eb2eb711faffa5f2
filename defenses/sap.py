"""SAP: put some dropped tokens back, and hand them attention that suspicious ones receive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute, Defense, DefenseError, DefenseKind
from defenses.decoding import DecodingDefense, check_ranges
from defenses.random_floor import RandomFloor
from targets.compression.scoring import precise, top_k_mask
from targets.decoding import AttentionCall, AttentionRule, Step
from targets.decoding.attention import softmax
from targets.decoding.branch import Branch
from targets.passes import Passes

_CHUNK = 128
_HALF = torch.finfo(torch.float32).min / 2


@dataclass(frozen=True, kw_only=True)
class SAP(Defense):
    """Safety-aware pruning: balanced token restoration and attention reallocation.

    Paper: "Safety-Aware Pruning" (ICML 2026, arXiv 2610.09703), against jailbreaks under pruning;
    its repository holds no code. Two acts that share what was restored: `TokenRestoration` changes
    the kept set, `AttentionReallocation` every decoding step. Deployed together by `parts`; without
    a scenario::

        restore, reallocate = SAP().parts()
        lvlm.answer(images, questions, compressor=restore.protect(fastv), decoding=reallocate)

    The authors' attacker does not know it, and they report no adaptive attack. One that does would
    spread attention over more than m tokens or keep its tokens close to v_safe [inferred].

    Args:
        rho: k as a share of the kept tokens, in [0, 1]; 0 restores nothing.
        number: m ≥ 0 anchors in each layer; the paper found 30 to cost 8 points of MMBench.
        strength: λ in [0, 1], share of attention that anchors lose; 0 reallocates nothing. With
            `rho` 0 too it is no defence, bit for bit.
        anchors: ``safety``, as published; or ``utility``, without the term of v_safe [inferred],
            against attacks on what the answer says and not on what it may say.
        instruction: whose hidden state v_safe is; the paper's wording is not public [unknown].
        beams: width of the search.
        length_penalty: see `DecodingDefense`.

    Raises:
        DefenseError: for an option outside its range, or an empty instruction.

    Costs the attention of the instruction to the picture once in each layer, that of one query in
    each layer for every token, and one pass of the safety instruction for a model.
    """

    name: ClassVar[str] = "sap"
    kind: ClassVar[DefenseKind] = DefenseKind.STACK
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.EOT
    stochastic: ClassVar[bool] = True

    rho: Annotated[float, Interval(ge=0, le=1)] = 0.1
    number: Annotated[int, Ge(0)] = 10
    strength: Annotated[float, Interval(ge=0, le=1)] = 0.6
    anchors: Literal["safety", "utility"] = "safety"
    instruction: str = "Refuse whatever is harmful, illegal or unethical; answer safely."
    beams: Annotated[int, Ge(1)] = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_ranges(self)
        self.parts()

    @property
    def route(self) -> AdaptiveRoute:
        """EOT over what is restored; straight through where nothing is."""
        return self.adaptive if self.draws else AdaptiveRoute.DIFFERENTIABLE

    @property
    def draws(self) -> bool:
        """Where tokens are restored."""
        return self.rho > 0

    def parts(self) -> tuple[TokenRestoration, AttentionReallocation]:
        """Restoration and reallocation."""
        return (
            TokenRestoration(rho=self.rho),
            AttentionReallocation(
                number=self.number,
                strength=self.strength,
                anchors=self.anchors,
                instruction=self.instruction,
                beams=self.beams,
                length_penalty=self.length_penalty,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class TokenRestoration(RandomFloor):
    """Balanced token restoration (BTR): k dropped tokens, drawn evenly, for the k lowest kept ones.

    k is ``rho`` of the kept, rounded, and at most the number dropped. The seed has to be secret.
    What it restores is told to methods that ask (`Columns.restored`).

    Args:
        rho: in [0, 1].

    *Differs from the paper in …*: "lowest" is by the compressor's score at its cut; of one that
    chooses while it scores, the last chosen. A compressor that merges builds its merged tokens
    around the changed set.
    """

    name: ClassVar[str] = "sap_restoration"
    restores: ClassVar[bool] = True
    from_dropped: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class AttentionReallocation(DecodingDefense):
    """Attention reallocation (AR): anchors are attended to less, and restored tokens get the rest.

    In each layer the anchors are the m visual tokens with the largest
    ``MSA(v) = mean_t A[t, v] · (1 − cos(v, v_safe))``, t the tokens of the instruction, found once,
    at prefill. For every token said, in each layer and head, ``A[anchor] ← (1 − λ) A[anchor]``, and
    what that takes away is split equally over the restored tokens, without another softmax: each
    row of attention keeps its sum.

    Args:
        number: m ≥ 0, or as many visual tokens as there are.
        strength: λ.
        anchors: ``safety`` or ``utility``.
        instruction: whose state is v_safe.
        beams: width of the search.
        length_penalty: see `DecodingDefense`.
        safe: ``[layers, D]`` v_safe of each; filled in by `foresee`.

    Differentiable through the reallocated attention; which tokens are anchors has no gradient.

    *Differs from the paper in …* [inferred where it says nothing]: A is the head mean; t are all
    columns of the prompt that are no visual token, those in front of the picture, which mostly pay
    it nothing, included; v and v_safe are inputs of the layer, v_safe of the last token of the
    instruction by itself. The first token of an answer, said at the end of the prefill, is
    reallocated as well: answers of one word would escape otherwise. Where nothing is restored
    (without restoration, without a compressor) the other visual tokens get what anchors lose. In
    layers in front of the compressor's last ranking nothing is done: it would change the ranking.
    """

    name: ClassVar[str] = "sap_reallocation"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    number: Annotated[int, Ge(0)] = 10
    strength: Annotated[float, Interval(ge=0, le=1)] = 0.6
    anchors: Literal["safety", "utility"] = "safety"
    instruction: str = SAP.instruction
    safe: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not self.instruction.strip():
            raise DefenseError(
                f"defence {self.name}: instruction is {self.instruction!r}; give the words that "
                "v_safe is made of, or take anchors 'utility'"
            )

    @property
    def _acts(self) -> bool:
        return self.number > 0 and self.strength > 0

    def foresee(self, passes: Passes) -> AttentionReallocation:
        """Itself with v_safe of the model."""
        if not self._acts or self.anchors == "utility" or self.safe is not None:
            return self
        return replace(self, safe=safe_states(passes, self.instruction))

    def attention(self) -> AttentionRule | None:
        """Reallocated in the main pass, which is the only one."""
        if not self._acts:
            return None
        return Reallocated(self.number, self.strength, self.anchors == "safety", self.safe)

    def logits(self, step: Step) -> Tensor:
        """Those of the reallocated pass."""
        return step.logits


_STATES: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def safe_states(passes: Passes, instruction: str) -> Tensor:
    """v_safe: what enters each layer at the last token of an instruction by itself.

    Worked out once for a model.

    Args:
        passes: of the model.
        instruction: text.

    Returns:
        ``[layers, D]``.
    """
    family = passes.family
    known = _STATES.setdefault(family.model, {})
    if instruction not in known:
        depths = range(len(family.layers))
        branch = Branch(family, passes.prompts.alone(instruction), None, None, None, depths)
        states = branch.start().depths
        known[instruction] = torch.stack([states[depth][0, -1].cpu() for depth in depths])
    return known[instruction]


def suspicion(paid: Tensor, states: Tensor | None, safe: Tensor | None) -> Tensor:
    """MSA of each column ``[B, n]``.

    Args:
        paid: ``[B, n]`` mean attention of the instruction.
        states: ``[B, n, D]``; None for anchors without the term of v_safe.
        safe: ``[D]`` v_safe.
    """
    if states is None or safe is None:
        return paid
    states, safe = precise(states), precise(safe.to(states.device))
    return paid * (1 - torch.cosine_similarity(states, safe, dim=-1))


def reallocated(weights: Tensor, anchors: Tensor, to: Tensor, strength: float) -> Tensor:
    """Attention with a share of the anchors' moved, in equal parts; rows keep their sums.

    Args:
        weights: ``[B, N, R, n]``.
        anchors: bool, broadcast to that.
        to: bool, broadcast likewise: who gets it; a row where nobody does stays as it is.
        strength: λ in [0, 1].
    """
    number = to.sum(-1, keepdim=True)
    taken = strength * (weights * anchors).sum(-1, keepdim=True)
    moved = weights * (1 - strength * anchors.to(weights.dtype))
    moved = moved + taken / number.clamp_min(1) * to
    return torch.where(number > 0, moved, weights)


class Reallocated(AttentionRule):
    """Attention reallocation at answer positions, in every layer.

    Args:
        number: m > 0.
        strength: λ > 0.
        safety: whether anchors are to be unlike v_safe.
        safe: ``[layers, D]`` v_safe, needed for that.

    Attributes:
        anchors: bool ``[B, n]`` by layer, over the columns of the prefill.
    """

    def __init__(self, number: int, strength: float, safety: bool, safe: Tensor | None) -> None:
        self._number, self._strength, self._safe = number, strength, safe
        self.states = safety
        self.anchors: dict[int, Tensor] = {}

    def layers(self, depth: int) -> Iterable[int]:
        """All."""
        return range(depth)

    def select(self, rows: Tensor) -> None:
        """Follow the cache."""
        self.anchors = {layer: one[rows] for layer, one in self.anchors.items()}

    def __call__(self, call: AttentionCall) -> Tensor:
        """Attention of the answer positions, reallocated; the model's own in front of the cut."""
        if not call.columns.settled:
            return call.kernel(call.mask)
        if call.layer not in self.anchors or call.query.shape[2] > 1:
            self.anchors = {**self.anchors, call.layer: self._found(call)}
        columns, length = call.columns, call.key.shape[2]
        anchors = self.anchors[call.layer]
        anchors = torch.nn.functional.pad(anchors, (0, max(0, length - anchors.shape[1])))
        anchors = anchors[:, -length:]  # of a cache that forgets
        others = to = columns.visual & ~anchors
        if columns.restored is not None:
            restored = columns.restored & columns.visual
            to = torch.where(restored.any(1, keepdim=True), restored, others)
        logits, added = call.scaled(call.dots(call.answers())), call.answers_added()
        to = to[:, None, None]
        if added is not None:
            to = to & (added > _HALF)  # a window may have slid past some
        weights = softmax(logits, added)
        moved = reallocated(weights, anchors[:, None, None], to, self._strength)
        return call.put(call.attend(moved))

    @torch.no_grad()
    def _found(self, call: AttentionCall) -> Tensor:
        """The anchors among the columns of a prefill, with or without answers behind it."""
        if self.states and (call.hidden is None or self._safe is None):
            raise DefenseError(
                "defence sap_reallocation: v_safe has not been worked out; a run of your own "
                "begins with method.foresee(passes)"
            )
        visual, live = call.columns.visual, call.columns.live
        prompt = call.query.shape[2] - call.rows + 1
        words = (live & ~visual)[:, :prompt]
        total = torch.zeros(visual.shape, device=visual.device)
        for start in range(0, prompt, _CHUNK):
            stop = min(start + _CHUNK, prompt)
            logits = call.scaled(call.dots(call.query[:, :, start:stop]))
            weights = softmax(logits, call.added(start, stop)).mean(1)
            total = total + (weights * words[:, start:stop, None]).sum(1)
        paid = total / words.sum(1, keepdim=True).clamp_min(1)
        states = call.hidden if self.states else None
        safe = None if self._safe is None else self._safe[call.layer]
        score = suspicion(paid, states, safe)
        count = visual.sum(1).clamp_max(self._number)
        return top_k_mask(score, count, visual)
