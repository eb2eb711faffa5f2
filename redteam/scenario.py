"""A scenario: what to test with what, read from YAML and checked before anything else happens.

Everything wrong is reported at once, each with file, line, column, key, value and what is allowed.
Reading a scenario imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from redteam.catalog import Kind, find, load
from redteam.document import Document, Location, override, read_document
from redteam.errors import Problem, ScenarioError, nearest
from redteam.findings import Findings, annotation_at, shown
from redteam.gates import resolve_gates
from redteam.labels import assign_labels, without_mark
from redteam.signature import Signature, signature
from redteam.validation import (
    COMPOSED,
    DRAWS,
    AnswerOptions,
    ChecksOptions,
    EngineOptions,
    Header,
    Raw,
    check_method,
    check_paths,
)
from reports.records import GateSpec

_LISTS: Final[Mapping[str, Kind]] = {
    "targets": "targets",
    "surrogates": "targets",
    "compressions": "compressors",
    "attacks": "attacks",
    "defenses": "defenses",
}
EPSILON_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class Method:
    """One target, compression, attack, defence or data set of a scenario.

    Attributes:
        kind: which of these.
        type: its name in the catalogue.
        label: short and unique among its kind.
        options: complete, defaults filled in.
        epsilons: budgets in [0, 1] pixel units (attacks only).
        place: ``file:line:column`` for messages.
        key: key path for messages.
        folder: the scenario's; relative paths start there.
        adaptive: of an attack: whether it is run anew against each defence, which it knows.
        draws: of a random defence in each of its calls.
    """

    kind: Kind
    type: str
    label: str
    options: Mapping[str, Any]
    epsilons: tuple[float, ...] = ()
    place: str = ""
    key: str = ""
    folder: Path = field(default_factory=Path)
    adaptive: bool = False
    draws: int = DRAWS

    @property
    def signature(self) -> Signature:
        """Its options and class variables, read without importing it."""
        return signature(find(self.kind, self.type))

    @property
    def detects(self) -> bool:
        """Of a defence: whether it changes no answer and only watches."""
        return self.signature.facts.get("kind") == "detector"

    @property
    def spec(self) -> dict[str, Any]:
        """Type and options as plain JSON data; what ids and seeds are made of."""
        knows = {"adaptive": True, "draws": self.draws} if self.adaptive else {}
        return {**self.plain_spec, **knows}

    @property
    def plain_spec(self) -> dict[str, Any]:
        """The same of an attack that adapts, as if it did not.

        An option that came later (`later` of its class) is told only where it is used: what was
        made without it keeps its ids and seeds.
        """
        known = self.signature.options
        unused = {
            key
            for key in self.signature.facts.get("later", ())
            if key in known and self.options.get(key) == known[key].default
        }
        told = {key: value for key, value in self.options.items() if key not in unused}
        plain: dict[str, Any] = json.loads(json.dumps({"type": self.type, **told}))
        return plain

    def create(self) -> Any:  # noqa: ANN401 - an instance of any method
        """Import the class and construct it; paths become those of this machine.

        Raises:
            ScenarioError: if the class refuses its options.
        """
        cls = load(find(self.kind, self.type))
        composed = COMPOSED.get(self.kind)
        try:
            if composed and self.type == composed.type:
                return cls.of([self._part(one) for one in self.options[composed.key]])
            return cls(**self._local(self.type, self.options))
        except Exception as error:
            # Methods of other packages may raise anything here; all of it is about the options.
            raise ScenarioError([self.problem(str(error))]) from error

    def _part(self, member: Mapping[str, Any]) -> Any:  # noqa: ANN401 - one of its kind
        options = {key: value for key, value in member.items() if key != "type"}
        return load(find(self.kind, member["type"]))(**self._local(member["type"], options))

    def _local(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a type with paths as they are on this machine."""
        found = dict(options)
        for key in signature(find(self.kind, name)).facts.get("paths", ()):
            local = self.folder / Path(str(found[key])).expanduser()
            if found[key] is not None and local.exists():
                found[key] = str(local)
        return found

    def problem(self, message: str, *, allowed: str = "", hint: str = "") -> Problem:
        """A problem with this method."""
        return Problem(self.place, self.key, message, allowed, hint)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A checked scenario.

    Attributes:
        name: part of the run folder's name.
        description: for people.
        seed: root of all seeds.
        targets: at least one.
        dataset: what is asked.
        compressions: at least one.
        attacks: at least one, each with its epsilons; last the controls that were missing.
        defenses: at least one; `none` if the file names none.
        surrogates: models that attacks with knowledge ``surrogate`` work on.
        gates: with `where` resolved to labels.
        engine: how to run it.
        checks: self-checks that cost something.
        answers: how the target answers.
        calibration: clean samples that detectors learn from and set thresholds on; None if the
            file names none.
        path: of the file.
        text: of the file, with the overrides as comments at its head.
        overrides: ``key=value`` from the command line.
    """

    name: str
    description: str
    seed: int
    targets: tuple[Method, ...]
    dataset: Method
    compressions: tuple[Method, ...]
    attacks: tuple[Method, ...]
    defenses: tuple[Method, ...]
    gates: tuple[GateSpec, ...]
    engine: EngineOptions
    path: Path
    text: str
    overrides: tuple[str, ...] = ()
    surrogates: tuple[Method, ...] = ()
    checks: ChecksOptions = field(default_factory=ChecksOptions)
    answers: AnswerOptions = field(default_factory=AnswerOptions)
    calibration: Method | None = None

    def resolved(self) -> dict[str, Any]:
        """Everything that decides results, as plain JSON data.

        The engine is left out: how a run is executed does not change what it finds. So are the
        description and the place of the file.
        """
        return {
            "name": self.name,
            "seed": self.seed,
            "targets": [_named(method) for method in self.targets],
            "dataset": self.dataset.spec,
            "compressions": [_named(method) for method in self.compressions],
            "attacks": [
                {**_named(attack), "epsilons": list(attack.epsilons)} for attack in self.attacks
            ],
            "defenses": [_named(method) for method in self.defenses],
            "gates": list(map(_gate, self.gates)),
            **({"surrogates": list(map(_named, self.surrogates))} if self.surrogates else {}),
            **({"checks": _checks(self.checks)} if self.checks != ChecksOptions() else {}),
            **({"answers": self.answers.model_dump()} if self.answers != AnswerOptions() else {}),
            **({"calibration": self.calibration.spec} if self.calibration else {}),
        }

    @property
    def hash(self) -> str:
        """16 hex digits of the resolved scenario."""
        return digest(self.resolved())[:16]


def digest(value: object) -> str:
    """Stable hash (64 hex digits) of plain JSON data."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _gate(gate: GateSpec) -> dict[str, Any]:
    """A gate as it decides; an option that came later is told only where it is used."""
    later = ("allow_unverified", "family", "baseline", "max_increase", "max_decrease")
    unused = {key for key in later if getattr(gate, key) == GateSpec.model_fields[key].default}
    return gate.model_dump(mode="json", exclude={"line", "baseline_folder", *unused})


def _checks(checks: ChecksOptions) -> dict[str, Any]:
    """Self-checks; an option that came later is told only where it is used."""
    return {"repeat": checks.repeat, **checks.model_dump(exclude_defaults=True)}


def _named(method: Method) -> dict[str, Any]:
    return {"name": method.label, **method.spec}


def packaged_folder() -> Path:
    """Where our own scenarios are: in the wheel, or in the checkout."""
    here = Path(__file__).parent
    inside = here / "scenarios"
    return inside if inside.is_dir() else here.parent / "scenarios"


def packaged() -> dict[str, Path]:
    """Our own scenarios by name; those in folders as ``folder/name``."""
    folder = packaged_folder()
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: (path.parent != folder, path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def find_scenario(name: str) -> Path:
    """A scenario file by path, or one of ours by name.

    Raises:
        ScenarioError: if there is neither, listing ours.
    """
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path
    except (OSError, RuntimeError) as error:  # too long a name, no such user
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ScenarioError([Problem(name[:60], "", f"is no path: {why}")]) from error
    known = packaged()
    stem = name.removeprefix("scenarios/").removesuffix(".yaml")
    if stem in known:
        return known[stem]
    what = "is a folder" if path.is_dir() else "does not exist"
    raise ScenarioError(
        [
            Problem(
                name,
                "",
                what,
                allowed=f"a YAML file, or one of {', '.join(known) or 'no packaged scenarios'}",
                hint=nearest(stem, known),
            )
        ]
    )


def load_scenario(name: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read and check a scenario.

    Args:
        name: path of a YAML file, or the name of a packaged scenario.
        overrides: ``key=value`` with a dotted path, applied before checking.

    Raises:
        ScenarioError: with everything that is wrong.
    """
    path = find_scenario(str(name))
    document = read_document(path, str(name) if Path(name).is_file() else path.name)
    if not isinstance(document.data, dict):
        found = Findings(document)
        found.add((), f"{shown(document.data)} is no scenario", allowed="a mapping of keys")
        raise ScenarioError(found.problems)
    _spell_out(document.data)
    for assignment in overrides:
        override(document, assignment)
    _spell_out(document.data)  # an override may have brought a whole list
    return _check(document, path, tuple(overrides))


def _spell_out(data: dict[str, Any]) -> None:
    """A bare word in a list of methods is its type: ``[noise]`` is ``[{type: noise}]``."""
    for key in _LISTS:
        items = data.get(key)
        if isinstance(items, list):
            data[key] = [{"type": one} if isinstance(one, str) else one for one in items]


def load_limited(name: str | Path, overrides: Sequence[str], limit: int | None) -> Scenario:
    """`load_scenario` with at most `limit` samples.

    Raises:
        ScenarioError: also if the data set has no `samples` option to lower.
    """
    scenario = load_scenario(name, overrides)
    if limit is None:
        return scenario
    options = scenario.dataset.options
    if "samples" not in options:
        problem = scenario.dataset.problem("this data set has no option `samples` for --limit")
        raise ScenarioError([problem])
    if options["samples"] is not None and options["samples"] <= limit:
        return scenario
    return load_scenario(name, [*overrides, f"dataset.samples={limit}"])


def _check(document: Document, path: Path, overrides: tuple[str, ...]) -> Scenario:
    from redteam.controls import controls

    findings = Findings(document)
    header: Header | None = None
    try:
        header = Header.model_validate(document.data)
    except ValidationError as error:
        findings.pydantic(error, (), lambda inner: annotation_at(Header, inner))
    methods = _methods(document.data, path.parent, findings)
    dataset = _dataset("dataset", document.data, path.parent, findings)
    calibration = _dataset("calibration", document.data, path.parent, findings)
    default = tuple(header.epsilons) if header else ()
    built: dict[str, tuple[Method, ...]] = {}
    for key, raws in methods.items():
        labels = assign_labels(raws, findings)
        built[key] = tuple(
            _method(raw, label, document, path.parent, default)
            for raw, label in zip(raws, labels, strict=True)
        )
    if header is not None:
        _check_epsilons(built["attacks"], default, methods["attacks"], findings)
        built["attacks"] += controls(built["attacks"])
        if not findings.problems:
            built["defenses"] = _marked(built["defenses"], built["attacks"])
    gates: list[GateSpec] = []
    if header is not None and not findings.problems:
        gates = resolve_gates(header.gates, built, findings, path.parent)
    if findings.problems or header is None or dataset is None:
        raise ScenarioError(findings.in_order())
    undefended = Method("defenses", "none", "none", {}, folder=path.parent)
    return Scenario(
        name=header.name,
        description=header.description,
        seed=header.seed,
        targets=built["targets"],
        dataset=_method(dataset, dataset.type, document, path.parent, ()),
        compressions=built["compressions"],
        attacks=built["attacks"],
        defenses=built["defenses"] or (undefended,),
        gates=tuple(gates),
        engine=header.engine,
        checks=header.checks,
        answers=header.answers,
        path=path,
        text="".join(f"# --set {item}\n" for item in overrides) + document.text,
        overrides=overrides,
        surrogates=built["surrogates"],
        calibration=None
        if calibration is None
        else _method(calibration, calibration.type, document, path.parent, ()),
    )


def _marked(defenses: Sequence[Method], attacks: Sequence[Method]) -> tuple[Method, ...]:
    """Defences without the mark of what is unverified, where an attack adapts to them.

    Asks the classes, so torch is imported where an attack of the scenario is adaptive.
    """
    if not any(attack.adaptive for attack in attacks):
        return tuple(defenses)
    from redteam.adaptive import meets

    return tuple(
        replace(one, label=without_mark(one.label))
        if any(meets(attack, one) for attack in attacks)
        else one
        for one in defenses
    )


def _methods(data: Mapping[str, Any], folder: Path, findings: Findings) -> dict[str, list[Raw]]:
    found: dict[str, list[Raw]] = {}
    for key, kind in _LISTS.items():
        items = data.get(key)
        checked = [
            check_method(kind, item, (key, index), findings)
            for index, item in enumerate(items if isinstance(items, list) else [])
        ]
        found[key] = [raw for raw in checked if raw is not None]
        for raw in found[key]:
            check_paths(raw, folder, findings)
    return found


def _dataset(key: str, data: Mapping[str, Any], folder: Path, findings: Findings) -> Raw | None:
    raw = data.get(key)
    if not isinstance(raw, dict):
        return None  # the header has said so
    found = check_method("datasets", raw, (key,), findings)
    if found is not None:
        check_paths(found, folder, findings)
    return found


def _method(
    raw: Raw, label: str, document: Document, folder: Path, epsilons: tuple[float, ...]
) -> Method:
    location: Location = raw.location
    own = raw.epsilons if raw.epsilons is not None else epsilons
    return Method(
        kind=raw.kind,
        type=raw.type,
        label=label,
        options=raw.options,
        epsilons=_distinct(own) if raw.kind == "attacks" else (),
        place=document.place(location),
        key=f"{location[0]}[{location[1]}]" if len(location) > 1 else str(location[0]),
        folder=folder,
        adaptive=raw.adaptive,
        draws=raw.draws,
    )


def _distinct(epsilons: Sequence[float]) -> tuple[float, ...]:
    """Each budget once, in order; the same number written in two ways is one budget."""
    found: dict[float, float] = {}
    for epsilon in epsilons:
        found.setdefault(round(epsilon, EPSILON_DIGITS), epsilon)
    return tuple(found.values())


def _check_epsilons(
    attacks: Sequence[Method],
    default: tuple[float, ...],
    raws: Sequence[Raw],
    findings: Findings,
) -> None:
    for attack, raw in zip(attacks, raws, strict=True):
        if not attack.epsilons and not default:
            findings.add(
                raw.location,
                f"attack {attack.label!r} has no budget",
                allowed="epsilons here, or once for all attacks at the top of the scenario",
                hint="e.g. epsilons: [8/255]",
            )
