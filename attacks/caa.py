"""CAA, the compression-aware attack: make the compressor keep the wrong tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.errors import AttackError
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
from targets.compression.fastv import FastV

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
    model up to where the compressor ranks; with L_pres the whole model. Of compressors with several
    cuts the first is attacked.

    Where the compression is not known, `layers` and `retentions` declare the range it is thought to
    lie in, and J is its mean over FastV at each of these layers and retentions: P is then the m
    tokens of lowest mean clean rank over the layers, m follows from each retention, and one image
    serves all compressors. A step costs a pass for each layer.

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
            ``dropped`` is V − K, all that the compressor drops; None takes the preset's, and
            ``twice_kept`` for ``paper`` where the compression is not known.
        promote: m itself, a count of tokens; None follows `group`.
        layers: language-model layers, ≥ 1, at which an unknown compressor may cut, as FastV counts
            them; empty where the compressor is known. Given together with `retentions`.
        retentions: kept ÷ all tokens, in (0, 1), that an unknown compressor may have.
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
        AttackError: for layers without retentions or the reverse, or values outside their range;
            see also `attacks.descent.descend`.

    *Differs from the paper in …*: weights, tau, m, alpha, T and the form of every term are ours
    (the paper's are not public); teacher forcing uses the correct answer, which is the model's
    own on every sample that counts; steps have momentum, every iterate is judged as the 8-bit image
    that will be saved, and the best is kept; encoder-side scores are attacked in the same way, with
    CLS as the query. The order inside the important tokens is left alone in ``most_important``. The
    paper advises to enlarge P and to aim at later layers where the compression is not known; a mean
    over a declared range is ours.
    """

    name: ClassVar[str] = "caa"
    takes_penalty: ClassVar[bool] = True
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX

    preset: Literal["paper", "strict_preserve"] = "paper"
    region: Literal["low", "full_image", "most_important"] = "low"
    ranking: Literal["bpr", "score_gap", "absolute"] = "bpr"
    intra: Literal["promoted", "both", "none"] = "promoted"
    group: Literal["kept", "twice_kept", "dropped"] | None = None
    promote: Annotated[int, Ge(1)] | None = None
    layers: tuple[int, ...] = ()
    retentions: tuple[float, ...] = ()
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

    def __post_init__(self) -> None:
        """Check the range that stands for an unknown compression."""
        super().__post_init__()
        if bool(self.layers) != bool(self.retentions):
            raise AttackError(
                f"attack caa: layers is {list(self.layers)} and retentions is "
                f"{list(self.retentions)}; give both to say that the compression is not known and "
                "where it may lie (a layer that is known as a list of one), or neither"
            )
        layers = all(type(one) is int and one >= 1 for one in self.layers)
        shares = all(0 < one < 1 for one in self.retentions)
        for option, fine, allowed in (
            ("layers", layers, "whole numbers ≥ 1"),
            ("retentions", shares, "shares in (0, 1)"),
        ):
            given = getattr(self, option)
            if not fine or len(set(given)) != len(given):
                raise AttackError(
                    f"attack caa: {option} is {list(given)}; allowed: {allowed}, each once"
                )

    @property
    def imagined(self) -> tuple[FastV, ...]:
        """What the compressor may be, by layer; empty where it is known."""
        return tuple(FastV(layer=one, retention=self.retentions[0]) for one in self.layers)

    @property
    def preservation(self) -> float:
        """w_p, with the preset resolved."""
        return _PRESERVE[self.preset] if self.preserve_weight is None else self.preserve_weight

    @property
    def group_rule(self) -> str:
        """The rule for m, with the preset resolved."""
        if self.group is None and self.layers and self.preset == "paper":
            return "twice_kept"
        return _GROUP[self.preset] if self.group is None else self.group

    @property
    def needs(self) -> Knowledge:
        """The whole model if the full path is preserved or the cut may be anywhere in it."""
        whole = self.preservation > 0 or bool(self.layers)
        return Knowledge.WHITE_BOX if whole else Knowledge.COMPRESSED

    @property
    def knows_compression(self) -> bool:
        """Not where it works on a declared range instead."""
        return not self.layers

    @property
    def gradients_per_step(self) -> int:
        """One for each layer of a declared range."""
        return max(len(self.layers), 1)

    def budget(self, epsilon: float) -> Budget:
        """Linf radius, step size, steps and restarts."""
        return Budget(epsilon, "linf", self.alpha, self.steps, self.restarts)

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Rank the clean images once, then descend on J inside the mask."""
        objective = _Objective(self, view, batch, budget.steps)
        pixels = None
        if self.region != "full_image":
            size = (batch.images.shape[-2], batch.images.shape[-1])
            pixels = view.token_mask_to_pixels(objective.movable, size).to(batch.images)
        how = Descent(
            momentum=self.momentum,
            schedule=self.schedule,
            random_start=self.random_start,
            judge_every=self.preserve_every if self.preservation > 0 else 1,
        )
        found = descend(objective, batch, budget, rng, how=how, mask=pixels)
        return replace(found, notes=tuple(objective.notes))


@dataclass(frozen=True, slots=True)
class _Clean:
    """What the attack remembers of the clean images; all detached.

    Attributes:
        rankings: one for each compressor imagined, or of the known one.
        groups: bool ``[B, V]`` P, one for each retention imagined, or of the known one.
        logprobs: ``[B, A, vocabulary]`` of the answers with all tokens, if they are preserved.
    """

    rankings: tuple[Ranking, ...]
    groups: tuple[Tensor, ...]
    logprobs: Tensor | None


class _Objective:
    """J for one batch: a clean pass at construction, then a loss ``[B]`` per call."""

    def __init__(self, attack: CAA, view: WhiteBoxView, batch: Batch, steps: int) -> None:
        self.attack, self.view, self.batch, self.steps = attack, view, batch, steps
        self.notes: list[str] = []
        with torch.no_grad():
            rankings, logprobs, _ = self._forward(batch.images, attack.preservation > 0)
        self.clean = _Clean(rankings, _groups(attack, rankings), logprobs)
        if attack.query_weight > 0 and any(
            one.query is None or one.keys is None for one in rankings
        ):
            self._note("query guidance is off: the score of this compressor is not an attention")

    @property
    def movable(self) -> Tensor:
        """Tokens whose pixels may move, bool ``[B, V]``: every P."""
        return torch.stack(self.clean.groups).any(0)

    def __call__(self, images: Tensor, step: int) -> Tensor:
        attack = self.attack
        preserve = attack.preservation > 0 and (
            step % attack.preserve_every == 0 or step == self.steps
        )
        rankings, logprobs, positions = self._forward(images, preserve)
        if images.requires_grad and not any(one.log_score.requires_grad for one in rankings):
            self._note("the ranking of this compressor ignores the image; only erasure can act")
        pairs = zip(rankings, self.clean.rankings, strict=True)
        losses = [self._loss(*pair, up) for pair in pairs for up in self.clean.groups]
        loss = torch.stack(losses).mean(0)
        if logprobs is not None and positions is not None and self.clean.logprobs is not None:
            divergence = answer_divergence(self.clean.logprobs, logprobs, positions)
            loss = loss + attack.preservation * divergence
        return loss

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _forward(
        self, images: Tensor, preserve: bool
    ) -> tuple[tuple[Ranking, ...], Tensor | None, Tensor | None]:
        """Rankings under all that is imagined, and the full path's answers if wanted."""
        questions, answers = self.batch.questions, self.batch.answers
        first, *others = self.attack.imagined or (None,)
        logprobs = positions = None
        if preserve:
            logprobs, positions, ranking = self.view.full_and_rank(
                images, questions, answers, under=first
            )
        else:
            ranking = self.view.rank(images, questions, under=first)
        more = [self.view.rank(images, questions, under=one) for one in others]
        return (ranking, *more), logprobs, positions

    def _loss(self, ranking: Ranking, clean: Ranking, up: Tensor) -> Tensor:
        """J without L_pres, under one compressor and with one P."""
        ranked = self._ranking(ranking, clean, up)
        return ranked + self._query(ranking, clean, up) + self._erasure(ranking, clean, up)

    def _ranking(self, ranking: Ranking, clean: Ranking, up: Tensor) -> Tensor:
        attack, score = self.attack, ranking.log_score
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
            within = reversed_order(score, clean.log_score, group, attack.tau)
            loss = loss + attack.intra_weight * within
        return loss

    def _query(self, ranking: Ranking, clean: Ranking, up: Tensor) -> Tensor:
        if self.attack.query_weight == 0 or clean.query is None or ranking.keys is None:
            return torch.zeros(len(ranking.score), device=ranking.score.device)
        return self.attack.query_weight * query_misalignment(ranking.keys, clean.query, up)

    def _erasure(self, ranking: Ranking, clean: Ranking, up: Tensor) -> Tensor:
        if self.attack.erase_weight == 0:
            return torch.zeros(len(ranking.score), device=ranking.score.device)
        return self.attack.erase_weight * remaining_content(ranking.features, clean.features, up)


def _groups(attack: CAA, rankings: tuple[Ranking, ...]) -> tuple[Tensor, ...]:
    """P under each retention imagined, nested; the one P of a known compressor."""
    if not attack.layers:
        return (promoted_tokens(attack, rankings[0]),)
    ranks = [one.score.argsort(dim=1, stable=True).argsort(dim=1, stable=True) for one in rankings]
    mean = torch.stack(ranks).double().mean(0)
    tokens = mean.shape[1]
    budgets = [FastV(retention=share).budget(tokens) for share in attack.retentions]
    kept = [torch.full_like(mean[:, 0], one, dtype=torch.long) for one in budgets]
    return tuple(_lowest(attack, mean, one) for one in kept)


def promoted_tokens(attack: CAA, ranking: Ranking) -> Tensor:
    """P as bool ``[B, V]``: the m least important clean tokens, or the m most important.

    m is `promote`, or follows by `group` from the number of tokens each sample keeps; at least 1
    token is promoted and at least 1 is not, so that there is an order to change. Dropped tokens
    count as less important than kept ones, also where the score alone does not decide.
    """
    score, kept = ranking.score.detach(), ranking.kept
    order = score.argsort(dim=1, stable=True)
    order = order.gather(1, kept.long().gather(1, order).argsort(dim=1, stable=True))
    return _lowest(attack, order.argsort(dim=1, stable=True).double(), kept.sum(1))


def _lowest(attack: CAA, score: Tensor, kept: Tensor) -> Tensor:
    """P for importance ``[B, V]`` and how many tokens are kept of each sample, ``[B]``."""
    tokens = score.shape[1]
    if attack.promote is not None:
        count = torch.full_like(kept, attack.promote)
    else:
        wanted = {"kept": kept, "twice_kept": 2 * kept, "dropped": tokens - kept}
        count = torch.minimum(wanted[attack.group_rule], tokens - kept)
    count = count.clamp(1, max(tokens - 1, 1))
    descending = attack.region == "most_important"
    order = score.argsort(dim=1, descending=descending, stable=True)
    place = order.argsort(dim=1, stable=True)  # place of each token in that order
    return place < count[:, None]
