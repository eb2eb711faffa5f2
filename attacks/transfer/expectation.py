"""The loss of Transfer CAA: an expectation over surrogates, layers, retentions and views.

Border tokens are those a surrogate mostly sees the frame in, wherever a transformation has put it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from attacks.errors import AttackError
from attacks.objectives import (
    answer_divergence,
    bpr,
    query_misalignment,
    remaining_content,
)
from attacks.seeds import SeedBank
from attacks.transfer.borders import covered, token_boxes
from attacks.transfer.transformations import (
    crop_box,
    diverse_box,
    place,
    scale_copy,
    spectrum,
    whole,
)
from targets.base import Batch, Ranking, Surrogate
from targets.compression.base import Compressor
from targets.compression.fastervlm import FasterVLM
from targets.compression.fastv import FastV

COVERED = 0.5
"""Share of a token's pixels in the frame from which on it counts as a border token."""
REFERENCE_DEPTH = 32
"""Layers of the language models that scoring layers are named for (LLaVA-1.5-7B)."""
_IMAGINED = 0.25
"""Retention of imagined compressors; their scores do not depend on it."""

Score = Literal["llm", "cls"]


def layers_for(depth: int, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Scoring layers of a language model, as FastV counts them: in 1 … depth − 1, rising.

    Args:
        depth: layers the model has.
        layers: wanted. If the model is too shallow for the deepest of them, all are read as
            shares of `REFERENCE_DEPTH`, so that their spread over the depth stays.
    """
    if max(layers) < depth:
        return tuple(sorted(set(layers)))
    shares = (round(layer * depth / REFERENCE_DEPTH) for layer in layers)
    return tuple(sorted({min(max(1, layer), depth - 1) for layer in shares} - {0}))


def scorers_of(
    surrogate: Surrogate, layers: tuple[int, ...], scores: tuple[Score, ...]
) -> tuple[Compressor, ...]:
    """Compressors the attacker imagines on a surrogate: one per score the target may rank by.

    Raises:
        AttackError: if none is possible.
    """
    found: list[Compressor] = []
    if "llm" in scores:
        found += [
            FastV(layer=one, retention=_IMAGINED) for one in layers_for(surrogate.depth, layers)
        ]
    if "cls" in scores:
        found.append(FasterVLM(retention=_IMAGINED))
    if not found:
        raise AttackError(
            f"surrogate {surrogate.name!r} has {surrogate.depth} layers, too few for a score "
            "inside the language model; add cls to scores or take another surrogate"
        )
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What the loss is made of; see `attacks.transfer_caa.TransferCAA`."""

    tau: float
    over: Literal["interior", "kept"]
    retention: tuple[float, float]
    query: float
    erase: float
    preserve: float
    similarity: float

    @property
    def guided(self) -> bool:
        """Whether a term compares with the clean picture's tokens."""
        return self.query > 0 or self.erase > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """Under which transformations it is taken; see `attacks.transfer_caa.TransferCAA`."""

    crops: int
    crop_scale: float
    diversity: float
    diversity_rate: float
    scales: int
    spectra: int
    spectrum_sigma: float
    spectrum_rho: float


class Member:
    """One surrogate as the loss uses it.

    Args:
        surrogate: the model.
        scorers: what it is imagined to rank with, at least one.
    """

    def __init__(self, surrogate: Surrogate, scorers: tuple[Compressor, ...]) -> None:
        self.name, self.view, self.scorers = surrogate.name, surrogate.view, scorers
        self._boxes: dict[tuple[int, int, int], Tensor] = {}

    def groups(self, tokens: int, border: Tensor, interior: Tensor) -> tuple[Tensor, Tensor]:
        """Border and interior tokens, bool ``[B, V]`` each; padding is neither.

        Args:
            tokens: V.
            border: the frame in the picture, ``[B, 1, H, W]`` in [0, 1].
            interior: what it encloses, likewise.
        """
        size = (border.shape[-2], border.shape[-1])
        key = (tokens, *size)
        if key not in self._boxes:
            self._boxes[key] = token_boxes(self.view, tokens, size)
        boxes = self._boxes[key]
        first = covered(border, boxes) >= COVERED
        return first, (covered(interior, boxes) >= COVERED) & ~first


class Expectation:
    """Mean loss of a perturbation of the frame, member by member.

    Args:
        members: surrogates.
        batch: canvases, what the perturbation is added to; the questions for the surrogates.
        mask: the frame, ``[B, 1, H, W]``.
        region: top, left, bottom, right of the picture in the canvas; crops come from there.
        weights: of the loss.
        views: transformations.
        sampled: take one scorer a step, in turn, instead of all of them.
    """

    def __init__(
        self,
        members: tuple[Member, ...],
        batch: Batch,
        mask: Tensor,
        region: tuple[int, int, int, int],
        *,
        weights: Weights,
        views: Views,
        sampled: bool,
    ) -> None:
        self.members, self.batch, self.mask, self.region = members, batch, mask, region
        self.weights, self.views, self.sampled = weights, views, sampled
        self._answers: dict[str, Tensor] = {}

    @property
    def count(self) -> int:
        """Number of members."""
        return len(self.members)

    def gradient(self, number: int, delta: Tensor, rng: SeedBank, step: int) -> Tensor:
        """Gradient of one member's loss at a perturbation ``[B, 3, H, W]``.

        Everything random comes from `rng`, so that a second call draws the same views.
        """
        delta = delta.detach().requires_grad_()
        backdrops = self._backdrops(rng)
        member, total = self.members[number], torch.zeros_like(delta)
        scorers = member.scorers
        if self.sampled:
            # In turn, not by lot: the same mean with less variance, and one batch for all samples.
            scorers = (scorers[(step + number) % len(scorers)],)
        for copy in range(self.views.scales * max(1, self.views.spectra)):
            own = rng.child(f"{member.name} {copy}")
            for scorer in scorers:
                with torch.enable_grad():
                    loss = self._expected(member, scorer, backdrops, delta, own, copy)
                total += _gradient(loss, delta, member.name)
        return total

    def judge(self, images: Tensor) -> Tensor:
        """Loss of finished pictures as they are: mean over all members and scorers, ``[B]``."""
        losses = []
        for member in self.members:
            for scorer in member.scorers:
                masks = self.mask, 1 - self.mask
                with torch.no_grad():
                    losses.append(self._loss(member, scorer, [images], [self.batch.images], masks))
        return torch.stack(losses).mean(0).float()

    def _backdrops(self, rng: SeedBank) -> list[Tensor]:
        """The canvas, and the canvas with a local crop in the place of the picture."""
        canvas = self.batch.images
        found, count, size = [canvas], len(canvas), (canvas.shape[-2], canvas.shape[-1])
        everything = torch.tensor([self.region]).expand(count, -1)
        kept = place(torch.ones_like(canvas[:, :1]), everything, everything, size)
        for number in range(self.views.crops):
            box = crop_box(rng.child(f"crop {number}"), self.region, self.views.crop_scale)
            local = place(canvas, box, everything, size)
            found.append(torch.where(kept > 0, local, canvas))
        return found

    def _expected(
        self,
        member: Member,
        scorer: Compressor,
        backdrops: list[Tensor],
        delta: Tensor,
        rng: SeedBank,
        copy: int,
    ) -> Tensor:
        """Loss of one copy of all views, ``[B]``; a mask moves like its picture."""
        seen = [self._transform(_within(one + delta), rng, copy) for one in backdrops]
        clean = []
        if self.weights.guided:
            clean = [self._transform(one, rng, copy) for one in backdrops]
        masks = self._moved(self.mask, rng), self._moved(1 - self.mask, rng)
        return self._loss(member, scorer, seen, clean, masks, rng)

    def _loss(
        self,
        member: Member,
        scorer: Compressor,
        seen: list[Tensor],
        clean: list[Tensor],
        masks: tuple[Tensor, Tensor],
        rng: SeedBank | None = None,
    ) -> Tensor:
        """Everything weighed, ``[B]``.

        Args:
            member: the surrogate.
            scorer: what it is imagined to rank with.
            seen: the perturbed picture and its crops.
            clean: the same without perturbation; unused unless the loss is guided by it.
            masks: frame and inside, where they are in these.
            rng: for the retention; None is the middle of its range.
        """
        views, weights = len(seen), self.weights
        ranking, divergence = self._look(member, scorer, seen)
        border, interior = (mask.repeat(views, 1, 1, 1) for mask in masks)
        up, down = member.groups(ranking.score.shape[1], border, interior)
        if weights.over == "kept":
            down = down & self._kept(ranking.score, rng, views)
        loss = bpr(ranking.log_score, up, down, weights.tau)
        if weights.guided:
            with torch.no_grad():
                questions = self.batch.questions * views
                reference = member.view.rank(torch.cat(clean), questions, under=scorer)
            loss = loss + self._guidance(ranking, reference, up)
        loss = loss.view(views, -1).mean(0) + weights.preserve * divergence
        if weights.similarity > 0 and views > 1:
            loss = loss - weights.similarity * _alikeness(ranking.features, up, views)
        return loss

    def _look(
        self, member: Member, scorer: Compressor, seen: list[Tensor]
    ) -> tuple[Ranking, Tensor | float]:
        """The ranking of all views, and how far the answer on the whole picture has moved."""
        images, questions = torch.cat(seen), self.batch.questions * len(seen)
        if self.weights.preserve == 0:
            return member.view.rank(images, questions, under=scorer), 0.0
        answers, count = self.batch.answers * len(seen), len(self.batch.ids)
        found = member.view.full_and_rank(images, questions, answers, under=scorer)
        logprobs, real, ranking = found
        if member.name not in self._answers:
            with torch.no_grad():
                self._answers[member.name], _ = member.view.answer_logprobs(
                    self.batch.images, self.batch.questions, self.batch.answers
                )
        clean = self._answers[member.name]
        return ranking, answer_divergence(clean, logprobs[:count], real[:count])

    def _transform(self, images: Tensor, rng: SeedBank, copy: int) -> Tensor:
        """Spectrum, scale and place, in this order."""
        views = self.views
        if views.spectra > 0:
            own = rng.child("spectrum")
            images = spectrum(images, own, views.spectrum_sigma, views.spectrum_rho)
        return self._moved(scale_copy(images, copy % views.scales), rng)

    def _moved(self, images: Tensor, rng: SeedBank) -> Tensor:
        """Input diversity."""
        if self.views.diversity == 0:
            return images
        size = (images.shape[-2], images.shape[-1])
        box = diverse_box(rng.child("place"), size, self.views.diversity_rate, self.views.diversity)
        return place(images, whole(len(images), size), box)

    def _kept(self, score: Tensor, rng: SeedBank | None, views: int) -> Tensor:
        """The tokens that a compressor of a random retention would keep, bool ``[B, V]``."""
        low, high = self.weights.retention
        share = torch.full((len(score) // views, 1), (low + high) / 2)
        if rng is not None:
            share = rng.child("retention").uniform((1,), low, high)
        wanted = (share.to(score).repeat(views, 1) * score.shape[1]).round().clamp_min(1)
        order = score.argsort(dim=1, descending=True, stable=True)
        return order.argsort(dim=1, stable=True) < wanted

    def _guidance(self, ranking: Ranking, clean: Ranking, border: Tensor) -> Tensor:
        """w_q·L_query + w_e·L_erase on the border tokens."""
        loss = self.weights.erase * remaining_content(ranking.features, clean.features, border)
        if ranking.keys is not None and clean.query is not None:
            loss = loss + self.weights.query * query_misalignment(ranking.keys, clean.query, border)
        return loss


def _alikeness(features: Tensor, border: Tensor, views: int) -> Tensor:
    """Mean cosine between the border features of the picture and of its crops, ``[B]``."""
    flat = (features.float() * border[..., None]).flatten(1)
    whole_picture, *crops = flat.chunk(views)
    return torch.stack([cosine_similarity(whole_picture, crop) for crop in crops]).mean(0)


def _gradient(loss: Tensor, delta: Tensor, name: str) -> Tensor:
    found = None
    if loss.requires_grad:
        (found,) = torch.autograd.grad(loss.sum(), delta, allow_unused=True)
    if found is None:
        raise AttackError(f"the ranking of surrogate {name!r} does not depend on the picture")
    return found.detach()


class _Within(torch.autograd.Function):
    """Clamp to [0, 1] that drops only the gradient along which descent would push outwards.

    The gradient of a plain clamp is zero beyond the ends, so a pixel that has left could not come
    back.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        """Clamp."""
        ctx.save_for_backward(images)
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401
        """Keep what descent can follow."""
        (images,) = ctx.saved_tensors
        (gradient,) = gradients
        stuck = ((images <= 0) & (gradient > 0)) | ((images >= 1) & (gradient < 0))
        return gradient.masked_fill(stuck, 0)


def _within(images: Tensor) -> Tensor:
    found: Tensor = _Within.apply(images)  # type: ignore[no-untyped-call]
    return found


def in_words(members: tuple[Member, ...]) -> Iterator[str]:
    """What each surrogate was imagined to rank with, for the report."""
    for member in members:
        parts = [
            f"layer {one.layer}" if isinstance(one, FastV) else "CLS" for one in member.scorers
        ]
        yield f"{member.name} ({', '.join(parts)})"
