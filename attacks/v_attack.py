"""V-Attack: turn what the picture shows at one place from one concept into another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor
from torch.nn.functional import cosine_similarity

from attacks.base import Attack, Proposal
from attacks.budget import Budget, project
from attacks.descent import Descent, descend
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from attacks.transfer.borders import covered, token_boxes
from attacks.transfer.transformations import place, whole
from targets.base import Batch, Knowledge, WhiteBoxView
from targets.errors import KnowledgeError, TargetError

_ALPHA = 3 / 16
"""Published step size as a share of epsilon: 3/255 of 16/255."""


@dataclass(frozen=True, kw_only=True)
class VAttack(Attack):
    """Move the tower's value features of a concept in the picture towards another concept.

    Paper: "V-Attack: Targeting Disentangled Value Features for Controllable Adversarial Attacks on
    LVLMs" (arXiv 2511.20223). **An adaptation**: the paper compares values with texts in the joint
    space of CLIP, whose text tower checkpoints of LVLMs do not hold. With v_li the value of token i
    in layer l behind its output projection and the tower's final normalisation, P the model's own
    projector, and t the mean unit input embedding of a word's tokens in the language model::

        L = −Σ_l mean over i in M of [cos(t_target, P v_li) − cos(t_source, P v_li)]
        M = tokens whose cos(t_source, P v'_i) exceeds the middle of its range over the picture

    l runs over the last layers. v' are the clean values of the last layer, every head's averaged
    `smoothing` times with ``softmax(k kᵀ)`` of an early layer's keys (*self-value enhancement*), so
    that a whole object matches and not single patches. Each step sees a random crop that holds M.

    Args:
        source: the concept to be replaced, for all samples; None is each sample's right answer.
        target: the concept to put there, for all samples; None is, for each sample, the option
            behind the right answer in its closed set of answers (the first behind the last).
        layers: last layers of the tower whose values move, at most all, ≥ 1.
        smoothing: averagings before M is made, ≥ 0.
        keys: layer of the keys that smooth, from 0; None is a third of the depth (published: 8 of
            24).
        crop: least share of height and width a crop keeps, in (0, 1]; 1 is no crop.
        judge_every: every n-th step, and the last, sees the whole picture, and only those compete
            for the best iterate, because losses of different crops cannot be compared; ≥ 1.
        steps: gradient steps T, ≥ 0.
        alpha: step size in [0, 1] pixel units; None is 3/16 of epsilon (published: 3/255 at an
            epsilon of 16/255).
        restarts: starts, best loss kept per sample, ≥ 1.

    Raises:
        AttackError: if a sample has no closed set of answers and no target is given, if source and
            target are the same, or if the family does not say where its tower makes values.

    *Differs from the paper in …*: words are compared in the input embeddings of the language model
    instead of CLIP's joint space, which makes this a white-box attack on one model; M is that of
    the clean picture throughout (the published code makes it anew from each crop's values); the
    loss is a mean over M; every iterate is judged as the 8-bit image that will be saved.
    """

    name: ClassVar[str] = "v_attack"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX

    source: str | None = None
    target: str | None = None
    layers: Annotated[int, Ge(1)] = 4
    smoothing: Annotated[int, Ge(0)] = 20
    keys: Annotated[int, Ge(0)] | None = None
    crop: Annotated[float, Interval(gt=0, le=1)] = 0.75
    judge_every: Annotated[int, Ge(1)] = 10
    steps: Annotated[int, Ge(0)] = 200
    alpha: Annotated[float, Gt(0)] | None = None
    restarts: Annotated[int, Ge(1)] = 1

    @property
    def knows_compression(self) -> bool:
        """It does not: one image serves all compressions."""
        return False

    def budget(self, epsilon: float) -> Budget:
        """Linf radius, step size, steps and restarts."""
        alpha = _ALPHA * epsilon if self.alpha is None else self.alpha
        return Budget(epsilon, "linf", alpha, self.steps, self.restarts)

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Find the source concept on the clean images, then descend on L."""
        try:
            objective = _Objective(self, view, batch, rng)
        except KnowledgeError:
            raise
        except TargetError as error:
            raise AttackError(f"attack v_attack cannot work on this target: {error}") from error
        near = rng.child("start").uniform(batch.images.shape[1:], -1, 1) * budget.step_size
        start = project(batch.images, batch.images + near, budget)
        every = 1 if self.crop == 1 else self.judge_every
        how = Descent(judge_every=every)
        return descend(objective, batch, budget, rng, how=how, start=start)


def swaps(batch: Batch, source: str | None, target: str | None) -> list[tuple[str, str]]:
    """What is replaced by what in each sample.

    Raises:
        AttackError: for samples whose target is unknown, or is the source.
    """
    options = batch.options or ((),) * len(batch.ids)
    pairs: list[tuple[str, str | None]] = []
    for answer, choices in zip(batch.answers, options, strict=True):
        pairs.append((source or answer, target or _next(answer, choices)))
    open_ended = [name for name, pair in zip(batch.ids, pairs, strict=True) if pair[1] is None]
    if open_ended:
        raise AttackError(
            "v_attack needs a target concept, and these questions have no closed set of answers to "
            "take one from; give the option target, or leave such samples out (samples "
            f"{', '.join(open_ended)})",
            sample_ids=tuple(open_ended),
        )
    found = [(one, other or "") for one, other in pairs]
    same = [
        name
        for name, (one, other) in zip(batch.ids, found, strict=True)
        if one.strip().lower() == other.strip().lower()
    ]
    if same:
        raise AttackError(
            f"v_attack would replace {found[batch.ids.index(same[0])][0]!r} by itself; give "
            f"another target or source, or leave such samples out (samples {', '.join(same)})",
            sample_ids=tuple(same),
        )
    return found


def _next(answer: str, choices: tuple[str, ...]) -> str | None:
    """The option behind the right answer; the first behind the last. None without others."""
    others = [choice for choice in choices if choice != answer]
    if not others:
        return None
    if answer not in choices:
        return others[0]
    return choices[(choices.index(answer) + 1) % len(choices)]


def concept_mask(match: Tensor) -> Tensor:
    """M as bool ``[B, V]``: tokens whose match ``[B, V]`` exceeds the middle of its range.

    Where all match alike, all of them.
    """
    low, high = match.amin(1, keepdim=True), match.amax(1, keepdim=True)
    return (match > (low + high) / 2) | (low == high)


def concept_swap(values: Tensor, source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over a mask of ``cos(source, v) − cos(target, v)``, ``[B]``; minimised.

    Args:
        values: ``[B, V, D]``, live.
        source: ``[B, D]``.
        target: ``[B, D]``.
        mask: bool ``[B, V]``; where nothing is in it the loss is 0.
    """
    away = cosine_similarity(values.float(), source[:, None].float(), dim=-1)
    towards = cosine_similarity(values.float(), target[:, None].float(), dim=-1)
    lost = torch.where(mask, away - towards, torch.zeros_like(away)).sum(1)
    return lost / mask.sum(1).clamp_min(1)


def crop_around(mask: Tensor, draw: Tensor, least: float) -> Tensor:
    """A random crop that holds the masked pixels: long ``[B, 4]``, top, left, bottom, right.

    Args:
        mask: ``[B, 1, H, W]`` of 0 and 1.
        draw: ``[B, 4]`` in [0, 1): height, width, top and left.
        least: share of height and width it keeps at least.
    """
    edges = []
    for axis, line in enumerate((mask[:, 0].amax(2), mask[:, 0].amax(1))):
        length = line.shape[1]
        inside = line > 0
        nothing = ~inside.any(1)
        first = inside.to(torch.uint8).argmax(1).masked_fill(nothing, 0)
        last = (length - inside.flip(1).to(torch.uint8).argmax(1)).masked_fill(nothing, length)
        part = (length * (least + (1 - least) * draw[:, axis])).floor().long()
        part = torch.maximum(part.clamp(1, length), torch.where(nothing, 1, last - first))
        low = torch.where(nothing, 0, (last - part).clamp_min(0))
        high = torch.where(nothing, length - part, torch.minimum(first, length - part))
        start = low + (draw[:, 2 + axis] * (high - low + 1)).floor().long()
        edges.append((start, start + part))
    (top, bottom), (left, right) = edges
    return torch.stack([top, left, bottom, right], 1)


class _Objective:
    """L for one batch: finds M on the clean images, then a loss ``[B]`` per call."""

    def __init__(self, attack: VAttack, view: WhiteBoxView, batch: Batch, rng: SeedBank) -> None:
        self.attack, self.view, self.rng = attack, view, rng.child("crops")
        self.size = (batch.images.shape[-2], batch.images.shape[-1])
        depth = view.tower_depth()
        self.numbers = list(range(max(0, depth - attack.layers), depth))
        pairs = swaps(batch, attack.source, attack.target)
        device = batch.images.device
        self.source = view.concepts([one for one, _ in pairs]).to(device)
        self.target = view.concepts([other for _, other in pairs]).to(device)
        with torch.no_grad():
            self.mask = concept_mask(self._match(batch.images, depth))
        self.pixels = view.token_mask_to_pixels(self.mask, self.size).to(batch.images)
        self.boxes = token_boxes(view, self.mask.shape[1], self.size)

    def __call__(self, images: Tensor, step: int) -> Tensor:
        attack, mask = self.attack, self.mask
        cropped = attack.crop < 1 and step % attack.judge_every and step < attack.steps
        if cropped:
            draw = self.rng.child(str(step)).uniform((4,))
            box = crop_around(self.pixels, draw, attack.crop)
            all_of_it = whole(len(images), self.size)
            images = place(images, box, all_of_it)
            mask = covered(place(self.pixels, box, all_of_it), self.boxes) > 0.5
        losses = [
            concept_swap(self.view.project(values), self.source, self.target, mask)
            for values in self.view.values(images, self.numbers, normalised=True)
        ]
        return torch.stack(losses).sum(0)

    def _match(self, images: Tensor, depth: int) -> Tensor:
        """Likeness of each token's smoothed value to the source concept, ``[B, V]``."""
        attack = self.attack
        keys = depth // 3 if attack.keys is None else min(attack.keys, depth - 1)
        (values,) = self.view.values(
            images, [-1], normalised=True, smoothing=attack.smoothing, keys=keys
        )
        projected = self.view.project(values).float()
        return cosine_similarity(projected, self.source[:, None], dim=-1)
