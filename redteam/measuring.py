"""``redteam measure``: what each compression of a scenario gives and costs on clean data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from redteam import provenance
from redteam.batching import Batcher, Failure
from redteam.datasets.base import Samples
from redteam.datasets.scoring import scored, summarise
from redteam.diagnosis import Bools, jaccard
from redteam.errors import NothingSelected, PlanError
from redteam.evaluation import Asker, Reply, Shot, of_one_size
from redteam.labels import short
from redteam.scenario import Method, Scenario
from reports.html.measurement import write as write_page
from reports.measurement import (
    Evidence,
    Measurement,
    Overlap,
    Setting,
    Speed,
    Vanishing,
    write,
)
from targets.errors import TargetError

if TYPE_CHECKING:
    from targets.lvlm import LVLM
    from targets.pace import Pace

UNDEFENDED = Method("defenses", "none", "none", {})


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
    folder.mkdir(parents=True, exist_ok=True)
    compressions = sweep(scenario.compressions, wanted.retentions)
    identity: dict[str, Any] = {}
    found = Measurement(
        name=scenario.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=scenario.seed,
        data=samples.identity,
        formula=FORMULA,
        provenance=provenance.collect(device, identity, scenario.engine.model_dump()),
        settings=[],
    )
    for number, target in enumerate(scenario.targets):
        try:
            model = target.create().load(device)
        except TargetError as error:
            raise PlanError(str(target.problem(str(error)))) from error
        identity[target.label] = dict(model.identity)
        asker = Asker(model, Batcher(scenario.engine.batch_size), scenario.seed)
        share = (number / len(scenario.targets), 1 / len(scenario.targets))
        _Target(asker, target.label, samples, wanted, found, say, share).measure(compressions)
        write(folder, found)
    write_page(folder, found)
    return found


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

    def measure(self, compressions: Sequence[Method]) -> None:
        shots = {index: Shot(sample, sample.image, "") for index, sample in enumerate(self.samples)}
        kept: dict[str, dict[int, Bools]] = {}
        full = self._replies(shots, None)
        for number, one in enumerate([None, *compressions]):
            label = one.label if one else "all tokens"
            self._say(label, number / (len(compressions) + 2))
            replies = full if one is None else self._replies(shots, one)
            setting = self._setting(one, shots, replies, full)
            self.found.settings.append(self._timed(setting, one, shots))
            if one is not None:
                kept[one.label] = _kept(replies)
        self.found.overlaps.extend(self._overlaps(kept))
        self._say("evidence", (len(compressions) + 1) / (len(compressions) + 2))
        self._evidence(shots)

    def _say(self, what: str, done: float) -> None:
        start, width = self.share
        self.say(f"{self.label}: {what}", start + width * done)

    def _replies(self, shots: Mapping[int, Shot], one: Method | None) -> dict[int, Any]:
        return self.asker.ask(shots, one, UNDEFENDED, "clean")

    def _setting(
        self,
        one: Method | None,
        shots: Mapping[int, Shot],
        replies: Mapping[int, Any],
        full: Mapping[int, Any],
    ) -> Setting:
        good = {index: r for index, r in replies.items() if isinstance(r, Reply)}
        failed = [r for r in replies.values() if isinstance(r, Failure)]
        both = [index for index in good if isinstance(full.get(index), Reply)]
        sizes = {index: len(self.asker.places(shots[index]).boxes) for index in good}
        kept = _kept(good)
        return Setting(
            target=self.label,
            compression=one.label if one else "",
            method=_method(one),
            n=len(good),
            right=sum(bool(r.answer.correct) for r in good.values()),
            agrees=None
            if one is None
            else sum(good[i].answer.text == full[i].answer.text for i in both),
            left=_mean([sizes[i] if r.left is None else r.left for i, r in good.items()]),
            kept=_mean([kept[i].sum() if i in kept else sizes[i] for i in good]),
            tokens=_mean(list(sizes.values())),
            evidence_kept=self._evidence_kept(shots, kept),
            scores=summarise(
                [scored(r.answer.text, shots[index].sample) for index, r in good.items()]
            ),
            errors=len(failed),
            error=failed[0].error.message[:500] if failed else None,
            **self._frequency(shots, kept),
        )

    def _evidence_kept(self, shots: Mapping[int, Shot], kept: Mapping[int, Bools]) -> float | None:
        shares = []
        for index, here in kept.items():
            evidence = self.asker.evidence(shots[index])
            # Of methods that make all their tokens anew there is nothing to be said.
            if evidence is not None and evidence.any() and here.any():
                shares.append((evidence & here).sum() / evidence.sum())
        return _mean(shares) if shares else None

    def _frequency(self, shots: Mapping[int, Shot], kept: Mapping[int, Bools]) -> dict[str, Any]:
        places = [self.asker.places(shots[index]) for index in kept]
        grids = {(one.grid, one.size, len(one.boxes)) for one in places}
        if len(grids) != 1 or not places[0].plain:
            return {}
        often = np.mean(list(kept.values()), axis=0)
        return {"grid": places[0].grid, "frequency": often.round(4).tolist()}

    def _timed(self, setting: Setting, one: Method | None, shots: Mapping[int, Shot]) -> Setting:
        if not self.wanted.repeats or not setting.n:
            return setting
        indices = of_one_size(shots)[0][: self.asker.batcher.size]
        batch = [shots[index] for index in indices]
        images = self.asker.images(batch)
        questions = [shot.sample.question for shot in batch]
        compressor = None if one is None else self.asker.instance(one)

        def once() -> Pace:
            model: LVLM = self.asker.model
            return model.measure(images, questions, compressor=compressor, steps=self.wanted.steps)

        once()  # the first run allocates and compiles
        return setting.model_copy(
            update={"speed": _speed([once() for _ in range(self.wanted.repeats)])}
        )

    def _overlaps(self, kept: Mapping[str, Mapping[int, Bools]]) -> list[Overlap]:
        found = []
        names = [name for name, sets in kept.items() if any(one.any() for one in sets.values())]
        for place, first in enumerate(names):
            for second in names[place + 1 :]:
                both = kept[first].keys() & kept[second].keys()
                if both:
                    pairs = [jaccard(kept[first][i], kept[second][i]) for i in sorted(both)]
                    found.append(
                        Overlap(
                            target=self.label,
                            first=first,
                            second=second,
                            jaccard=round(_mean(pairs), 4),
                        )
                    )
        return found

    def _evidence(self, shots: Mapping[int, Shot]) -> None:
        from targets.evidence import evidence_map, find_horizon

        model, size = self.asker.model, self.asker.batcher.size
        for index in range(min(self.wanted.evidence, len(shots))):
            shot = shots[index]
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
        chosen = {index: shots[index] for index in range(min(self.wanted.horizon, len(shots)))}
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


def _kept(replies: Mapping[int, Any]) -> dict[int, Bools]:
    return {
        index: reply.kept.kept
        for index, reply in replies.items()
        if isinstance(reply, Reply) and reply.kept is not None
    }


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


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
