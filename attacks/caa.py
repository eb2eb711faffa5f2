"""CAA, the compression-aware attack: make the compressor keep the wrong tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.objectives import (
    absolute_score,
    answer_divergence,
    bpr,
    query_misalignment,
    remaining_content,
    reversed_order,
    score_gap,
)
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, Ranking, WhiteBoxView

_PRESERVE = {"paper": 0.0, "strict_preserve": 1.0}
_GROUP = {"paper": "kept", "strict_preserve": "dropped"}


@dataclass(frozen=True, kw_only=True)
class CAA(Attack):
    """Promote unimportant visual tokens over important ones, so that compression keeps the wrong.

    Paper: "Compression-Aware Attack" (arXiv 2601.12042), eq. 6: failure with compression on,
    unchanged behaviour with it off, inside an linf ball. **The loss is a reconstruction**: only the
    components and their ablations are known. With P the m tokens of lowest clean score, R the
    rest, s log-scores, k keys, q the query, v token features, ^c clean values::

        J = L_inter + gamma·L_intra + w_q·L_query + w_e·L_erase + w_p·L_pres
        L_inter = BPR(P over R)                 L_intra = BPR of the reversed clean order inside P
        L_query = −mean_P mean_heads cos(k, q^c)        L_erase = mean_P cos(v, v^c)
        L_pres  = KL(p(·|clean, all tokens) ‖ p(·|attacked, all tokens)) on the answer's tokens

    Only pixels of P move, which spares the uncompressed path. A step runs the vision tower and the
    model up to where the compressor ranks; with L_pres the whole model.

    Args:
        preset: ``paper`` (w_p = 0, group ``kept``) or ``strict_preserve`` (w_p = 1, group
            ``dropped``: with L_pres guarding the full path, P need not be small);
            `preserve_weight` and `group` override.
        region: pixels that may move: ``low`` those of P; ``full_image`` all, the same loss
            (CAA-Full); ``most_important`` those of the m most important tokens, whose content is
            erased while they are held above the rest (Most-Only).
        ranking: L_inter: ``bpr``; ``score_gap``, the difference of mean log-scores, which never
            saturates; or ``absolute``, minus the mean log-score of P whatever R has (w/o BPR).
        intra: where L_intra acts: in P (``promoted``), in P and R (``both``), or ``none``.
        group: rule for m from the number K of kept tokens, never above V − K: ``kept`` is K, just
            enough to fill the selection; ``twice_kept`` is 2K, for an attacker unsure of K;
            ``dropped`` is V − K, all that the compressor drops; None takes the preset's.
        promote: m itself, a count of tokens; None follows `group`.
        tau: score gap that counts as settled, > 0.
        intra_weight: gamma, ≥ 0.
        query_weight: w_q, ≥ 0; without effect where the score is not attention, which is noted.
        erase_weight: w_e, ≥ 0.
        preserve_weight: w_p, ≥ 0; None takes the preset's.
        preserve_every: L_pres enters every n-th step only, ≥ 1. Other steps cost less and cannot
            become the result, because their loss is not comparable.
        steps: gradient steps T, ≥ 0; 0 is noise in the mask, the control for this attack.
        alpha: step size in [0, 1] pixel units; None is epsilon / 6.
        restarts: starts, best loss kept per sample, ≥ 1.
        momentum: decay of accumulated gradients in [0, 1].
        schedule: step size over the run.
        random_start: begin at a random point of the (masked) ball.

    Raises:
        AttackError: see `attacks.descent.descend`.

    *Differs from the paper in …*: weights, tau, m, alpha, T and the form of every term are ours
    (the paper's are not public); teacher forcing uses the correct answer, which is the model's
    own on every sample that counts; steps have momentum, every iterate is judged as the 8-bit image
    that will be saved, and the best is kept; encoder-side scores are attacked in the same way, with
    CLS as the query. The order inside the important tokens is left alone in ``most_important``.
    """

    name: ClassVar[str] = "caa"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX

    preset: Literal["paper", "strict_preserve"] = "paper"
    region: Literal["low", "full_image", "most_important"] = "low"
    ranking: Literal["bpr", "score_gap", "absolute"] = "bpr"
    intra: Literal["promoted", "both", "none"] = "promoted"
    group: Literal["kept", "twice_kept", "dropped"] | None = None
    promote: Annotated[int, Ge(1)] | None = None
    tau: Annotated[float, Gt(0)] = 1.0
    intra_weight: Annotated[float, Ge(0)] = 1.0
    query_weight: Annotated[float, Ge(0)] = 1.0
    erase_weight: Annotated[float, Ge(0)] = 1.0
    preserve_weight: Annotated[float, Ge(0)] | None = None
    preserve_every: Annotated[int, Ge(1)] = 1
    steps: Annotated[int, Ge(0)] = 100
    alpha: Annotated[float, Gt(0)] | None = None
    restarts: Annotated[int, Ge(1)] = 1
    momentum: Annotated[float, Interval(ge=0, le=1)] = 0.7
    schedule: Literal["constant", "cosine", "halving"] = "cosine"
    random_start: bool = True

    @property
    def preservation(self) -> float:
        """w_p, with the preset resolved."""
        return _PRESERVE[self.preset] if self.preserve_weight is None else self.preserve_weight

    @property
    def group_rule(self) -> str:
        """The rule for m, with the preset resolved."""
        return _GROUP[self.preset] if self.group is None else self.group

    @property
    def needs(self) -> Knowledge:
        """The whole model only if the full path is preserved; else no further than the ranking."""
        return Knowledge.WHITE_BOX if self.preservation > 0 else Knowledge.COMPRESSED

    def budget(self, epsilon: float) -> Budget:
        """Linf radius, step size, steps and restarts."""
        return Budget(epsilon, "linf", self.alpha, self.steps, self.restarts)

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Rank the clean images once, then descend on J inside the mask."""
        objective = _Objective(self, view, batch, budget.steps)
        clean = objective.clean
        pixels = None
        if self.region != "full_image":
            size = (batch.images.shape[-2], batch.images.shape[-1])
            pixels = view.token_mask_to_pixels(clean.promoted, size).to(batch.images)
        how = Descent(
            momentum=self.momentum,
            schedule=self.schedule,
            random_start=self.random_start,
            judge_every=self.preserve_every if self.preservation > 0 else 1,
        )
        found = descend(objective, batch, budget, rng, how=how, mask=pixels)
        return Proposal(found.images, found.loss, found.gradient, pixels, tuple(objective.notes))


@dataclass(frozen=True, slots=True)
class _Clean:
    """What the attack remembers of the clean images; all detached."""

    ranking: Ranking
    promoted: Tensor  # bool [B, V]
    logprobs: Tensor | None  # [B, A, vocabulary]


class _Objective:
    """J for one batch: a clean pass at construction, then a loss ``[B]`` per call."""

    def __init__(self, attack: CAA, view: WhiteBoxView, batch: Batch, steps: int) -> None:
        self.attack, self.view, self.batch, self.steps = attack, view, batch, steps
        self.notes: list[str] = []
        with torch.no_grad():
            ranking, logprobs, _ = self._forward(batch.images, attack.preservation > 0)
        self.clean = _Clean(ranking, promoted_tokens(attack, ranking), logprobs)
        if attack.query_weight > 0 and (ranking.query is None or ranking.keys is None):
            self._note("query guidance is off: the score of this compressor is not an attention")

    def __call__(self, images: Tensor, step: int) -> Tensor:
        attack = self.attack
        preserve = attack.preservation > 0 and (
            step % attack.preserve_every == 0 or step == self.steps
        )
        ranking, logprobs, positions = self._forward(images, preserve)
        if images.requires_grad and not ranking.log_score.requires_grad:
            self._note("the ranking of this compressor ignores the image; only erasure can act")
        loss = self._ranking(ranking) + self._query(ranking) + self._erasure(ranking)
        if logprobs is not None and positions is not None and self.clean.logprobs is not None:
            divergence = answer_divergence(self.clean.logprobs, logprobs, positions)
            loss = loss + attack.preservation * divergence
        return loss

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _forward(
        self, images: Tensor, preserve: bool
    ) -> tuple[Ranking, Tensor | None, Tensor | None]:
        questions, answers = self.batch.questions, self.batch.answers
        if not preserve:
            return self.view.rank(images, questions), None, None
        logprobs, positions, ranking = self.view.full_and_rank(images, questions, answers)
        return ranking, logprobs, positions

    def _ranking(self, ranking: Ranking) -> Tensor:
        attack, score, up = self.attack, ranking.log_score, self.clean.promoted
        if attack.ranking == "score_gap":
            loss = score_gap(score, up, ~up)
        elif attack.ranking == "absolute":
            loss = absolute_score(score, up)
        else:
            loss = bpr(score, up, ~up, attack.tau)
        if attack.intra_weight == 0 or attack.region == "most_important":
            return loss
        groups = {"promoted": (up,), "both": (up, ~up), "none": ()}[attack.intra]
        for group in groups:
            within = reversed_order(score, self.clean.ranking.log_score, group, attack.tau)
            loss = loss + attack.intra_weight * within
        return loss

    def _query(self, ranking: Ranking) -> Tensor:
        query = self.clean.ranking.query
        if self.attack.query_weight == 0 or query is None or ranking.keys is None:
            return torch.zeros(len(ranking.score), device=ranking.score.device)
        misaligned = query_misalignment(ranking.keys, query, self.clean.promoted)
        return self.attack.query_weight * misaligned

    def _erasure(self, ranking: Ranking) -> Tensor:
        if self.attack.erase_weight == 0:
            return torch.zeros(len(ranking.score), device=ranking.score.device)
        left = remaining_content(ranking.features, self.clean.ranking.features, self.clean.promoted)
        return self.attack.erase_weight * left


def promoted_tokens(attack: CAA, ranking: Ranking) -> Tensor:
    """P as bool ``[B, V]``: the m least important clean tokens, or the m most important.

    m is `promote`, or follows by `group` from the number of tokens each sample keeps; at least 1
    token is promoted and at least 1 is not, so that there is an order to change.
    """
    tokens = ranking.score.shape[1]
    kept = ranking.kept.sum(1)  # [B]
    if attack.promote is not None:
        count = torch.full_like(kept, attack.promote)
    else:
        wanted = {"kept": kept, "twice_kept": 2 * kept, "dropped": tokens - kept}
        count = torch.minimum(wanted[attack.group_rule], tokens - kept)
    count = count.clamp(1, max(tokens - 1, 1))
    descending = attack.region == "most_important"
    order = ranking.score.argsort(dim=1, descending=descending, stable=True)
    place = order.argsort(dim=1, stable=True)  # place of each token in that order
    return place < count[:, None]
