"""ToMe: merge similar tokens, a few in every layer of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Merged, Scores, Seen, Selection, Stage
from targets.compression.flow import Step, Tokens
from targets.compression.inside import RUN, InsideTower, TowerRun, padding
from targets.compression.scoring import gather_rows, standardised
from targets.compression.tome_matching import (
    counts_after,
    described,
    distinctness,
    drawn_to,
    least,
    matched,
    mean_keys,
    repeated,
    unit,
)

if TYPE_CHECKING:
    from targets.families.base import Family


@dataclass(frozen=True, kw_only=True)
class ToMe(InsideTower):
    """Merge the most similar tokens between attention and perceptron of each vision layer.

    Paper: Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023, arXiv 2210.09461). In each
    layer up to the one whose output are the features, tokens at even places are compared with those
    at odd places by the cosine of their head-mean keys; the r most similar pairs are merged, as
    means weighted by how many patches each token holds, and log(size) is added to the attention
    logits of later layers (proportional attention). CLS is protected. Unmerged even tokens then
    stand before the odd ones. A constant r over 23 layers leaves 577 − 23 r of 577; here r differs
    by one between layers, so that the budget is met exactly.

    Args:
        retention: left ÷ all visual tokens, in (0, 1].
        keep_tokens: visual tokens left of each image, ≥ 1, instead of retention.
        variant: ``official`` merges in the layers; ``post`` merges the projected tokens in front of
            the language model, in as many rounds as it takes, by their own cosine, and works on
            every family.
        schedule: whether all layers merge equally many tokens, or linearly fewer or more with
            depth; of ``official``.
        order: ``official`` leaves tokens in the order merging gives them, ``spatial`` sorts them by
            the patch they stand for.
        positions: ``reindex`` numbers the tokens in that order, ``keep`` gives each the position id
            of the patch it stands for.

    Raises:
        CompressionError: for an option outside its range, or a budget out of reach (a layer can at
            most halve the tokens).

    *Differs from the paper in …*: it has no score; ours is the distance of a patch's token from the
    nearest token it could be merged with (1 − cosine), mean over the layers, and a patch counts as
    kept while its token has not been merged into another one. Both are [inferred], as are the
    number of layers that merge, r of each, and sorting unmerged tokens where there is no CLS. In
    ``post`` (published "ToMe" rows differ, probably by where it is inserted) metric and rounds are
    [inferred]. A set that is imposed without saying what is merged into what is merged at once in
    the first layer, each token into the most similar one kept.
    """

    name: ClassVar[str] = "tome"

    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    variant: Literal["official", "post"] = "official"
    schedule: Literal["constant", "decreasing", "increasing"] = "constant"
    order: Literal["official", "spatial"] = "official"
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """Inside the tower, or before the language model."""
        return Stage.TOWER if self.variant == "official" else Stage.INPUT

    @property
    def sees_tower(self) -> bool:
        """No: what it needs it takes from the layers itself."""
        return False

    @property
    def merges(self) -> bool:
        """Most of its tokens are new."""
        return True

    @property
    def drops_separators(self) -> bool:
        """Merged tokens lie in no rows."""
        return True

    def refuses(self, family: Family) -> str | None:
        """Budgets that halving in every layer does not reach."""
        tokens = family.fixed_tokens()
        if self.stage is Stage.TOWER and family.encoder is not None and tokens:
            layers = family.encoder.feature_layer + 1
            if self.budget(tokens) < least(tokens, layers):
                return (
                    f"a layer can at most halve the tokens, so {layers} layers of the vision tower "
                    f"leave at least {least(tokens, layers)} of {tokens}, not "
                    f"{self.budget(tokens)}; keep more, or use variant post"
                )
        return super().refuses(family)

    # In the tower -------------------------------------------------------------------------------

    def mask(self, run: TowerRun, layer: int, normed: Tensor) -> Tensor | None:
        """Proportional attention: log(size), once tokens hold more than one patch."""
        tokens = run.tokens[layer]
        if layer == 0 or bool((tokens.size[tokens.alive] == 1).all()):
            return padding(tokens, run.encoder)
        bias = tokens.size.clamp_min(1).log().to(normed.dtype)
        return bias.masked_fill(~tokens.alive, torch.finfo(normed.dtype).min)[:, None, None]

    def between(
        self, run: TowerRun, layer: int, hidden: Tensor, queries: Tensor, keys: Tensor
    ) -> Tensor:
        """Merge by the keys of this layer."""
        del queries
        tokens, metric = run.tokens[layer], mean_keys(keys)
        run.scores.setdefault(layer, distinctness(metric, tokens, run.lead))
        if layer + 1 not in run.tokens:
            step = self._step(run, layer, metric.detach())
            if step is not None:
                run.steps[layer] = step
            run.tokens[layer + 1] = tokens if step is None else step.after
        return run.steps[layer].averaged(hidden) if layer in run.steps else hidden

    def _step(self, run: TowerRun, layer: int, metric: Tensor) -> Step | None:
        tokens, forced, lead = run.tokens[layer], run.forced, run.lead
        if forced is None:
            layers = run.encoder.feature_layer + 1
            plan = counts_after(run.patches, self.budget(run.patches), layers, self.schedule)
            return matched(metric, tokens, tokens.count - lead - plan[layer], lead)
        if forced.assignment is not None:
            return repeated(forced, layer, tokens)
        return None if layer or bool(forced.kept.all()) else _drawn(metric, tokens, forced, lead)

    def judge(self, run: TowerRun) -> Scores:
        """Mean distance to the nearest token, ``[I, V]``; patches kept while not merged."""
        each = [run.tokens[layer].at_places(score) for layer, score in run.scores.items()]
        return _scores(torch.stack(each).mean(0), run.final.survivors())

    def emerge(self, features: Tensor, memory: dict[str, Any]) -> Merged:
        """Sorted by place, if wanted."""
        merged = super().emerge(features, memory)
        if self.order == "official":
            return merged
        order = _by_place(merged)
        run: TowerRun = memory[RUN]
        if run.left is not None:
            run.left = _sorted(run.left, order, run.lead)
        return _reordered(merged, order)

    # In front of the language model, and both ---------------------------------------------------

    def score(self, seen: Seen) -> Scores:
        """Distance to the nearest token the token could be merged with, ``[I, V]``."""
        if self.stage is Stage.TOWER:
            return super().score(seen)
        rounds = _Rounds.of(seen, seen.counts)
        return _scores(rounds.score, rounds.tokens.survivors(), seen.valid)

    def complete(self, kept: Tensor, seen: Seen) -> Selection:
        """What is merged into what, with the kept places."""
        if self.stage is Stage.TOWER:
            run: TowerRun = seen.memory[RUN]
            layers = run.encoder.feature_layer + 1
            return described([*run.steps.items()], kept, layers)
        with torch.no_grad():
            rounds = _Rounds.of(seen, seen.counts)
            if not torch.equal(rounds.tokens.survivors(), kept):
                rounds = _Rounds.of(seen, None, Selection(kept))
        return described([*enumerate(rounds.steps)], kept, max(1, len(rounds.steps)))

    def merge(self, selection: Selection, seen: Seen) -> Merged:
        """Merged projected tokens, ``[I, S, D]`` (variant ``post``)."""
        rounds = _Rounds.of(seen, None, selection)
        tokens, real = rounds.tokens, rounds.tokens.alive
        merged = Merged(rounds.hidden, real, tokens.place.clamp_min(0), real)
        return merged if self.order == "official" else _reordered(merged, _by_place(merged))


@dataclass(frozen=True, slots=True)
class _Rounds:
    """Rounds of merging outside the tower: the tokens that are left, and how they came about.

    Attributes:
        hidden: ``[I, S, D]``.
        tokens: those.
        steps: one a round.
        score: ``[I, V]`` mean distance to the nearest token over the rounds in which an image
            merges; over the first alone where it does not.
    """

    hidden: Tensor
    tokens: Tokens
    steps: list[Step]
    score: Tensor

    @staticmethod
    def of(seen: Seen, counts: Tensor | None, forced: Selection | None = None) -> _Rounds:
        """Until `counts` tokens are left, or as often as an imposed selection says."""
        tokens, order = Tokens.living(seen.valid)
        hidden = gather_rows(seen.features, order).masked_fill(~tokens.alive[..., None], 0)
        steps: list[Step] = []
        score, rounds = torch.zeros((), device=hidden.device), torch.zeros_like(tokens.count)
        while True:
            metric = unit(hidden)
            far = tokens.at_places(distinctness(metric, tokens, 0))
            if forced is not None:
                step = _imposed(metric.detach(), tokens, forced, len(steps))
            else:
                wanted = tokens.count if counts is None else counts
                merges = torch.minimum(tokens.count - wanted, tokens.count // 2)
                step = matched(metric.detach(), tokens, merges, 0)
            # Not how many rounds others take may count, but how many the image itself does.
            merging = tokens.count != (tokens if step is None else step.after).count
            counts_here = merging | (rounds == 0)
            score, rounds = score + far * counts_here[:, None], rounds + counts_here
            if step is None:
                break
            steps.append(step)
            hidden, tokens = step.averaged(hidden), step.after
        return _Rounds(hidden, tokens, steps, score / rounds[:, None])


def _imposed(metric: Tensor, tokens: Tokens, forced: Selection, number: int) -> Step | None:
    if forced.assignment is not None:
        return repeated(forced, number, tokens)
    return None if number else _drawn(metric, tokens, forced, 0)


def _drawn(metric: Tensor, tokens: Tokens, forced: Selection, lead: int) -> Step:
    return drawn_to(metric, tokens, forced.kept, lead)


def _scores(score: Tensor, chosen: Tensor, valid: Tensor | None = None) -> Scores:
    return Scores(score, standardised(score, valid), chosen=chosen)


def _by_place(merged: Merged) -> Tensor:
    """Order of the tokens by the place they stand for, padding last."""
    behind = torch.iinfo(merged.source.dtype).max
    return merged.source.masked_fill(~merged.valid, behind).argsort(dim=1, stable=True)


def _reordered(merged: Merged, order: Tensor) -> Merged:
    source, valid = merged.source.gather(1, order), merged.valid.gather(1, order)
    features = gather_rows(merged.features, order)
    return replace(merged, features=features, valid=valid, source=source, dominant=valid)


def _sorted(tokens: Tokens, order: Tensor, lead: int) -> Tokens:
    """Tokens in another order, the first `lead` where they are."""
    head = torch.arange(lead, device=order.device).expand(len(order), -1)
    order = torch.cat([head, order + lead], 1)
    spot = order.argsort(dim=1)
    where = spot.gather(1, tokens.where.clamp_min(0)).masked_fill(tokens.where < 0, -1)
    return Tokens(tokens.place.gather(1, order), tokens.size.gather(1, order), tokens.count, where)
