"""Losses on what the model answers, for attacks that go through the whole model; all minimised.

The functions are pure, one value per sample ``[B]``, on log-probabilities of answer options
``[B, O]``; those stand in for logits, which they equal up to a constant per sample. `AnswerLoss`
asks a view for them, whatever mixture of closed and open questions a batch is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.errors import AttackError
from attacks.goal import End
from attacks.objectives import answer_divergence
from targets.base import Batch, Path, WhiteBoxView

Route = Literal["full", "compressed", "both"]
LossName = Literal["ce", "margin", "dlr"]
_TINY = 1e-7


def option_margin(logprobs: Tensor, right: Tensor) -> Tensor:
    """Log-probability of the right option minus that of the best other; below 0 is wrong.

    Args:
        logprobs: ``[B, O]``, O ≥ 2.
        right: ``[B]`` index of the right option.
    """
    return _of(logprobs, right) - _others(logprobs, right).amax(1)


def option_gap(logprobs: Tensor, right: Tensor, target: Tensor) -> Tensor:
    """Log-probability of the right option minus that of the wanted one.

    Args:
        logprobs: ``[B, O]``.
        right: ``[B]`` index of the right option.
        target: ``[B]`` index of the wanted one.
    """
    return _of(logprobs, right) - _of(logprobs, target)


def dlr(logprobs: Tensor, right: Tensor) -> Tensor:
    """Difference of logits ratio, ``(z_y − max_{i≠y} z_i) / (z_π1 − z_π3)``, π the falling order.

    Croce & Hein, arXiv 2003.01690, eq. 6, negated: here it is minimised.

    Args:
        logprobs: ``[B, O]``, O ≥ 3: of two options the ratio is ±1 whatever they are.
        right: ``[B]`` index of the right option.
    """
    order = logprobs.sort(dim=1, descending=True).values
    return option_margin(logprobs, right) / (order[:, 0] - order[:, 2] + 1e-12)


def targeted_dlr(logprobs: Tensor, right: Tensor, target: Tensor) -> Tensor:
    """``(z_y − z_t) / (z_π1 − (z_π3 + z_π4) / 2)``: arXiv 2003.01690, eq. 7, negated.

    Args:
        logprobs: ``[B, O]``, O ≥ 4.
        right: ``[B]`` index y of the right option.
        target: ``[B]`` index t of the wanted one.
    """
    order = logprobs.sort(dim=1, descending=True).values
    spread = order[:, 0] - (order[:, 2] + order[:, 3]) / 2
    return option_gap(logprobs, right, target) / (spread + 1e-12)


def log_odds(logprob: Tensor) -> Tensor:
    """``log p − log(1 − p)`` of an answer's log-probability ``[B]``.

    Above 0 greedy decoding gives this answer for sure, since each of its tokens is then likelier
    than all others together.
    """
    return logprob - (-torch.expm1(logprob)).clamp_min(_TINY).log()


def _of(logprobs: Tensor, index: Tensor) -> Tensor:
    return logprobs.gather(1, index[:, None])[:, 0]


def _others(logprobs: Tensor, index: Tensor) -> Tensor:
    return logprobs.scatter(1, index[:, None], -torch.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What an attack wants of the answer.

    Attributes:
        path: ``full``, ``compressed`` (hard selection forward, sigmoid relaxation of the top-k
            backward), or ``both``: loss on the compressed path + `full_weight` × loss on the full.
        loss: ``ce``, mean log-likelihood of the answer's tokens; ``margin`` and ``dlr`` of the
            options.
        full_weight: see `path`.
        preserve_weight: weight of KL(clean ‖ attacked) of the answer on the full path, in nats.
    """

    path: Route = "full"
    loss: LossName = "ce"
    full_weight: float = 1.0
    preserve_weight: float = 0.0

    @property
    def end(self) -> End:
        """When a sample is broken: what `attacks.goal.Judge` is to look for."""
        if self.path == "compressed" and self.preserve_weight > 0:
            return "compression_only"
        return self.path

    def check(self, name: str) -> None:
        """Refuse what contradicts itself, on behalf of the attack of this name."""
        if self.preserve_weight > 0 and self.path != "compressed":
            raise AttackError(
                f"attack {name}: preserve_weight is {self.preserve_weight} with path "
                f"{self.path!r}; allowed: path 'compressed', because the full path cannot be "
                "attacked and preserved at once"
            )


class AnswerLoss:
    """The loss of an `Aim` on one batch: ``(images, step) -> [B]``.

    Samples without a target have their right answer made less likely; samples with one have the
    target made more likely. Options of a sample are compared among themselves; a sample without
    options (an open question) has the log-odds of its right answer for a margin. Where a sample
    has too few options for `dlr` (three, with a target four) it gets the margin, which is noted.

    Args:
        view: the target.
        batch: clean samples.
        aim: what is wanted.
        targets: of each sample the wanted answer, or None; with ``margin`` and ``dlr`` one of its
            options.
        watched: also say in `hold` how firmly right answers hold. With ``ce`` this takes a forward
            pass, in which the answers' tokens are counted.

    Attributes:
        hold: detached ``[B]``, of the last images and the path that is to fail, of two the firmer:
            the margin of the right option, or the log-odds of the right answer; with a target and
            ``ce`` minus the log-odds of the target. Only below 0 can an answer be wrong, except
            with a target. None unless `watched`.

    Raises:
        AttackError: the right answer or a target is not among a sample's options.
    """

    def __init__(
        self,
        view: WhiteBoxView,
        batch: Batch,
        aim: Aim,
        targets: Sequence[str | None] | None = None,
        *,
        watched: bool = False,
    ) -> None:
        self.view, self.batch, self.aim, self.watched = view, batch, aim, watched
        self.targets = tuple(targets) if targets is not None else (None,) * len(batch.ids)
        self.notes: list[str] = []
        self.hold: Tensor | None = None
        both: dict[Path, float] = {"compressed": 1.0, "full": aim.full_weight}
        self._weights = both if aim.path == "both" else {aim.path: 1.0}
        self._lengths = self._count_tokens()
        self._arrange()
        self._clean = None
        if aim.preserve_weight > 0:
            with torch.no_grad():
                self._clean, _ = view.answer_logprobs(batch.images, batch.questions, batch.answers)

    def __call__(self, images: Tensor, step: int) -> Tensor:
        """The loss ``[B]`` of images ``[B, 3, H, W]``, the same at every step."""
        del step
        total = torch.zeros(len(images), device=images.device)
        holds = []
        for path, weight in self._weights.items():
            found = [part.loss(images, path) for part in self._parts]
            total = total + weight * torch.cat([loss for loss, _ in found])[self._order]
            holds.append(torch.cat([hold for _, hold in found])[self._order])
        if self.watched:
            self.hold = torch.stack(holds).amax(0)
        if self._clean is not None:
            logprobs, positions = self.view.answer_logprobs(
                images, self.batch.questions, self.batch.answers
            )
            # Some of the samples may have shorter answers than all of them had.
            clean = self._clean[:, : logprobs.shape[1]]
            drift = answer_divergence(clean, logprobs, positions)
            total = total + self.aim.preserve_weight * drift
        return total

    def of(self, rows: Sequence[int]) -> AnswerLoss:
        """The loss of some of its samples; takes no pass."""
        places = list(rows)
        some = copy.copy(self)
        some.batch = self.batch.rows(places)
        some.targets = tuple(self.targets[row] for row in places)
        some._lengths = self._lengths[places]
        some._clean = None if self._clean is None else self._clean[places]
        some.hold = None if self.hold is None else self.hold[places]
        some._arrange()
        return some

    def _arrange(self) -> None:
        """Put samples whose loss is computed together into parts."""
        self._parts = [self._likelihood()] if self.aim.loss == "ce" else list(self._compared())
        rows = torch.tensor([row for part in self._parts for row in part.rows])
        self._order = rows.argsort().to(self.batch.images.device)

    @property
    def _texts(self) -> tuple[str, ...]:
        """What is made likelier or less likely: the target, or the right answer."""
        pairs = zip(self.targets, self.batch.answers, strict=True)
        return tuple(answer if target is None else target for target, answer in pairs)

    def _count_tokens(self) -> Tensor:
        """Tokens of each text ``[B]``, end token included; 0 where a mean is no sum anyway."""
        batch = self.batch
        lengths = torch.zeros(len(batch.ids), dtype=torch.long, device=batch.images.device)
        rows = list(range(len(batch.ids))) if self.watched else []
        if self.aim.loss != "ce":
            counts = by_count(batch, range(len(batch.ids)))
            rows = sorted(row for count, some in counts.items() if count < 2 for row in some)
        if rows:
            some, texts = batch.rows(rows), tuple(self._texts[row] for row in rows)
            with torch.no_grad():
                _, real = self.view.answer_logprobs(some.images, some.questions, texts)
            lengths[rows] = real.sum(1).to(lengths)
        return lengths

    def _likelihood(self) -> _Part:
        """Log-likelihood of right answers, negative log-likelihood of targets."""
        batch, view, texts = self.batch, self.view, self._texts
        signs = torch.tensor([-1.0 if target is None else 1.0 for target in self.targets])
        signs = signs.to(batch.images.device)

        def loss(images: Tensor, path: Path) -> tuple[Tensor, Tensor]:
            through = path == "compressed"
            nll = view.answer_nll(
                images, batch.questions, texts, path=path, straight_through=through
            )
            odds = log_odds(-nll.detach() * self._lengths) if self.watched else nll.detach()
            return signs * nll, -signs * odds

        return _Part(tuple(range(len(batch.ids))), loss)

    def _compared(self) -> list[_Part]:
        """Margins and ratios of options, samples with as many options together."""
        parts = []
        aimed = [target is not None for target in self.targets]
        every = [
            (count, targeted, [row for row in rows if aimed[row] == targeted])
            for count, rows in by_count(self.batch, range(len(aimed))).items()
            for targeted in (False, True)
        ]
        for count, targeted, rows in every:
            if not rows:
                continue
            if count < 2:
                parts.append(self._odds(rows))
                continue
            ratio = self.aim.loss == "dlr" and count >= (4 if targeted else 3)
            if self.aim.loss == "dlr" and not ratio:
                self._note(
                    "dlr needs 3 options, 4 with a target; samples with fewer got the margin"
                )
            parts.append(self._options(rows, targeted, ratio))
        return parts

    def _options(self, rows: Sequence[int], targeted: bool, ratio: bool) -> _Part:
        batch, view = self.batch.rows(rows), self.view
        options = batch.options or ()
        right = right_options(batch).to(batch.images.device)
        wanted = [self.targets[row] for row in rows]
        target = _places(batch, wanted).to(right) if targeted else None

        def loss(images: Tensor, path: Path) -> tuple[Tensor, Tensor]:
            scores = view.option_logprobs(
                _select(images, rows),
                batch.questions,
                options,
                path=path,
                straight_through=path == "compressed",
            )
            hold = option_margin(scores.detach(), right)
            if target is not None:
                return (targeted_dlr if ratio else option_gap)(scores, right, target), hold
            return (dlr if ratio else option_margin)(scores, right), hold

        return _Part(tuple(rows), loss)

    def _odds(self, rows: Sequence[int]) -> _Part:
        """Log-odds of right answers; the number of their tokens makes a sum of the mean."""
        batch, view = self.batch.rows(rows), self.view
        lengths = self._lengths[list(rows)]

        def loss(images: Tensor, path: Path) -> tuple[Tensor, Tensor]:
            nll = view.answer_nll(
                _select(images, rows),
                batch.questions,
                batch.answers,
                path=path,
                straight_through=path == "compressed",
            )
            odds = log_odds(-nll * lengths)
            return odds, odds.detach()

        return _Part(tuple(rows), loss)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


@dataclass(frozen=True, slots=True)
class _Part:
    """Samples whose loss is computed together."""

    rows: tuple[int, ...]
    loss: Callable[[Tensor, Path], tuple[Tensor, Tensor]]
    """Images of the whole batch -> loss and, detached, `AnswerLoss.hold`, ``[rows]`` each."""


def right_options(batch: Batch) -> Tensor:
    """Index of each sample's right answer among its options, ``[B]``.

    Raises:
        AttackError: it is not among them.
    """
    return _places(batch, batch.answers)


def wrong_options(
    view: WhiteBoxView, batch: Batch, path: Route, most: int
) -> tuple[tuple[str, ...], ...]:
    """Up to `most` wrong options of each sample, the likeliest on the clean image first.

    Asked on the compressed path where `path` has one. Open questions have none.
    """
    found: list[tuple[str, ...]] = [()] * len(batch.ids)
    for count, rows in by_count(batch, range(len(batch.ids))).items():
        if count < 2:
            continue
        some = batch.rows(rows)
        with torch.no_grad():
            scores = view.option_logprobs(
                some.images,
                some.questions,
                some.options or (),
                path="full" if path == "full" else "compressed",
            )
        right = right_options(some).to(scores.device)
        order = _others(scores, right).argsort(dim=1, descending=True, stable=True)[:, : count - 1]
        for row, options, places in zip(rows, some.options or (), order.tolist(), strict=True):
            found[row] = tuple(options[place] for place in places[:most])
    return tuple(found)


def choose_targets(
    view: WhiteBoxView, batch: Batch, target: str | None, path: Route
) -> tuple[tuple[str | None, ...], tuple[str, ...]]:
    """What each sample is to be answered with (None: anything but the right answer), and notes.

    Args:
        view: the target.
        batch: clean samples.
        target: None; ``option`` for each sample's likeliest wrong option on the clean image; or
            the text itself. A sample that has no options, or of which the text is the right
            answer, is attacked without a target.
        path: asked for the likeliest option.
    """
    nothing: tuple[str | None, ...] = (None,) * len(batch.ids)
    if target is None:
        return nothing, ()
    if target == "option":
        wrong = wrong_options(view, batch, path, 1)
        found = tuple(one[0] if one else None for one in wrong)
        why = "questions without options have no wrong one to aim at; they were attacked untargeted"
    else:
        right = batch.right([target] * len(batch.ids))
        found = tuple(None if so else target for so in right)
        why = f"{target!r} is the right answer to some samples; they were attacked untargeted"
    return found, (why,) if None in found else ()


def by_count(batch: Batch, rows: Iterable[int]) -> dict[int, list[int]]:
    """Some rows of a batch by their number of options, 0 for an open question.

    A view scores samples together if they have as many options.
    """
    found: dict[int, list[int]] = {}
    for row in rows:
        count = 0 if batch.options is None else len(batch.options[row])
        found.setdefault(count, []).append(row)
    return found


def _places(batch: Batch, texts: Sequence[str | None]) -> Tensor:
    """Index of a text among each sample's options, but for case and surrounding space."""
    found = []
    for name, options, text in zip(batch.ids, batch.options or (), texts, strict=True):
        plain = [option.strip().lower() for option in options]
        wanted = (text or "").strip().lower()
        if wanted not in plain:
            raise AttackError(
                f"sample {name}: the answer {text!r} is not among the options "
                f"{', '.join(map(repr, options))}; a data set that offers options lists it there",
                sample_ids=(name,),
            )
        found.append(plain.index(wanted))
    return torch.tensor(found)


def _select(images: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a batch; the batch itself where they are all of it, in order."""
    return images if len(rows) == len(images) else images[list(rows)]
