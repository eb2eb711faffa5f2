"""Calibrate detectors on clean samples that are not tested, once, and keep what was found.

A detector that learns does so on one half of the pictures; the other half sets its thresholds. One
that does not sets them on all. What was found is written into the run folder before the first trial
it is used in, and a resumed run reads it from there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from redteam.batching import Failure
from redteam.datasets.base import Sample, Samples, is_correct
from redteam.datasets.closed import closed_answers
from redteam.errors import NothingSelected, PlanError
from redteam.evaluation import Asker, Shot, good
from redteam.pictures import to_pixels
from redteam.plan import seed_of
from redteam.scenario import Method, Scenario
from reports.detection import key_of, threshold
from reports.records import Calibration
from targets.base import Batch

if TYPE_CHECKING:
    from attacks.base import Attack
    from defenses.detector import Detector, Observation, State
    from redteam.engines.base import Vault
    from targets.compression.base import Compressor

_MOST_FAILED: Final = 0.1
"""Share of calibration samples that may fail before the rest is no sample of traffic any more."""


@dataclass(frozen=True, slots=True)
class Watching:
    """A detector ready to watch a compression of a target.

    Attributes:
        detector: it.
        state: what it has learnt.
        record: what it was calibrated with.
    """

    detector: Detector
    state: State
    record: Calibration


@dataclass(frozen=True, slots=True)
class Watched:
    """The score of one picture, and the seconds that took: an equal share of its batch.

    Attributes:
        score: higher is more suspicious.
        seconds: of scoring it.
        limit: threshold above which it is flagged, at a false-positive rate of `AIM`; None while
            the detector is being calibrated.
    """

    score: float
    seconds: float
    limit: float | None = None


def open_calibration(scenario: Scenario, samples: Samples) -> Samples | None:
    """The clean samples for detectors; None if the scenario names none.

    Args:
        scenario: checked.
        samples: those that are tested.

    Raises:
        NothingSelected: if there is no sample.
        PlanError: if a sample, or a picture, is also tested.
        DatasetError: if they cannot be read.
    """
    if scenario.calibration is None:
        return None
    found: Samples = scenario.calibration.create().open()
    if not len(found):
        raise NothingSelected(str(scenario.calibration.problem("the data set holds no sample")))
    common = sorted(set(found.ids) & set(samples.ids))
    if common:
        shown = ", ".join(common[:3]) + (" …" if len(common) > 3 else "")
        message = (
            f"{len(common)} of {len(found)} samples are also in `dataset` ({shown}); a threshold "
            "set on tested samples says nothing. Take another split, or another `start`"
        )
        raise PlanError(str(scenario.calibration.problem(message)))
    tested = set(_pictures(samples).values())
    twice = sorted(name for name, digest in _pictures(found).items() if digest in tested)
    if twice:
        message = (
            f"the pictures of {len(twice)} samples are also in `dataset` (first: {twice[0]}); "
            "a threshold set on tested pictures says nothing"
        )
        raise PlanError(str(scenario.calibration.problem(message)))
    return found


def _pictures(samples: Samples) -> dict[str, str]:
    """Content hash of each picture by sample; those that cannot be read are left out."""
    found = {}
    for index, name in enumerate(samples.ids):
        try:
            image = samples[index].image
        except Exception:  # noqa: S112 - whoever uses it records why it cannot be read
            continue
        found[name] = hashlib.sha256(str(image.shape).encode() + image.tobytes()).hexdigest()
    return found


class Calibrator:
    """Gives detectors what they need to know of clean traffic.

    Args:
        scenario: they are listed in.
        samples: clean, none of them tested; None without detectors.
        warn: told what a reader should know, once each.
    """

    def __init__(
        self, scenario: Scenario, samples: Samples | None, warn: Callable[[str], None]
    ) -> None:
        self._scenario, self._samples, self._warn = scenario, samples, warn
        self._found: dict[str, Watching] = {}
        self._shots: dict[int, Shot] | None = None

    @property
    def identity(self) -> str | None:
        """Hash of the samples."""
        return None if self._samples is None else self._samples.identity

    def watching(
        self, asker: Asker, target: Method, compression: Method, defense: Method, store: Vault
    ) -> Watching:
        """A detector as it watches a compression, calibrated now or by an earlier start of the run.

        Raises:
            PlanError: if it cannot be calibrated.
        """
        key = key_of(target.label, compression.label, defense.label)
        if key not in self._found:
            detector: Detector = asker.instance(defense)
            record = next((one for one in store.calibrations() if _key(one) == key), None)
            if record is not None:
                state = {} if record.state is None else _loaded(store.state(record.state))
                self._found[key] = Watching(detector, state, record)
            else:
                self._found[key] = self._calibrated(asker, target, compression, defense, store)
        return self._found[key]

    def _calibrated(
        self, asker: Asker, target: Method, compression: Method, defense: Method, store: Vault
    ) -> Watching:
        from defenses.base import DefenseError

        where = f"calibrating {defense.label} on {target.label}, {compression.label}"
        detector: Detector = asker.instance(defense)
        shots = self._opened()
        taught, judged = _halves(shots) if detector.learns else ({}, shots)
        try:
            state = _Lesson(asker, compression, defense, self._scenario.seed, where).learn(taught)
            watching = Watching(detector, state, _blank(target, compression, defense))
            scores = watch(asker, watching, compression, defense, judged, where)
        except DefenseError as error:
            raise PlanError(str(defense.problem(str(error)))) from error
        self._complete(defense, scores, where)
        measured = {index: one.score for index, one in good(scores).items()}
        cost = detector.cost(_full(asker, compression, next(iter(shots.values()))))
        record = watching.record.model_copy(
            update={
                "samples": [judged[index].sample.id for index in measured],
                "scores": list(measured.values()),
                "learnt_from": [shot.sample.id for shot in taught.values()],
                "language": round(cost.language, 6),
                "tower": round(cost.tower, 6),
                "share": float(getattr(detector, "share", 0.0)),
                "data": self.identity or "",
            }
        )
        kept = store.save_calibration(record, _saved(state) if detector.learns else None)
        return replace(watching, record=kept)

    def _opened(self) -> dict[int, Shot]:
        """The samples with their pictures; one that cannot be read is left out, and said."""
        if self._samples is None:
            raise PlanError("a detector is to be calibrated, and the scenario has no `calibration`")
        if self._shots is None:
            self._shots = {}
            for index, name in enumerate(self._samples.ids):
                try:
                    sample = self._samples[index]
                except Exception as error:
                    self._warn(f"calibration sample {name} cannot be read: {error}")
                    continue
                self._shots[index] = Shot(sample, sample.image, "")
        return self._shots

    def _complete(self, defense: Method, scores: Mapping[int, Any], where: str) -> None:
        """Refuse to set a threshold on what is left of a failed calibration."""
        failed = [one for one in scores.values() if isinstance(one, Failure)]
        if len(failed) > _MOST_FAILED * len(scores) or len(failed) == len(scores):
            why = failed[0].error.message if failed else "there is no sample left to judge"
            message = f"{len(failed)} of {len(scores)} calibration samples failed; first: {why}"
            raise PlanError(str(defense.problem(message)))
        if failed:
            first = failed[0].error.message
            self._warn(f"{where}: {len(failed)} samples left out, first: {first}")


def watch(
    asker: Asker,
    watching: Watching,
    compression: Method,
    defense: Method,
    shots: Mapping[int, Shot],
    where: str,
) -> dict[int, Watched | Failure]:
    """Score pictures, as deployed: no gradient, and each sample by its own seed."""
    import torch

    limit = threshold(watching.record.scores, AIM)

    def score(indices: Sequence[int]) -> list[Watched]:
        started = time.perf_counter()
        traffic = asker.traffic([shots[index] for index in indices], compression, defense)
        with torch.no_grad():
            found = watching.detector.score(traffic, watching.state).tolist()
        seconds = (time.perf_counter() - started) / len(indices)
        return [Watched(value, seconds, limit) for value in found]

    return asker.each(shots, score, where)


AIM: Final = 0.05
"""False-positive rate of the threshold that an adaptive attack stays under; under it, it stays
under that of any lower rate too."""


def evading(asker: Asker, watching: Watching, compression: Method, attack: Attack) -> Attack:
    """An attack on a detector (`attacks.evade`, `attacks.raise_alarm`), told all there is to know.

    Args:
        asker: of the target.
        watching: the detector, calibrated.
        compression: that it watches.
        attack: planned, without a detector yet.

    Raises:
        PlanError: if the detector has no threshold.
    """
    import numpy as np

    from attacks.evade import Evade
    from attacks.raise_alarm import RaiseAlarm
    from defenses.detector import Traffic
    from defenses.selection import drawn

    limit = threshold(watching.record.scores, AIM)
    if limit is None or not isinstance(attack, Evade | RaiseAlarm):
        raise PlanError(f"{watching.record.detector} has no threshold that could be evaded")
    detector, compressor = watching.detector.watchful, asker.instance(compression)

    def suspicion(images: Tensor, questions: tuple[str, ...], draw: int) -> Tensor:
        seeds = (drawn("evade", draw),) * len(images)
        traffic = Traffic(asker.model, compressor, images, questions, seeds, relax=True)
        return detector.score(traffic, watching.state)

    spread = float(np.std(watching.record.scores))
    scale = max(spread, abs(limit) * 1e-3, 1e-6)
    if isinstance(attack, RaiseAlarm):
        return replace(attack, suspicion=suspicion, limit=limit, scale=scale)
    return replace(attack, suspicion=suspicion, limit=limit, scale=scale, margin=0.1 * scale)


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What a detector is shown before it watches."""

    asker: Asker
    compression: Method
    defense: Method
    seed: int
    where: str

    def learn(self, shots: Mapping[int, Shot]) -> State:
        """Observations of clean pictures, and of these with noise and attacked if it wants them."""
        detector: Detector = self.asker.instance(self.defense)
        if not detector.learns:
            return {}
        noisy: Mapping[str, Tensor] = {}
        attacked: Mapping[str, Tensor] = {}
        if detector.contrasts:
            noisy = self._observed(self._attacked(shots, "noise"))
            attacked = self._observed(self._attacked(shots, detector.reference))  # type: ignore[attr-defined]
        return detector.fit(self._observed(shots), noisy, attacked)

    def _observed(self, shots: Mapping[int, Shot]) -> Observation:
        import torch

        from defenses.detector import stacked

        detector: Detector = self.asker.instance(self.defense)

        def observe(indices: Sequence[int]) -> list[dict[str, Tensor]]:
            chosen = [shots[index] for index in indices]
            traffic = self.asker.traffic(chosen, self.compression, self.defense)
            with torch.no_grad():
                found = detector.observe(traffic)
            return [
                {name: one[row : row + 1].cpu() for name, one in found.items()}
                for row in range(len(indices))
            ]

        rows = good(self.asker.each(shots, observe, self.where))
        return stacked([rows[index] for index in sorted(rows)])

    def _attacked(self, shots: Mapping[int, Shot], name: str) -> dict[int, Shot]:
        """References: calibration pictures attacked, with the attack's own defaults."""
        from redteam.catalog import find, load

        attack: Attack = load(find("attacks", name))()
        epsilon = float(self.asker.instance(self.defense).reference_epsilon)

        def make(indices: Sequence[int]) -> list[Any]:
            chosen = [shots[index] for index in indices]
            samples = [shot.sample for shot in chosen]
            known: Compressor | None = None
            if attack.knows_compression:
                known = self.asker.instance(self.compression)
            view = self.asker.model.view(
                attack.needs, known, max_new_tokens=self.asker.max_new_tokens
            )
            seeds = [seed_of(self.seed, f"reference/{name}", one.id) for one in samples]
            found = attack(view, batch_of(samples, self.asker.images(chosen)), epsilon, seeds)
            return list(to_pixels(found.images))

        made = good(self.asker.each(shots, make, f"{self.where}, references by {name}"))
        return {index: replace(shots[index], pixels=pixels) for index, pixels in made.items()}


def batch_of(samples: Sequence[Sample], images: Tensor) -> Batch:
    """Samples as attacks get them."""
    return Batch(
        ids=tuple(sample.id for sample in samples),
        images=images,
        questions=tuple(sample.question for sample in samples),
        answers=tuple(sample.answer for sample in samples),
        options=tuple(map(closed_answers, samples)),
        judges=tuple(partial(is_correct, sample=sample) for sample in samples),
    )


def _halves(shots: Mapping[int, Shot]) -> tuple[dict[int, Shot], dict[int, Shot]]:
    """Every other picture with all its questions: to learn from, to set thresholds on."""
    pictures = list(dict.fromkeys(shot.sample.image_id for shot in shots.values()))
    first = set(pictures[::2])
    taught = {index: one for index, one in shots.items() if one.sample.image_id in first}
    return taught, {index: one for index, one in shots.items() if index not in taught}


def _full(asker: Asker, compression: Method, shot: Shot) -> float:
    """Prefill with all tokens in units of a compressed one, in multiply-accumulates."""
    images, questions = asker.images([shot]), [shot.sample.question]
    compressor = asker.instance(compression)
    macs = [
        asker.model.measure(images, questions, compressor=one, steps=1).macs
        for one in (None, compressor)
    ]
    return macs[0] / max(1, macs[1])


def _blank(target: Method, compression: Method, defense: Method) -> Calibration:
    return Calibration(
        target=target.label,
        compression=compression.label,
        detector=defense.label,
        samples=[],
        scores=[],
    )


def _key(record: Calibration) -> str:
    return key_of(record.target, record.compression, record.detector)


def _saved(state: State) -> bytes:
    from safetensors.torch import save

    return save({name: one.detach().cpu().contiguous() for name, one in state.items()})


def _loaded(data: bytes) -> State:
    from safetensors.torch import load

    found: dict[str, Tensor] = load(data)
    return found
