"""What a run leaves behind: one `Trial` per sample and cell. Plain data, versioned, no torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticSerializationError

SCHEMA_VERSION: Final = 1
"""Version of trials, manifest and summary. Fields are only ever added within a version."""


class Outcome(StrEnum):
    """What one attacked path did on one sample: an error is never a finding, nor the reverse."""

    SUCCESS = "success"
    """The attack succeeded: right on the clean image, wrong on the attacked one."""
    FAILURE = "failure"
    """The attack failed: still right."""
    NOT_APPLICABLE = "not_applicable"
    """The path was wrong on the clean image already, so nothing can be said."""
    ERROR = "error"
    """The trial could not be measured."""


class Diagnosis(StrEnum):
    """Why a compression-specific failure happened, by the swap test."""

    RANKING = "ranking"
    """Clean kept set repairs it and attacked kept set reproduces it: the ranking is the cause."""
    RANKING_PARTIAL = "ranking_partial"
    """The clean kept set repairs it; the attacked set alone does not reproduce it."""
    CONTENT = "content"
    """Neither: an adversarial example for the compressed path, not a ranking flip."""
    MIXED = "mixed"
    """The attacked kept set breaks the clean image too, but the clean set does not repair."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def as_json(self, indent: int | None = None) -> str:
        """JSON that UTF-8 can hold: half characters become ``?``.

        They come from names of files that are no UTF-8, in a command line or in the message of an
        error; what went wrong must not keep a run from being recorded.
        """
        try:
            return self.model_dump_json(indent=indent)
        except PydanticSerializationError:
            plain = type(self).model_validate(_whole(self.model_dump()))
            return plain.model_dump_json(indent=indent)


def _whole(value: Any) -> Any:  # noqa: ANN401 - plain data
    if isinstance(value, dict):
        return {_whole(key): _whole(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_whole(inner) for inner in value)
    return value.encode("utf-8", "replace").decode() if type(value) is str else value


class Answer(_Record):
    """One answer of the model and whether it is right."""

    text: str
    correct: bool


class Answers(_Record):
    """The four answers that count, all from saved 8-bit images."""

    clean_full: Answer
    clean_compressed: Answer
    attacked_full: Answer
    attacked_compressed: Answer


class Tokens(_Record):
    """Which visual tokens survived, and how the ranking moved.

    Token i is row-major on the grid, or lies where `boxes` says.
    """

    grid: tuple[int, int]
    """Rows and columns of the visual tokens of the tile that shows the whole picture."""
    kept_clean: list[int]
    kept_attacked: list[int]
    jaccard: float
    spearman: float | None
    kendall: float | None
    top_preserved: float | None
    """Share of the clean top tokens still in the attacked top (top = 100/576 of the tokens)."""
    bottom_infiltrated: float | None
    """Share of the clean bottom tokens that entered the attacked top."""
    evidence: list[int] | None
    """Tokens that cover what the question asks about, where ground truth exists."""
    evidence_kept_clean: float | None
    evidence_kept_attacked: float | None
    boxes: list[tuple[float, float, float, float]] | None = None
    """Top, left, bottom, right of each token in pixels of the picture; None for one grid over all
    of it."""


class Swap(_Record):
    """The swap test of one compression-specific failure."""

    recovered: bool
    """The attacked image answers right again when the clean kept set is forced."""
    reproduced: bool
    """The clean image fails when the attacked kept set is forced."""
    recovered_text: str
    reproduced_text: str
    diagnosis: Diagnosis


class Distance(_Record):
    """Size of the perturbation, from the 8-bit images."""

    linf: float
    """Largest absolute change, in [0, 1] pixel units."""
    l2: float
    psnr: float | None
    """Peak signal-to-noise ratio in dB; None when the images are equal."""


class Effort(_Record):
    """What making one attacked image took; images through a model, per sample."""

    forwards: int
    """Passes through the target or surrogates, queries aside."""
    backwards: int
    """Gradients taken."""
    queries: int
    """Questions to the deployed target."""


class Objective(_Record):
    """What the loss of an attack says of the image it made; minimised, in the attack's own unit."""

    kept: float | None = None
    """Of the image that was kept; None where the attack judged none by a loss."""
    best: float | None = None
    """The least on the way to it."""
    believed: bool | None = None
    """Whether the attack took the image for one that breaks the compressed answer: by a loss with a
    known zero, or because it asked. None where it could not tell."""
    unstable: float | None = None
    """Of the first samples of an adaptive attack: mean change of the loss at random points within
    8/255 of the clean image ÷ its size, in [0, 1]. None where it was not measured."""


class Demand(_Record):
    """What one answer demanded of the model."""

    tokens: int
    """Visual tokens: those in the last layer of the language model, merged ones included. Where a
    compressor removes none but lets attention see a part of them, that part."""
    generated: int
    """Tokens of the answer, the end token included where it came."""
    seconds: float
    """A sample's equal share of its batch, whose longest answer decides."""
    fallback: bool = False
    """Whether a defence gave the request more tokens than its compressor keeps."""


class Demands(_Record):
    """What the four answers demanded."""

    clean_full: Demand
    clean_compressed: Demand
    attacked_full: Demand
    attacked_compressed: Demand


class Pipelines(_Record):
    """What stands between a picture and an answer, hashed on both sides of a trial.

    A hash is over the compressor, the parts of the defence and the decoder as they were used, not
    as they were planned, so that an attack on something else than what is deployed shows.
    """

    deployed: str
    """Of what gave the answers through compression."""
    attacked: str = ""
    """Of what the attack took its gradients or answers from; "" where the defence was not in it."""


class Draws(_Record):
    """Answers under several independent draws of a random defence or compressor.

    In how many draws, the first among them being the one that the rest of a trial is of.
    """

    count: int
    """Draws in all."""
    clean: int
    """The compressed path was right on the clean image."""
    attacked: int
    """It was right on the attacked image."""
    broken: int
    """It was right on the clean image and wrong on the attacked one."""
    eligible: int
    """Both paths were right on the clean image."""
    failures: int
    """A compression-specific failure."""


class Detection(_Record):
    """How suspicious a detector finds the two pictures; higher is more, on its own scale."""

    clean: float
    attacked: float
    seconds: float = 0.0
    """Of scoring one picture: an equal share of its batch, mean of both."""
    limit: float | None = None
    """Threshold for 5 % false positives; what lies above it is flagged. None in ledgers from before
    it was recorded."""


class Calibration(_Record):
    """Scores of a detector on clean pictures that are no test pictures; thresholds come of them."""

    target: str
    """Labels of what is watched, and by what."""
    compression: str
    detector: str
    samples: list[str]
    """Ids whose scores set thresholds."""
    scores: list[float]
    """Of these, in order."""
    learnt_from: list[str] = Field(default_factory=list)
    """Ids the detector learnt from; they set no threshold."""
    state: str | None = None
    """Content hash (SHA-256, hex) of the file with what it learnt; None if it learns nothing."""
    language: float = 0.0
    """Further prefills of the language model, in units of a compressed one; declared."""
    tower: float = 0.0
    """Further passes of a picture through the vision tower; declared."""
    share: float = 0.0
    """Share of the traffic it watches, where that is an option; else 0."""
    data: str = ""
    """Hash of the calibration data."""


class TrialError(_Record):
    """Why a trial could not be measured."""

    type: str
    message: str
    where: str
    traceback: str


class Trial(_Record):
    """One sample in one cell."""

    schema_version: Literal[1] = SCHEMA_VERSION
    cell: str
    """Id of the cell, see `Cell`."""
    sample: str
    image: str
    """Id of the clean image, which several questions may share: the unit of the bootstrap."""
    kind: str
    """Kind of question (the dataset's own), "" if it has none."""
    question: str
    truth: str
    seed: int
    answers: Answers | None = None
    """None exactly when `error` is set."""
    tokens: Tokens | None = None
    """None when the compressor has no kept set (or the cell has no compression)."""
    swap: Swap | None = None
    """Present exactly for compression-specific failures."""
    distance: Distance | None = None
    clean_png: str | None = None
    """Content hash (SHA-256, hex) of the clean image file under images/."""
    attacked_png: str | None = None
    base_png: str | None = None
    """What `distance` is measured from, where that is not the clean image (an added frame)."""
    effort: Effort | None = None
    """None in ledgers from before it was recorded."""
    made_by: str = ""
    """Of an attack made of others: which of them made the image."""
    demands: Demands | None = None
    """None in ledgers from before they were recorded."""
    pipelines: Pipelines | None = None
    """None without a defence, and in ledgers from before they were recorded."""
    detection: Detection | None = None
    """In cells of a detector: its scores."""
    loss: list[float] = Field(default_factory=list)
    """The attack's loss trace, at most 64 points, first and last included."""
    draws: Draws | None = None
    """None under one draw, and where nothing is drawn."""
    objective: Objective | None = None
    """None in ledgers from before it was recorded."""
    checks: list[str] = Field(default_factory=list)
    """Self-checks that fired on this sample, each naming its remedy."""
    timings: dict[str, float] = Field(default_factory=dict)
    """Seconds by phase; never part of the summary's cells."""
    error: TrialError | None = None

    @property
    def compression_specific_failure(self) -> bool:
        """Right on clean full, clean compressed, attacked full; wrong on attacked compressed."""
        a = self.answers
        return a is not None and (
            a.clean_full.correct
            and a.clean_compressed.correct
            and a.attacked_full.correct
            and not a.attacked_compressed.correct
        )

    def outcome(self, path: Literal["full", "compressed"]) -> Outcome:
        """Outcome of the attack on one path."""
        if self.answers is None:
            return Outcome.ERROR
        a = self.answers
        clean, attacked = (
            (a.clean_full, a.attacked_full)
            if path == "full"
            else (a.clean_compressed, a.attacked_compressed)
        )
        if not clean.correct:
            return Outcome.NOT_APPLICABLE
        return Outcome.FAILURE if attacked.correct else Outcome.SUCCESS


class PartFacts(_Record):
    """One of the acts that a defence is made of."""

    id: str
    """Hash of it with its options; that of a defence which is this alone is the same."""
    name: str
    kind: str


class DefenseFacts(_Record):
    """What a defence says of itself: which rules of an honest evaluation apply to it."""

    id: str
    """Hash of it with its options."""
    kind: str
    """Where it acts: a value of `DefenseKind`."""
    route: str
    """How a gradient goes through it: a value of `AdaptiveRoute`."""
    stochastic: bool
    """Two runs on one picture may differ."""
    iterative: bool = False
    """It optimises while answering."""
    parts: list[PartFacts] = Field(default_factory=list)
    """What it is made of; itself alone where it is whole."""
    beams: int = 1
    """Answers it follows at a time."""
    calibration: list[str] | None = None
    """Ids of the samples that a threshold or a direction was fitted to; None if it does not tell,
    or needs none."""


class Cell(_Record):
    """One point of the plan: a target, a compression, an attack, a defence, a budget.

    The five names are labels for people, unique within a scenario; `spec` holds the resolved
    options.
    """

    id: str
    """Short stable hash of the five resolved specifications."""
    target: str
    compression: str
    attack: str
    defense: str
    epsilon: float
    norm: str = "linf"
    knowledge: str
    """Value of the attack's Knowledge."""
    knows_compression: bool
    spec: dict[str, Any]
    """Resolved options: {"target": {...}, "compression": {...}, "attack": {...}, ...}."""
    detector: bool = False
    """Whether the defence changes no answer and only says which inputs look attacked."""
    declared: dict[str, int] = Field(default_factory=dict)
    """What the attack may spend on one sample: steps (gradients, all restarts) and queries."""
    guard: DefenseFacts | None = None
    """Of the defence; None without one, and in manifests from before it was recorded."""
    knows_defense: bool | None = None
    """Whether the images depend on the defence; None as for `guard`."""
    knows_seed: bool | None = None
    """Whether the attacker knows the draws of a random defence, and not only how it draws."""


class GateSpec(_Record):
    """One gate as the scenario states it."""

    name: str
    metric: str
    max: float | None = None
    min: float | None = None
    where: dict[str, str | float] = Field(default_factory=dict)
    """Cells it covers: any of target, compression, attack, defense (labels) and epsilon."""
    confidence: float = 0.95
    """One-sided: of the bound that has to be within the limit, or beyond it."""
    allow_unverified: bool = False
    """Whether it may pass on cells of a defence that is not verified."""
    family: str = ""
    """Gates of one family share the risk of a false alarm; "" is the family of all others."""
    baseline: str = ""
    """Run folder to compare with, as the scenario names it; "" if the command line does."""
    baseline_folder: str = ""
    """The same on this machine; "" where it is relative to the working directory."""
    max_increase: float | None = None
    """Most that the metric may rise since the baseline."""
    max_decrease: float | None = None
    """Most that it may fall."""
    line: int | None = None
    """Line of the gate in the scenario file."""

    @property
    def compares(self) -> bool:
        """Whether it is on the change since a baseline and not on the metric itself."""
        return self.max_increase is not None or self.max_decrease is not None or bool(self.baseline)

    @property
    def limits(self) -> tuple[float | None, float | None]:
        """Least and most of what it decides: the metric, or its change."""
        if not self.compares:
            return self.min, self.max
        return None if self.max_decrease is None else -self.max_decrease, self.max_increase


class Manifest(_Record):
    """What was asked for and with what: written before the first trial."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    description: str = ""
    created: str
    """UTC, ISO 8601."""
    scenario: dict[str, Any]
    """The resolved scenario; a resume must match it exactly."""
    scenario_hash: str
    seed: int
    cells: list[Cell]
    samples: list[str]
    """Sample ids every cell runs on, in order."""
    gates: list[GateSpec]
    provenance: dict[str, Any] = Field(default_factory=dict)
    """Versions, hardware, weight hashes, command line."""
