"""Ask one sample of a run again, from its saved images, and compare with the record.

The answers go through `redteam.evaluation.Asker` as in a run, with the seeds of the run, so what is
compared is the model, the compressor, the defence and the swap test, not a second implementation.
The attack is not run again: its image is the saved one. What an answer is worth was decided by the
data set, so texts and kept sets are compared; equal texts are equally right. A detector's scores
are not compared. A run asks in batches and a replay one by one, so on a GPU or in half precision
scores that nearly tie may fall the other way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from redteam.batching import Batcher, Failure
from redteam.catalog import Kind
from redteam.datasets.base import Sample
from redteam.document import Document
from redteam.errors import CatalogError, NothingSelected, RedteamError, ScenarioError
from redteam.evaluation import Asker, Reply, Shot
from redteam.findings import Findings
from redteam.pictures import decode_png
from redteam.scenario import Method
from redteam.validation import AnswerOptions, check_method
from reports.command import scenario_in
from reports.errors import StoreError
from reports.gate import cell_label
from reports.records import Cell, Trial
from reports.store import RunStore
from reports.verdict import ExitCode
from targets.errors import TargetError
from targets.loading import resolve_device

if TYPE_CHECKING:
    from targets.compression.base import Selection

_HASHES: Final = ("weights", "processor", "id", "revision")
"""What of a target's identity decides that it is the same model."""
_PARTS: Final[tuple[tuple[Kind, str], ...]] = (
    ("targets", "target"),
    ("compressors", "compression"),
    ("defenses", "defense"),
)
_ANSWERS: Final = ("clean_full", "clean_compressed", "attacked_full", "attacked_compressed")


class ReplayError(RedteamError):
    """A sample cannot be asked again: an image is gone, or the model is another one."""

    exit_code = ExitCode.INCOMPLETE


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as recorded.

    Attributes:
        what: was compared.
        recorded: in the ledger.
        now: in the replay.
    """

    what: str
    recorded: str
    now: str


@dataclass(frozen=True, slots=True)
class Replayed:
    """One cell of a sample, asked again.

    Attributes:
        cell: of the run.
        compared: what was, in words.
        differences: empty if all is as recorded.
        notes: what a reader should know.
    """

    cell: Cell
    compared: tuple[str, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The cell in words."""
        return cell_label(self.cell)

    def as_json(self) -> dict[str, Any]:
        """For ``redteam replay --json``."""
        return {
            "cell": self.cell.id,
            "label": self.label,
            "compared": list(self.compared),
            "differences": [
                {"what": one.what, "recorded": one.recorded, "now": one.now}
                for one in self.differences
            ],
            "notes": list(self.notes),
        }


class Replayer:
    """Asks samples of a run again; keeps one target loaded.

    Args:
        store: of the run.
        device: ``auto``, ``cpu`` …; None for the kind of device of the run.
        folder: where relative paths of the scenario start; None for the folder of the scenario
            that the recorded command names.

    Raises:
        ReplayError: if there is no such device.
    """

    def __init__(self, store: RunStore, *, device: str | None, folder: Path | None) -> None:
        self._store = store
        made_with = store.manifest.provenance
        recorded = str(made_with.get("identity", {}).get("device", "auto"))
        try:
            self.device = str(resolve_device(device or recorded))
        except TargetError as error:
            raise ReplayError(
                f"the run was made on {recorded!r}: {error}; choose another with --device"
            ) from error
        self._folder = folder or _folder_of(str(made_with.get("command", "")))
        kind = self.device.partition(":")[0]
        self._notes = (
            (f"recorded on {recorded}, asked again on {kind}: roundings differ",)
            if recorded not in ("auto", kind)
            else ()
        )
        self._asker: Asker | None = None
        self._loaded = ""
        self._known: dict[tuple[str, str, str], Reply] = {}

    def replay(self, trials: Sequence[Trial]) -> list[Replayed]:
        """Ask again in every cell that was measured.

        Args:
            trials: of one sample.

        Raises:
            ReplayError: if an image, a method or the model is not what it was.
            NothingSelected: if all of them ended in an error.
        """
        cells = {cell.id: cell for cell in self._store.manifest.cells}
        measured = [trial for trial in trials if trial.answers is not None]
        if not measured:
            raise NothingSelected(
                f"sample {trials[0].sample!r} ended in an error in all of these cells, so there "
                "is no answer to compare; see: redteam show"
            )
        return [self._replayed(trial, cells[trial.cell]) for trial in measured]

    def _replayed(self, trial: Trial, cell: Cell) -> Replayed:
        target, compression, defense = (
            self._method(kind, cell.spec[part], getattr(cell, part), part) for kind, part in _PARTS
        )
        clean, attacked = (
            self._shot(trial, name, what)
            for name, what in ((trial.clean_png, "clean"), (trial.attacked_png, "attacked"))
        )
        asker = self._open(target, cell)
        self._check_hardened(asker, cell, defense)
        asked = _Asked(asker, compression, defense, self._known)
        compressed = asked.reply(clean, compressed=True)
        forced = compressed.selection if asker.imposes_clean(defense) else None
        replies = (
            asked.reply(clean, compressed=False),
            compressed,
            asked.reply(attacked, compressed=False),
            asked.reply(attacked, compressed=True, forced=forced),
        )
        differences = [*_texts(trial, replies), *_kept(trial, replies)]
        compared = ["four answers", *(["kept sets"] if trial.tokens else [])]
        if trial.swap is not None:
            compared.append("swap test")
            differences += _swapped(trial, asked, (clean, attacked), replies)
        return Replayed(cell, tuple(compared), tuple(differences), self._notes)

    def _method(self, kind: Kind, spec: Mapping[str, Any], label: str, part: str) -> Method:
        """A method as the run had it: only the options it recorded, so that seeds are the same."""
        findings = Findings(Document("manifest.json", "", dict(spec), {}, {}))
        raw = check_method(kind, dict(spec), (part,), findings)
        if raw is None or findings.problems:
            raise ReplayError(
                f"the {part} {label!r} of this run cannot be made by this version of redteam: "
                f"{'; '.join(map(str, findings.problems))}; install what provenance in "
                "manifest.json names"
            )
        options = {key: value for key, value in raw.options.items() if key in spec}
        return Method(kind, raw.type, label, options, folder=self._folder)

    def _shot(self, trial: Trial, name: str | None, what: str) -> Shot:
        if name is None:
            raise ReplayError(f"the record of sample {trial.sample!r} names no {what} image")
        try:
            pixels = decode_png(self._store.read_png(name))
        except StoreError as error:
            raise ReplayError(
                f"the {what} image of sample {trial.sample!r} cannot be used: {error}; a replay "
                "needs the folder images/ as the run left it"
            ) from error
        sample = Sample(
            id=trial.sample,
            image_id=trial.image,
            image=pixels,
            question=trial.question,
            answer=trial.truth,
            kind=trial.kind,
        )
        return Shot(sample, pixels, name)

    def _open(self, target: Method, cell: Cell) -> Asker:
        if self._asker is None or self._loaded != target.label:
            self._asker = None  # let the other model go first
            self._known.clear()
            manifest = self._store.manifest
            answers = AnswerOptions.model_validate(manifest.scenario.get("answers", {}))
            try:
                model = target.create().load(self.device)
            except (TargetError, ScenarioError, CatalogError) as error:
                raise ReplayError(
                    f"target {cell.target!r} cannot be loaded: {error}; relative paths start at "
                    f"{self._folder}, see --relative-to"
                ) from error
            self._same("target", cell.target, ("targets", cell.target), model.identity)
            self._asker = Asker(model, Batcher(1), manifest.seed, answers.max_new_tokens)
            self._loaded = target.label
        return self._asker

    def _check_hardened(self, asker: Asker, cell: Cell, defense: Method) -> None:
        """The weights of a defence of the encoder, which are not those of the target."""
        try:
            encoder = asker.guard(defense).encoder
            identity = None if encoder is None else asker.defended(defense).identity
        except (TargetError, ScenarioError, CatalogError) as error:
            raise ReplayError(f"defence {cell.defense!r} cannot be loaded: {error}") from error
        if identity is not None:
            place = ("hardened", cell.target, cell.defense)
            self._same("hardened weights of", cell.defense, place, identity)

    def _same(self, what: str, label: str, place: Sequence[str], now: Mapping[str, str]) -> None:
        """Refuse another model than the run's: equal answers of it would say nothing."""
        recorded: Any = self._store.manifest.provenance.get("identity", {})
        for key in place:
            recorded = recorded.get(key, {}) if isinstance(recorded, dict) else {}
        changed = [
            f"{key} {recorded[key]} -> {now[key]}"
            for key in _HASHES
            if key in recorded and key in now and recorded[key] != now[key]
        ]
        if changed:
            raise ReplayError(
                f"{what} {label!r} is no longer what the run was made with (recorded -> now): "
                f"{'; '.join(changed)}; restore it, or run the scenario anew"
            )


@dataclass(frozen=True, slots=True)
class _Asked:
    """One loaded model under one compression and defence; what was asked is not asked twice."""

    asker: Asker
    compression: Method
    defense: Method
    known: dict[tuple[str, str, str], Reply]

    def reply(self, shot: Shot, *, compressed: bool, forced: Selection | None = None) -> Reply:
        key = (shot.png, self.compression.label if compressed else "", self.defense.label)
        if forced is None and key in self.known:
            return self.known[key]
        method = self.compression if compressed else None
        imposed = None if forced is None else {0: forced}
        found = self.asker.ask({0: shot}, method, self.defense, "replay", imposed)[0]
        if isinstance(found, Failure):
            raise ReplayError(
                f"sample {shot.sample.id!r} cannot be asked again: {found.error.type}: "
                f"{found.error.message}"
            )
        if forced is None:
            self.known[key] = found
        return found


def _texts(trial: Trial, replies: Sequence[Reply]) -> list[Difference]:
    return [
        Difference(f"answer, {name.replace('_', ', ')}", recorded, reply.answer.text)
        for name, reply in zip(_ANSWERS, replies, strict=True)
        if (recorded := getattr(trial.answers, name).text) != reply.answer.text
    ]


def _kept(trial: Trial, replies: Sequence[Reply]) -> list[Difference]:
    if trial.tokens is None:
        return []
    found = []
    for name, recorded, reply in (
        ("kept set, clean", trial.tokens.kept_clean, replies[1]),
        ("kept set, attacked", trial.tokens.kept_attacked, replies[3]),
    ):
        now = [] if reply.kept is None else reply.kept.kept.nonzero()[0].tolist()
        if now != recorded:
            away = sorted(set(recorded) ^ set(now))
            shown = ", ".join(map(str, away[:12])) + (" …" if len(away) > 12 else "")
            found.append(
                Difference(name, f"{len(recorded)} tokens", f"{len(now)}, in one set only: {shown}")
            )
    return found


def _swapped(
    trial: Trial, asked: _Asked, shots: tuple[Shot, Shot], replies: Sequence[Reply]
) -> list[Difference]:
    """The swap test: each image with the kept set of the other."""
    assert trial.swap is not None  # noqa: S101 - the caller has looked
    found = []
    for name, recorded, shot, chosen in (
        ("attacked image, clean kept set", trial.swap.recovered_text, shots[1], replies[1]),
        ("clean image, attacked kept set", trial.swap.reproduced_text, shots[0], replies[3]),
    ):
        if chosen.selection is None:
            found.append(Difference(f"swap test, {name}", recorded, "no kept set to exchange"))
            continue
        now = asked.reply(shot, compressed=True, forced=chosen.selection).answer.text
        if now != recorded:
            found.append(Difference(f"swap test, {name}", recorded, now))
    return found


def _folder_of(command: str) -> Path:
    """Folder of the scenario in ``redteam run scenarios/x.yaml``, or the current one."""
    path = Path(scenario_in(command))
    return path.parent if path.is_file() else Path()
