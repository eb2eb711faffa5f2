"""``redteam measure``: what each compression of a scenario gives and costs on clean data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from redteam import provenance
from redteam.batching import Batcher
from redteam.datasets.base import Samples
from redteam.datasets.filters import without
from redteam.diagnosis import Bools
from redteam.errors import InterruptedRun, NothingSelected, PlanError
from redteam.evaluation import Asker, Reply, Shot, of_one_size
from redteam.labels import short
from redteam.scenario import Method, Scenario
from redteam.screening import UNDEFENDED, described, filter_of, screen
from redteam.tally import Pairs, Tally, kept_of
from reports.html.measurement import write as write_page
from reports.measurement import FILE as RECORD
from reports.measurement import (
    Evidence,
    Measurement,
    Speed,
    Vanishing,
    write,
)
from targets.errors import TargetError

if TYPE_CHECKING:
    from targets.lvlm import LVLM
    from targets.pace import Pace

BLOCK: Final = 256
"""Samples held in memory at a time."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure besides accuracy.

    Attributes:
        retentions: budgets every compression is tried at; () for its own.
        repeats: timed batches of each setting; 0 for no timing.
        steps: decoding steps timed.
        evidence: samples whose evidence map is made.
        layers: layers evidence maps are made at.
        horizon: samples the horizon is looked for with; 0 for none.
    """

    retentions: tuple[float, ...] = ()
    repeats: int = 3
    steps: int = 8
    evidence: int = 0
    layers: tuple[int, ...] = (0,)
    horizon: int = 0


def folder_of(scenario: Scenario) -> Path:
    """``runs/measure-<name>-<time>``, time in UTC."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"measure-{scenario.name}-{stamp}"


def sweep(compressions: Sequence[Method], retentions: Sequence[float]) -> list[Method]:
    """Each compression at each budget; those without `retention` as they are.

    Args:
        compressions: of the scenario.
        retentions: kept ÷ all, in (0, 1]; empty leaves all as they are.
    """
    if not retentions:
        return list(compressions)
    found: dict[str, Method] = {}
    for one in compressions:
        if "retention" not in one.options:
            found.setdefault(one.label, one)
            continue
        for share in retentions:
            options = {**one.options, "retention": share, "keep_tokens": None}
            made = replace(one, options=options, label=short(one.kind, one.type, options))
            found.setdefault(made.label, made)
    return list(found.values())


def measure(
    scenario: Scenario, folder: Path, wanted: Wanted, say: Callable[[str, float], None]
) -> Measurement:
    """Measure a scenario's compressions on its clean data, and write what was found.

    Args:
        scenario: checked; its attacks, defences and gates are not used.
        folder: receives `measurement.json`.
        wanted: what to measure.
        say: told what is being done, and how much of all is done.

    Raises:
        RedteamError: if a target or the data set cannot be used.
    """
    from targets.costs import FORMULA
    from targets.loading import resolve_device

    samples = scenario.dataset.create().open()
    if not len(samples):
        raise NothingSelected(str(scenario.dataset.problem("the data set holds no sample")))
    try:
        device = str(resolve_device(scenario.engine.device))
    except TargetError as error:
        raise PlanError(f"engine.device: {error}") from error
    _claim(folder)
    compressions = sweep(scenario.compressions, wanted.retentions)
    identity: dict[str, Any] = {}
    samples, left_out = _screened(scenario, samples, device)
    found = Measurement(
        name=scenario.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=scenario.seed,
        data=samples.identity,
        formula=FORMULA,
        provenance=provenance.collect(
            provenance.hardware(device), identity, scenario.engine.model_dump(exclude={"address"})
        )
        | left_out,
        settings=[],
    )
    try:
        for number, target in enumerate(scenario.targets):
            asker = _open(scenario, target, device)
            identity[target.label] = dict(asker.model.identity)
            share = (number / len(scenario.targets), 1 / len(scenario.targets))
            one = _Target(asker, target.label, samples, wanted, found, say, share)
            one.measure(compressions, lambda: _write(folder, found))
    except KeyboardInterrupt:
        if found.settings:
            _write(folder, found, page=True)
        raise InterruptedRun(
            f"stopped; {len(found.settings)} settings that were measured are in {folder}"
        ) from None
    _write(folder, found, page=True)
    return found


def _claim(folder: Path) -> None:
    """Make the folder; what it holds already is never written over.

    Raises:
        PlanError: if it holds a measurement or a run, or cannot be made.
    """
    taken = [name for name in (RECORD, "ledger.jsonl") if (folder / name).exists()]
    if taken:
        raise PlanError(f"{folder} holds {taken[0]} already; give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"{folder} cannot be made: {error.strerror}; give another --out") from error


def _write(folder: Path, found: Measurement, *, page: bool = False) -> None:
    """Write what is known so far.

    Raises:
        PlanError: if the disk refuses; what was written before stays.
    """
    try:
        write(folder, found)
        if page and found.settings:
            write_page(folder, found)
    except OSError as error:
        raise PlanError(
            f"{folder} cannot be written to: {error.strerror}; free space or give another --out"
        ) from error


def _open(scenario: Scenario, target: Method, device: str) -> Asker:
    try:
        model = target.create().load(device)
    except TargetError as error:
        raise PlanError(str(target.problem(str(error)))) from error
    limit = scenario.answers.max_new_tokens
    return Asker(model, Batcher(scenario.engine.block), scenario.seed, limit)


def _screened(scenario: Scenario, samples: Samples, device: str) -> tuple[Samples, dict[str, Any]]:
    """The samples the data set's filter keeps, and what is said of those it leaves out."""
    rule = filter_of(scenario.dataset)
    if rule is None:
        return samples, {}
    left_out: dict[str, str] = {}
    for target in scenario.targets:
        asker = _open(scenario, target, device)
        left_out |= screen(asker, samples, rule, scenario.engine.block)
    if len(left_out) == len(samples):
        raise NothingSelected(str(scenario.dataset.problem(f"filter {rule} leaves no sample")))
    return without(samples, left_out), {"filter": described(rule, len(samples), left_out)}


@dataclass(frozen=True, slots=True)
class _Target:
    """Measures one loaded target."""

    asker: Asker
    label: str
    samples: Samples
    wanted: Wanted
    found: Measurement
    say: Callable[[str, float], None]
    share: tuple[float, float]

    def measure(self, compressions: Sequence[Method], save: Callable[[], None]) -> None:
        """Ask all settings about one block of samples after the other."""
        settings: list[Method | None] = [None, *compressions]
        tallies = [Tally(self.label, one.label if one else "", _method(one)) for one in settings]
        pairs, first = Pairs(), len(self.found.settings)
        overlaps = len(self.found.overlaps)
        speeds: list[Speed | None] = [None] * len(settings)
        for start in range(0, len(self.samples), BLOCK):
            shots = self._read(start, tallies)
            full = self._replies(shots, None)
            kept: dict[str, dict[int, Bools]] = {}
            for number, (one, tally) in enumerate(zip(settings, tallies, strict=True)):
                self._say(one.label if one else "all tokens", start, number / len(settings))
                replies = full if one is None else self._replies(shots, one)
                tally.add(self.asker, shots, replies)
                tally.compare(replies, full)
                if one is not None:
                    kept[one.label] = kept_of(replies)
                if start == 0:
                    speeds[number] = self._speed_of(one, shots, replies)
            pairs.add(kept)
            self.found.settings[first:] = [
                tally.setting().model_copy(update={"speed": speed})
                for tally, speed in zip(tallies, speeds, strict=True)
            ]
            self.found.overlaps[overlaps:] = pairs.overlaps(self.label)
            save()
        self._say("evidence", len(self.samples), 0)
        self._evidence(self._read(0, []))

    def _read(self, start: int, tallies: Sequence[Tally]) -> dict[int, Shot]:
        """A block of samples; one that cannot be read is an error of every setting."""
        shots = {}
        for index in range(start, min(start + BLOCK, len(self.samples))):
            try:
                sample = self.samples[index]
            except Exception as error:
                # A picture that cannot be read is this sample's trouble only.
                for tally in tallies:
                    tally.fail(provenance.scrub(f"{self.samples.ids[index]}: {error}"))
                continue
            shots[index] = Shot(sample, sample.image, "")
        return shots

    def _say(self, what: str, start: int, share: float) -> None:
        begin, width = self.share
        done = (start + share * min(BLOCK, len(self.samples) - start)) / len(self.samples)
        self.say(f"{self.label}: {what}", begin + width * done)

    def _replies(self, shots: Mapping[int, Shot], one: Method | None) -> dict[int, Any]:
        return self.asker.ask(shots, one, UNDEFENDED, "clean")

    def _speed_of(
        self, one: Method | None, shots: Mapping[int, Shot], replies: Mapping[int, Any]
    ) -> Speed | None:
        """Timed on one batch of pictures of one size that could be answered."""
        ready = {i: shots[i] for i, reply in replies.items() if isinstance(reply, Reply)}
        if not self.wanted.repeats or not ready:
            return None
        indices = of_one_size(ready)[0][: self.asker.batcher.size]
        batch = [shots[index] for index in indices]
        images = self.asker.images(batch)
        questions = [shot.sample.question for shot in batch]
        compressor = None if one is None else self.asker.instance(one)

        def once() -> Pace:
            model: LVLM = self.asker.model
            return model.measure(images, questions, compressor=compressor, steps=self.wanted.steps)

        once()  # the first run allocates and compiles
        return _speed([once() for _ in range(self.wanted.repeats)])

    def _evidence(self, shots: Mapping[int, Shot]) -> None:
        from targets.evidence import evidence_map, find_horizon

        model, size = self.asker.model, self.asker.batcher.size
        for shot in list(shots.values())[: self.wanted.evidence]:
            for layer in self.wanted.layers:
                one = evidence_map(
                    model,
                    self.asker.images([shot]),
                    shot.sample.question,
                    shot.sample.answer,
                    layer=layer,
                    batch=size,
                )
                self.found.evidence.append(
                    Evidence(
                        target=self.label,
                        sample=shot.sample.id,
                        question=shot.sample.question,
                        answer=shot.sample.answer,
                        layer=layer,
                        grid=self.asker.places(shot).grid,
                        full=one.full,
                        none=one.none,
                        only=one.only.double().cpu().numpy().round(5).tolist(),
                        without=one.without.double().cpu().numpy().round(5).tolist(),
                    )
                )
        if not self.wanted.horizon:
            return
        chosen = dict(list(shots.items())[: self.wanted.horizon])
        batches = []
        for indices in of_one_size(chosen):
            for start in range(0, len(indices), size):
                part = [chosen[index] for index in indices[start : start + size]]
                batches.append(
                    (
                        self.asker.images(part),
                        [shot.sample.question for shot in part],
                        [shot.sample.answer for shot in part],
                    )
                )
        found = find_horizon(model, batches)
        self.found.horizons.append(
            Vanishing(
                target=self.label,
                loss=[round(value, 6) for value in found.loss],
                layer=found.layer,
                tolerance=found.tolerance,
                n=found.samples,
            )
        )


def _method(one: Method | None) -> str:
    """What a compression is called without its budget."""
    if one is None:
        return ""
    options = {k: None if k in ("retention", "keep_tokens") else v for k, v in one.options.items()}
    name = short(one.kind, one.type, options)
    return name if one.label.startswith(name) else one.label


def _speed(runs: Sequence[Pace]) -> Speed:
    rows = runs[0].rows

    def middle(name: str) -> float:
        return 1000 * float(statistics.median(getattr(run, name) for run in runs))

    return Speed(
        rows=rows,
        prefill_ms=round(middle("prefill_seconds") / rows, 4),
        ranking_ms=round(middle("ranking_seconds") / rows, 4),
        decode_ms=round(middle("decode_seconds") / rows, 4),
        macs=runs[0].macs / rows,
        cache_bytes=runs[0].cache_bytes / rows,
        lengths=list(runs[0].lengths),
        visual=list(runs[0].visual),
    )
