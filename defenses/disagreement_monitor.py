"""Disagreement monitor: ask with all visual tokens too, and see whether the answers part."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute
from defenses.detector import Cost, Detector, Observation, State, Traffic, first_logprobs
from targets.base import Continuation
from targets.compression.session import compress

FAINT = 1e-6
"""Nats below which two paths are equal: what is left is rounding."""


@dataclass(frozen=True, kw_only=True)
class DisagreementMonitor(Detector):
    """Run a share of the traffic with all visual tokens as well and compare the two paths.

    [inferred] no publication describes it; it watches for what a compression-specific failure is by
    definition. With f the full path, K the compressed one, p their distributions of the first
    answer token and y what K answers greedily::

        answer:  1 if the texts differ, else 0
        jsd:     ½ KL(p_K ‖ m) + ½ KL(p_f ‖ m),  m = (p_K + p_f) / 2
        kl:      KL(p_f ‖ p_K)
        gap:     max_t [ max_v log p_f(v | y_<t) − log p_f(y_t | y_<t) ]

    jsd is in [0, ln 2], kl and gap in [0, ∞), all in nats. What is not sampled has 0, which is what
    equal paths have: neither is ever flagged. An answer also changes because compression loses
    something on clean pictures, so the threshold has to come from clean traffic of the same kind.

    Args:
        share: p, the share of requests that is run twice, in [0, 1]; drawn by each sample's seed. 0
            costs nothing and sees nothing; 1 gives the speed of compression back.
        signal: what is compared, see above.
        max_new_tokens: most tokens of the answers that ``answer`` and ``gap`` compare, ≥ 1.

    *Differs from the paper in …*: there is none. The similarity of sentence embeddings and
    sequential tests per client are not offered. Which requests are watched is drawn by the sample,
    not kept from an attacker who knows the seed; an attacker in practice does not.
    """

    name: ClassVar[str] = "disagreement_monitor"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.BPDA

    share: Annotated[float, Interval(ge=0, le=1)] = 1.0
    signal: Literal["answer", "jsd", "kl", "gap"] = "jsd"
    max_new_tokens: Annotated[int, Ge(1)] = 16

    def observe(self, traffic: Traffic) -> Observation:
        """The signal of sampled requests, 0 of the others."""
        sampled = [bool(torch.rand((), generator=one) < self.share) for one in traffic.generators()]
        rows = [index for index, one in enumerate(sampled) if one]
        found = traffic.images.new_zeros(len(sampled))
        if not rows:
            return {"signal": found + 0 * traffic.images.flatten(1).sum(1)}
        part = _rows(traffic, rows)
        if self.signal in ("jsd", "kl"):
            full, compressed = (first_logprobs(part, compressed=way) for way in (False, True))
            signal = divergence(full, compressed) if self.signal == "kl" else jsd(full, compressed)
        else:
            signal = self._of_answers(part)
        place = torch.tensor(rows, device=found.device)
        return {"signal": found.index_put((place,), signal.to(found))}

    def _of_answers(self, traffic: Traffic) -> Tensor:
        """Whether the greedy answers differ, or the gap of what the compressed path says."""
        if self.signal == "gap":
            said = spoken(traffic, self.max_new_tokens)
            found = traffic.model.passes.generation(traffic.images, traffic.questions, said)
            return answer_gap(found.logprobs, said.ids, said.real)
        with torch.no_grad():
            hard = traffic.images.new_tensor([float(one) for one in self._differ(traffic)])
        if not torch.is_grad_enabled():
            return hard
        full, compressed = (first_logprobs(traffic, compressed=way) for way in (False, True))
        soft = jsd(full, compressed) / math.log(2)  # backward it stands for the mismatch
        return hard + (soft - soft.detach())

    def _differ(self, traffic: Traffic) -> list[bool]:
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        images, questions = traffic.images, traffic.questions
        full = traffic.model.answer(images, questions, **how)
        how |= {"compressor": traffic.compressor, "seeds": traffic.draws}
        compressed = traffic.model.answer(images, questions, **how)
        return [a != b for a, b in zip(full.texts, compressed.texts, strict=True)]

    def judge(self, seen: Observation, state: State) -> Tensor:
        """The signal as it is, 0 where it is rounding: equal paths are never flagged."""
        del state
        signal = seen["signal"]
        return torch.where(signal > FAINT, signal, 0 * signal)

    @property
    def passes(self) -> int:
        """Both paths."""
        return 2

    @property
    def watchful(self) -> DisagreementMonitor:
        """With all traffic watched."""
        return replace(self, share=1.0)

    def cost(self, full: float) -> Cost:
        """P · C_full / C_K and the tower; what is generated is not counted."""
        return Cost(language=self.share * full, tower=self.share)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first ‖ second) of log-probabilities ``[B, n]``, in nats, ``[B]``."""
    first, second = first.double(), second.double()
    # A token both rule out has −∞ twice; it adds nothing.
    gap = torch.where(first > -torch.inf, first - second, torch.zeros_like(first))
    return (first.exp() * gap).sum(-1).clamp_min(0)


def jsd(first: Tensor, second: Tensor) -> Tensor:
    """Jensen–Shannon divergence of log-probabilities ``[B, n]``, in nats in [0, ln 2], ``[B]``."""
    middle = torch.logaddexp(first.double(), second.double()) - math.log(2)
    return (divergence(first, middle) + divergence(second, middle)) / 2


@torch.no_grad()
def spoken(traffic: Traffic, length: int) -> Continuation:
    """The tokens the compressed path says greedily, at most so many.

    Token by token: an answer that was cut off has no end token, and a text may be spelt in other
    tokens than were said.
    """
    passes, using = traffic.model.passes, traffic.compressor
    images, questions = traffic.images, traffic.questions
    if using is None:
        return passes.continuation(images, questions, length)
    using = passes.ready(images, questions, using, traffic.draws)
    family = passes.family
    session = compress(family.model, using, family=family, seeds=traffic.draws)
    ids = passes.generate(images, questions, session, length, using)
    holder = (ids == family.image_token_id).long()
    return Continuation(ids, passes.until_end(ids) & (holder.cumsum(1) - holder == 0))


def answer_gap(logprobs: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """Largest lead of another token over the one that was said, over the steps, ``[B]``, ≥ 0.

    Args:
        logprobs: ``[B, A, vocabulary]`` of the path that did not say it, teacher-forced.
        targets: long ``[B, A]`` what was said.
        real: bool ``[B, A]``, steps that count.
    """
    said = logprobs.gather(2, targets[..., None]).squeeze(2)
    return (logprobs.amax(2) - said).masked_fill(~real, 0).amax(1)


def _rows(traffic: Traffic, rows: list[int]) -> Traffic:
    draws = traffic.draws
    return Traffic(
        traffic.model,
        traffic.compressor,
        traffic.images[rows],
        tuple(traffic.questions[row] for row in rows),
        tuple(traffic.seeds[row] for row in rows),
        None if draws is None else tuple(draws[row] for row in rows),
        traffic.relax,
    )
