"""The local engine: one process, one device."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from redteam.adaptive import adapt
from redteam.batching import Batcher, Failure, free_memory
from redteam.batching import failure as failure_of
from redteam.cache import NOTE, Entry, ImageCache, key_of
from redteam.calibrating import Calibrator, Watched, batch_of, evading, watch
from redteam.catalog import foreign
from redteam.datasets.base import Samples
from redteam.datasets.filters import Filter, without
from redteam.engines.base import Done, Vault
from redteam.errors import PlanError
from redteam.evaluation import Asker, Replies, Reply, Shot, good
from redteam.pictures import Pixels, decode_png, encode_png, to_pixels
from redteam.plan import ImageGroup, Plan, PlannedCell, WorkUnit, seed_of
from redteam.scenario import Method, digest
from redteam.screening import screen
from redteam.steadiness import Around, look_around
from redteam.trials import Attacked, Swapped, changed, measured, unmeasured, with_draws, with_scores
from reports.records import Effort, Objective, Trial
from reports.store import RunStore
from targets.errors import TargetError

_THREADS: Final = 4
"""Readers, encoders and decoders of pictures; none of them holds the interpreter for long."""

if TYPE_CHECKING:
    from attacks.base import Attack, OwnLoss
    from defenses.detector import Detector
    from targets.base import ImageView
    from targets.compression.base import Compressor
    from targets.decoding import Decoding
    from targets.lvlm import LVLM


@dataclass(frozen=True, slots=True)
class _Made:
    """One attacked image as the attack returns it."""

    pixels: Pixels
    base: Pixels
    loss: list[float]
    checks: tuple[str, ...]
    seed: int
    seconds: float
    effort: Effort
    made_by: str
    pipeline: str
    objective: Objective


@dataclass(slots=True)
class _Block:
    """What all units of one target and one block of samples share."""

    target: str
    number: int
    shots: dict[int, Shot | Failure]
    clean: dict[tuple[str, str], Replies] = field(default_factory=dict)
    watched: dict[tuple[str, str], dict[int, Watched | Failure]] = field(default_factory=dict)


class LocalEngine:
    """Runs units one after another on one device.

    Holds one target at a time with the clean answers of one block, and the surrogates that
    attacks have asked for.

    Args:
        plan: what to run.
        samples: the opened data set.
        device: ``auto``, ``cpu``, ``cuda`` …
        warn: told what the user should know, once each.
        calibration: clean samples for detectors, none of them tested; None without detectors.
        cache: of attacked images of earlier runs; None makes all of them.
    """

    def __init__(
        self,
        plan: Plan,
        samples: Samples,
        device: str,
        warn: Callable[[str], None] = lambda message: None,
        calibration: Samples | None = None,
        cache: ImageCache | None = None,
    ) -> None:
        import torch

        from targets.loading import resolve_device

        self._plan, self._samples, self._warn = plan, samples, warn
        self._cache = cache
        self._machine: dict[str, Any] = {}
        self._recalled = 0
        try:
            self.device = str(resolve_device(device))
        except TargetError as error:
            raise PlanError(f"engine.device: {error}") from error
        self._calibrator = Calibrator(plan.scenario, calibration, warn)
        options, place = plan.scenario.engine, torch.device(self.device)
        free = (lambda: free_memory(place)) if options.batch_size == "auto" else None
        self._batcher = Batcher(options.block, warn, free)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures")
        self._asker: Asker | None = None
        self._loaded = ""
        self._block: _Block | None = None
        self._surrogates: dict[str, LVLM] = {}
        self._around: dict[tuple[str, int], Around | None] = {}
        self._transferred: dict[tuple[str, int], dict[int, Attacked | Failure]] = {}

    def prepare(self) -> dict[str, Any]:
        """Load every target once and try each compression on it; the first stays loaded.

        Returns:
            What must not change under a run: hashes of weights and data, and the kind of device.

        Raises:
            PlanError: if a target cannot be loaded or a compression does not fit it.
        """
        targets, others = {}, {}
        hardened: dict[str, dict[str, Any]] = {}
        for surrogate in self._plan.scenario.surrogates:
            others[surrogate.label] = dict(self._surrogate(surrogate).identity)
        for target in reversed(self._plan.scenario.targets):
            asker = self._open(target)
            self._refuse_reduced(target, asker.model)
            self._try(target, asker.model)
            targets[target.label] = dict(asker.model.identity)
            for defense in self._plan.scenario.defenses:
                if asker.guard(defense).encoder is not None:
                    identity = dict(asker.defended(defense).identity)
                    hardened.setdefault(target.label, {})[defense.label] = identity
        return {
            "targets": targets,
            **({"surrogates": others} if others else {}),
            **({"hardened": hardened} if hardened else {}),
            "data": self._samples.identity,
            **({"calibration": found} if (found := self._calibrator.identity) else {}),
            "device": self.device.partition(":")[0],
            **self._precision,
        }

    @property
    def _precision(self) -> dict[str, str]:
        """In what attacks are computed, where that is not the target's own; it makes the images."""
        precision = self._plan.scenario.engine.attack_precision
        return {} if precision == "float32" else {"attack_precision": precision}

    def screen(self, rule: Filter) -> dict[str, str]:
        """Leave out, from now on, what the data set's filter leaves out.

        A sample stays if it qualifies for every target, so that all answer the same questions.

        Args:
            rule: the filter.

        Returns:
            Why, by id of the samples that are left out.
        """
        targets = self._plan.scenario.targets
        found: dict[str, str] = {}
        for target in reversed(targets):  # the first stays loaded, as after `prepare`
            block = self._plan.scenario.engine.block
            for name, why in screen(self._open(target), self._samples, rule, block).items():
                found[name] = f"{target.label}: {why}" if len(targets) > 1 else why
        self._samples = without(self._samples, found)
        return found

    def execute(self, unit: WorkUnit, store: Vault) -> list[Trial]:
        """All trials of a unit: each of its samples in each of its cells.

        Args:
            unit: what to do.
            store: receives the images; the trials are the caller's to append.
        """
        group = unit.group
        asker = self._open(group.target)
        block = self._share(unit, store)
        attacked = self._attack(asker, group, block, store)
        with asker.sharing():
            return self._evaluate(asker, unit, block, attacked, store)

    def _evaluate(
        self,
        asker: Asker,
        unit: WorkUnit,
        block: _Block,
        attacked: Mapping[int, Attacked | Failure],
        store: Vault,
    ) -> list[Trial]:
        """Ask about clean and attacked pictures, in every cell of a unit."""
        shots = {index: one.shot for index, one in good(attacked).items()}
        full: dict[str, Replies] = {}
        compressed: dict[tuple[str, str], Replies] = {}
        trials: list[Trial] = []
        for planned in unit.group.cells:
            defense = planned.defense
            acting = defense.label if asker.acts(defense, compressed=False) else ""
            if acting not in full:
                full[acting] = asker.ask(shots, None, defense, "attacked, all tokens")
            all_tokens = full[acting]
            clean = self._clean(asker, block, planned.compression, defense)
            acting = defense.label if asker.acts(defense, compressed=True) else ""
            key = (planned.compression.label, acting)
            if key not in compressed:
                compressed[key] = self._compressed(asker, planned, shots, clean)
            replies = [
                self._clean(asker, block, None, defense),
                clean,
                all_tokens,
                compressed[key],
            ]
            others = [
                self._redrawn(asker, block, planned, shots, replies, draw)
                for draw in range(1, self._draws(asker, planned))
            ]
            scores = None
            if asker.guard(defense).detector is not None:
                scores = self._watched(asker, block, planned, shots, store)
            trials += self._trials(asker, unit, planned, attacked, replies, scores, others)
        return trials

    def _draws(self, asker: Asker, planned: PlannedCell) -> int:
        """Under how many draws the answers of a cell are asked for: one where nothing is drawn."""
        paths = (None, planned.compression)
        drawing = any(asker.draws(one, planned.defense) for one in paths)
        return self._plan.scenario.checks.draws if drawing else 1

    @staticmethod
    def _redrawn(
        asker: Asker,
        block: _Block,
        planned: PlannedCell,
        shots: Mapping[int, Shot],
        first: Sequence[Replies],
        draw: int,
    ) -> list[Replies]:
        """The four answers under another draw; a path on which nothing is drawn answers as before.

        Args:
            asker: of the target.
            block: clean pictures.
            planned: the cell.
            shots: attacked pictures.
            first: the four answers of the first draw.
            draw: its number, ≥ 1.
        """
        found = list(first)
        for place, one in enumerate((None, planned.compression)):
            if not asker.draws(one, planned.defense):
                continue
            key = (one.label if one else "", f"{planned.defense.label}/{draw}")
            where = f"draw {draw + 1}"
            if key not in block.clean:
                some = good(block.shots)
                block.clean[key] = asker.ask(some, one, planned.defense, where, draw=draw)
            found[place] = block.clean[key]
            found[place + 2] = asker.ask(shots, one, planned.defense, where, draw=draw)
        return found

    def hardware(self) -> dict[str, Any]:
        """This machine."""
        from redteam.provenance import hardware

        return hardware(self.device)

    def calibrate(self, store: Vault) -> None:
        """Calibrate every detector on every compression, as the units would one by one."""
        scenario = self._plan.scenario
        for target in scenario.targets:
            watched = [one for one in scenario.defenses if one.detects]
            for compression in scenario.compressions if watched else ():
                asker = self._open(target)
                for defense in watched:
                    self._calibrator.watching(asker, target, compression, defense, store)

    def results(
        self, units: Sequence[WorkUnit], store: RunStore, stop: Callable[[], bool]
    ) -> Iterator[Done]:
        """Carry out units one after another; see `redteam.engines.base.Engine`."""
        for unit in units:
            if stop():
                return
            yield Done(unit, self.execute(unit, store))
        if self._recalled:
            self._warn(
                f"{self._recalled:,} attacked images are from the cache of earlier runs (redteam "
                "cache); --no-cache makes all of them"
            )

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _watched(
        self,
        asker: Asker,
        block: _Block,
        planned: PlannedCell,
        shots: Mapping[int, Shot],
        store: Vault,
    ) -> list[dict[int, Watched | Failure]]:
        """How suspicious a detector finds clean and attacked pictures."""
        compression, defense = planned.compression, planned.defense
        target = next(
            one for one in self._plan.scenario.targets if one.label == planned.cell.target
        )
        watching = self._calibrator.watching(asker, target, compression, defense, store)
        key = (compression.label, defense.label)
        if key not in block.watched:
            where = f"clean, watched by {defense.label}"
            some = good(block.shots)
            block.watched[key] = watch(asker, watching, compression, defense, some, where)
        where = f"attacked, watched by {defense.label}"
        hit = watch(asker, watching, compression, defense, shots, where)
        return [block.watched[key], hit]

    @staticmethod
    def _compressed(
        asker: Asker, planned: PlannedCell, shots: Mapping[int, Shot], clean: Replies
    ) -> Replies:
        """Answers to attacked pictures through the compressor."""
        where = "attacked, compressed"
        if not asker.imposes_clean(planned.defense):
            return asker.ask(shots, planned.compression, planned.defense, where)
        own = {index: one.selection for index, one in good(clean).items() if one.selection}
        some = {index: shot for index, shot in shots.items() if index in own}
        return asker.ask(some, planned.compression, planned.defense, where, own)

    def _open(self, target: Method) -> Asker:
        """The asker of a target, loading it if another one is loaded."""
        if self._asker is None or self._loaded != target.label:
            self._asker = self._block = None  # let the other model go first
            scenario = self._plan.scenario
            self._asker = Asker(
                self._load(target), self._batcher, scenario.seed, scenario.answers.max_new_tokens
            )
            self._loaded = target.label
        return self._asker

    def _load(self, target: Method) -> LVLM:
        try:
            model: LVLM = target.create().load(self.device)
        except TargetError as error:
            raise PlanError(str(target.problem(str(error)))) from error
        return model

    def _reduce(self, model: LVLM, group: ImageGroup, view: ImageView) -> ImageView:
        """The view of an attack in the precision it is to run in; surrogates keep their own."""
        if not self._precision or group.surrogates:
            return view
        from targets.precision import ReducedView

        return ReducedView(view, model.device)

    def _refuse_reduced(self, target: Method, model: LVLM) -> None:
        """Nothing is reduced that cannot be judged in full precision."""
        if not self._precision:
            return
        from targets.precision import obstacle

        why = obstacle(model.family.model.parameters(), model.device)
        if why:
            raise PlanError(str(target.problem(f"engine.attack_precision is bfloat16, but {why}")))

    def _surrogate(self, surrogate: Method) -> LVLM:
        """A surrogate, loaded once and kept."""
        if surrogate.label not in self._surrogates:
            self._surrogates[surrogate.label] = self._load(surrogate)
        return self._surrogates[surrogate.label]

    def _try(self, target: Method, model: LVLM) -> None:
        """One short answer per compression: what does not fit is found before anything is spent."""
        from defenses.base import DefenseError

        asker = self._open(target)
        for compression in self._plan.scenario.compressions:
            try:
                self._answer_once(model, asker.instance(compression))
                weak = model.family.known_weak.get(compression.type)
                if weak:
                    self._warn(f"{compression.label} on {target.label}: known to be weak: {weak}")
            except TargetError as error:
                message = f"does not fit target {target.label!r}: {error}"
                raise PlanError(str(compression.problem(message))) from error
            for defense in self._plan.scenario.defenses:
                guard = asker.guard(defense)
                try:
                    hardened = asker.defended(defense)
                    protected = asker.compressor(compression, defense)
                    plain = protected is asker.instance(compression) and hardened is model
                    if guard.decoding is not None or not plain:
                        self._answer_once(hardened, protected, guard.decoding)
                    if guard.detector is not None:
                        self._observe_once(model, protected, guard.detector)
                except (TargetError, DefenseError) as error:
                    message = f"does not fit {compression.label} on {target.label!r}: {error}"
                    raise PlanError(str(defense.problem(message))) from error

    @staticmethod
    def _observe_once(model: LVLM, compressor: Compressor, detector: Detector) -> None:
        import torch

        from defenses.detector import Traffic

        picture = torch.full((1, 3, *model.image_size), 0.5, device=model.device)
        with torch.no_grad():
            detector.observe(Traffic(model, compressor, picture, ("what is this ?",), (0,), (0,)))

    @staticmethod
    def _answer_once(model: LVLM, compressor: Compressor, decoding: Decoding | None = None) -> None:
        import torch

        picture = torch.full((1, 3, *model.image_size), 0.5, device=model.device)
        model.answer(
            picture,
            ["what is this ?"],
            compressor=compressor,
            seeds=[0],
            decoding=decoding,
            max_new_tokens=1,
        )

    def _share(self, unit: WorkUnit, store: Vault) -> _Block:
        """The block of a unit: its clean pictures, as their files hold them."""
        label = unit.group.target.label
        block = self._block
        if block is None or (block.target, block.number) != (label, unit.block):
            read = self._threads.map(lambda index: self._shot(index, store), unit.samples)
            shots = dict(zip(unit.samples, read, strict=True))
            block = self._block = _Block(label, unit.block, shots)
        return block

    def _shot(self, index: int, store: Vault) -> Shot | Failure:
        try:
            sample = self._samples[index]
            data = encode_png(sample.image)
        except Exception as error:
            # A picture that cannot be read is this sample's trouble only.
            return failure_of(error, "reading the clean image")
        return Shot(sample, decode_png(data), store.save_png(data))

    def _clean(
        self, asker: Asker, block: _Block, compression: Method | None, defense: Method
    ) -> Replies:
        """Clean answers, made once for all attacks and budgets."""
        acts = asker.acts(defense, compressed=compression is not None)
        key = (compression.label if compression else "", defense.label if acts else "")
        if key not in block.clean:
            where = "clean, compressed" if compression else "clean, all tokens"
            block.clean[key] = asker.ask(good(block.shots), compression, defense, where)
        return block.clean[key]

    def _attack(
        self, asker: Asker, group: ImageGroup, block: _Block, store: Vault
    ) -> dict[int, Attacked | Failure]:
        """Attacked images, as their files hold them."""
        key = (group.id, block.number)
        if key in self._transferred:
            return self._transferred[key]
        shots = good(block.shots)
        found: dict[int, Attacked | Failure] = {
            index: shot for index, shot in block.shots.items() if isinstance(shot, Failure)
        }
        keys = self._keys(asker, group, shots)
        results = self._recall(keys)
        missing = {index: shot for index, shot in shots.items() if index not in results}
        made = self._make(asker, group, missing, store, f"attack {group.attack.label}")
        self._remember(keys, made)
        results |= made
        found |= {index: one for index, one in results.items() if isinstance(one, Failure)}
        ready = good(results)
        pictures = [shots[index] for index in ready]
        saved = self._threads.map(
            lambda made, clean: _attacked(made, clean, store), ready.values(), pictures
        )
        found |= dict(zip(ready, saved, strict=True))
        if block.number == 0:
            self._repeat(asker, group, shots, found, store)
            self._look_around(asker, group, shots, found, store)
        if group.surrogates and len(self._plan.scenario.targets) > 1:
            self._transferred[key] = found  # the same images attack every target
        return found

    def _keys(self, asker: Asker, group: ImageGroup, shots: Mapping[int, Shot]) -> dict[int, str]:
        """Under which keys the cache keeps the images of this group; none if it does not."""
        if self._cache is None or not cacheable(group):
            return {}
        return {index: self._key(asker, group, shot) for index, shot in shots.items()}

    def _recall(self, keys: Mapping[int, str]) -> dict[int, _Made | Failure]:
        """Images that the cache holds."""
        found: dict[int, _Made | Failure] = {}
        for index, key in keys.items():
            entry = None if self._cache is None else self._cache.get(key)
            if entry is not None:
                found[index] = _from_cache(entry)
        self._recalled += len(found)
        return found

    def _remember(self, keys: Mapping[int, str], made: Mapping[int, _Made | Failure]) -> None:
        """Keep images for later runs."""
        if self._cache is None or not keys:
            return
        some = good(made)
        entries = self._threads.map(_for_cache, some.values())
        list(self._threads.map(self._cache.put, [keys[index] for index in some], entries))

    def _key(self, asker: Asker, group: ImageGroup, shot: Shot) -> str:
        """Hash of all that makes an image, see `redteam.cache`."""
        self._machine = self._machine or self.hardware()
        sample = shot.sample
        hardened = None if group.defense is None else asker.defended(group.defense).identity
        others = [dict(self._surrogate(one).identity) for one in group.surrogates]
        return key_of(
            {
                "group": group.id,
                "weights": others or dict(asker.model.identity),
                "hardened": hardened and dict(hardened),
                "seed": seed_of(self._plan.scenario.seed, group.id, sample.id),
                "max_new_tokens": asker.max_new_tokens,
                "machine": self._machine,
                **self._precision,
                "image": shot.png,
                "sample": [
                    getattr(sample, name)
                    for name in ("question", "answer", "accepted", "options", "scoring", "choices")
                ],
            }
        )

    def _repeat(
        self,
        asker: Asker,
        group: ImageGroup,
        shots: Mapping[int, Shot],
        found: dict[int, Attacked | Failure],
        store: Vault,
    ) -> None:
        """Run the attack twice on the first samples, in equal batches, and note what differs."""
        chosen = list(good(found))[: self._plan.scenario.checks.repeat]
        some = {index: shots[index] for index in chosen}
        where = f"attack {group.attack.label}, repeated"
        first, second = (self._make(asker, group, some, store, where) for _ in range(2))
        for index in chosen:
            one, message = found[index], changed(_pixels(first[index]), _pixels(second[index]))
            if message and isinstance(one, Attacked):
                found[index] = replace(one, checks=(*one.checks, message))

    def _look_around(
        self,
        asker: Asker,
        group: ImageGroup,
        shots: Mapping[int, Shot],
        found: dict[int, Attacked | Failure],
        store: Vault,
    ) -> None:
        """Note on the first samples how the loss of an adaptive attack jumps around clean images.

        Not where it is the mean over several draws of the defence, which is what a loss that jumps
        would call for.
        """
        checks = self._plan.scenario.checks
        if group.defense is None or not checks.stability:
            return
        if asker.instance(group.defense).draws and group.attack.draws > 1:
            return
        chosen = list(good(found))[: checks.stability]
        methods = (group.target, group.attack, group.known, group.defense)
        what = digest([one and one.spec for one in methods])[:12]  # one for all budgets
        missing = {index: shots[index] for index in chosen if (what, index) not in self._around}
        if missing:
            attack, view = self._means(asker, group, store)
            draw = (self._plan.scenario.seed, f"{what}/around")
            seen = look_around(asker, attack, view, missing, checks.points, draw)
            self._around |= {(what, index): seen.get(index) for index in missing}
        for index in chosen:
            one, around = found[index], self._around[what, index]
            if around is not None and isinstance(one, Attacked) and one.objective is not None:
                told = {"unstable": round(around.instability(one.loss), 6)}
                found[index] = replace(one, objective=one.objective.model_copy(update=told))

    def _make(
        self,
        asker: Asker,
        group: ImageGroup,
        shots: Mapping[int, Shot],
        store: Vault,
        where: str,
    ) -> dict[int, _Made | Failure]:
        """Attack pictures in batches that fit into memory."""

        def run(indices: Sequence[int]) -> list[_Made]:
            return self._propose(asker, group, [shots[index] for index in indices], store)

        passes = asker.passes(asker.instance(group.attack), group.defense, group.attack.draws)
        return asker.each(
            shots,
            run,
            where,
            key=group.id,
            gradients=bool(group.gradients),
            passes=passes * max(1, len(group.surrogates)),
        )

    def _propose(
        self, asker: Asker, group: ImageGroup, shots: Sequence[Shot], store: Vault
    ) -> list[_Made]:
        """Run the attack of a group on pictures of one size."""
        attack, view = self._means(asker, group, store)
        view = self._reduce(asker.model, group, view)
        samples = [shot.sample for shot in shots]
        batch = batch_of(samples, asker.images(shots))
        seeds = [seed_of(self._plan.scenario.seed, group.id, one.id) for one in samples]
        started = time.perf_counter()
        result = attack(view, batch, group.epsilon, seeds)
        seconds = (time.perf_counter() - started) / len(samples)
        notes = tuple(f"note: {note}" for note in result.notes)
        effort = Effort(
            forwards=result.forwards, backwards=result.backwards, queries=result.queries
        )
        pipeline = getattr(view, "pipeline", "") or self._evaded(asker, group)
        makers = result.made_by or ("",) * len(samples)
        return [
            _Made(
                pixels,
                base,
                result.loss[row],
                (*result.checks[row], *notes),
                seeds[row],
                seconds,
                effort,
                makers[row],
                pipeline,
                _objective(result.own[row]),
            )
            for row, (pixels, base) in enumerate(
                zip(to_pixels(result.images), to_pixels(result.base), strict=True)
            )
        ]

    @staticmethod
    def _evaded(asker: Asker, group: ImageGroup) -> str:
        """Hash of compressor and detector that an attack evades; "" if it evades none."""
        if group.known is None or group.defense is None:
            return ""
        guard = asker.guard(group.defense)
        if guard.detector is None:
            return ""
        from defenses.fingerprint import pipeline

        return pipeline(asker.instance(group.known), guard)

    def _evading(self, asker: Asker, group: ImageGroup, attack: Attack, store: Vault) -> Attack:
        """An attack on a detector with what that has learnt, and the threshold to stay under."""
        if group.known is None or group.defense is None:
            raise PlanError(f"{group.attack.label} evades a detector of a compression it must know")
        watching = self._calibrator.watching(asker, group.target, group.known, group.defense, store)
        return evading(asker, watching, group.known, attack)

    def _means(self, asker: Asker, group: ImageGroup, store: Vault) -> tuple[Attack, Any]:
        """The attack of a group in the form it is run, and what it may use."""
        from targets.views import OtherModels

        attack: Attack = asker.instance(group.attack)
        if group.surrogates:
            others = [self._surrogate(one).surrogate(one.label) for one in group.surrogates]
            return attack, OtherModels(others)
        adapted = None if group.defense is None else adapt(group.attack, group.defense, attack)
        if adapted is not None:
            attack = adapted.attack
        if group.defense is not None and asker.guard(group.defense).detector is not None:
            attack = self._evading(asker, group, attack, store)
        known = None if group.known is None else asker.instance(group.known)
        through = adapted is not None and group.defense is not None and adapted.through
        model = asker.defended(group.defense) if through and group.defense else asker.model

        def view(
            compressor: Compressor | None, decoding: Decoding | None = None, draw: int = 0
        ) -> ImageView:
            return model.view(
                attack.needs,
                compressor,
                max_new_tokens=asker.max_new_tokens,
                decoding=decoding,
                draw=draw,
            )

        if group.defense is None or not through:
            return attack, view(known)
        from defenses.adaptive import defended

        return attack, defended(
            view,
            attack.needs,
            asker.instance(group.defense),
            compressor=known,
            layout=asker.model.layout,
            draws=group.attack.draws,
        )

    def _trials(
        self,
        asker: Asker,
        unit: WorkUnit,
        planned: PlannedCell,
        attacked: Mapping[int, Attacked | Failure],
        replies: Sequence[Replies],
        scores: Sequence[Mapping[int, Watched | Failure]] | None = None,
        others: Sequence[Sequence[Replies]] = (),
    ) -> list[Trial]:
        """One trial for each sample of the unit in one cell."""
        shared = len(unit.group.cells)
        ready: dict[int, tuple[Attacked, tuple[Reply, ...]]] = {}
        failed: dict[int, Failure] = {}
        for index in unit.samples:
            image = attacked[index]
            four = [one[index] for one in replies if index in one]
            seen = [one[index] for one in scores or () if index in one]
            again = [one[index] for four_ in others for one in four_ if index in one]
            wrong = [part for part in (image, *four, *seen, *again) if isinstance(part, Failure)]
            if wrong or isinstance(image, Failure):
                failed[index] = wrong[0]
            else:
                ready[index] = (image, tuple(one for one in four if isinstance(one, Reply)))
        swapped = self._swap(asker, planned, ready)
        deployed = asker.pipeline(planned.compression, planned.defense)
        trials = []
        for index in unit.samples:
            swap = failed.get(index) or swapped.get(index)
            if isinstance(swap, Failure):
                trials.append(self._unmeasured(unit, planned, index, swap))
                continue
            one, replied = ready[index]
            evidence = asker.evidence(one.clean)
            places = asker.places(one.clean)
            trial = measured(planned.cell, one, replied, swap, places, evidence, shared, deployed)
            seen = [found[index] for found in scores or ()]
            trial = with_scores(trial, [one for one in seen if isinstance(one, Watched)])
            trials.append(with_draws(trial, [_answered(four, index) for four in others]))
        return trials

    def _unmeasured(
        self, unit: WorkUnit, planned: PlannedCell, index: int, wrong: Failure
    ) -> Trial:
        name = self._samples.ids[index]
        shot = self._block.shots[index] if self._block is not None else None
        return unmeasured(
            planned.cell,
            name,
            shot if isinstance(shot, Shot) else None,
            seed_of(self._plan.scenario.seed, unit.group.id, name),
            wrong,
        )

    def _swap(
        self,
        asker: Asker,
        planned: PlannedCell,
        ready: Mapping[int, tuple[Attacked, tuple[Reply, ...]]],
    ) -> dict[int, Swapped | Failure]:
        """The swap test of every compression-specific failure that has a kept set to exchange."""
        failed = {
            index: (one, clean, hit)
            for index, (one, (c, clean, full, hit)) in ready.items()
            if c.answer.correct and clean.answer.correct and full.answer.correct
            if not hit.answer.correct
            if clean.selection is not None and hit.selection is not None
        }
        compression, defense = planned.compression, planned.defense
        recovered = asker.ask(
            {index: one.shot for index, (one, _, _) in failed.items()},
            compression,
            defense,
            "swap test, clean kept set on the attacked image",
            {index: clean.selection for index, (_, clean, _) in failed.items() if clean.selection},
        )
        reproduced = asker.ask(
            {index: one.clean for index, (one, _, _) in failed.items()},
            compression,
            defense,
            "swap test, attacked kept set on the clean image",
            {index: hit.selection for index, (_, _, hit) in failed.items() if hit.selection},
        )
        found: dict[int, Swapped | Failure] = {}
        for index in failed:
            first, second = recovered[index], reproduced[index]
            if isinstance(first, Failure):
                found[index] = first
            elif isinstance(second, Failure):
                found[index] = second
            else:
                found[index] = Swapped(first, second)
        return found


def _attacked(made: _Made, clean: Shot, store: Vault) -> Attacked:
    """An attacked image as its file holds it; so is what its budget was measured from."""

    def saved(pixels: Pixels) -> Shot:
        data = encode_png(pixels)
        return Shot(clean.sample, decode_png(data), store.save_png(data))

    base = clean if (made.base == clean.pixels).all() else saved(made.base)
    return Attacked(
        shot=saved(made.pixels),
        clean=clean,
        loss=made.loss,
        checks=made.checks,
        seed=made.seed,
        seconds=made.seconds,
        effort=made.effort,
        made_by=made.made_by,
        pipeline=made.pipeline,
        base=base,
        objective=made.objective,
    )


def cacheable(group: ImageGroup) -> bool:
    """Whether images of a group are worth keeping and their code is in the key.

    Not those that cost nothing, those of detectors (which depend on what they learnt), and those of
    methods from other packages.
    """
    methods = [group.target, group.attack, *group.surrogates]
    methods += [one for one in (group.known, group.defense) if one is not None]
    # Anywhere in the options: stacks, stages and suites name further methods there.
    text = json.dumps([one.spec for one in methods])
    ours = not any(json.dumps(name) in text for name in foreign())
    watched = group.defense is not None and group.defense.detects
    return ours and not watched and bool(group.gradients or group.queries)


def _for_cache(made: _Made) -> Entry:
    facts = {
        "loss": made.loss,
        "checks": list(made.checks),
        "seed": made.seed,
        "seconds": made.seconds,
        "effort": made.effort.model_dump(),
        "made_by": made.made_by,
        "pipeline": made.pipeline,
        "objective": made.objective.model_dump(),
    }
    return Entry(facts, encode_png(made.pixels), encode_png(made.base))


def _from_cache(entry: Entry) -> _Made:
    facts = entry.facts
    return _Made(
        pixels=decode_png(entry.attacked),
        base=decode_png(entry.base),
        loss=list(facts["loss"]),
        checks=(*facts["checks"], NOTE),
        seed=int(facts["seed"]),
        seconds=float(facts["seconds"]),
        effort=Effort.model_validate(facts["effort"]),
        made_by=str(facts["made_by"]),
        pipeline=str(facts["pipeline"]),
        objective=Objective.model_validate(facts["objective"]),
    )


def _objective(own: OwnLoss) -> Objective:
    return Objective(kept=_finite(own.kept), best=_finite(own.best), believed=own.believed)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: what no finite loss was judged of has none."""
    return value if value is not None and math.isfinite(value) else None


def _answered(four: Sequence[Replies], index: int) -> tuple[Reply, ...]:
    """The answers about one sample that could be given."""
    found = [one[index] for one in four]
    return tuple(one for one in found if isinstance(one, Reply))


def _pixels(made: _Made | Failure) -> Pixels | None:
    return None if isinstance(made, Failure) else made.pixels
