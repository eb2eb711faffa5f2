"""What compression gives and costs on clean data: the records of ``redteam measure``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reports.errors import ReportError
from reports.statistics import wilson

FILE: Final = "measurement.json"
PRACTICAL: Final = 0.8
"""Share of the full accuracy a budget has to keep to count as practical."""
PRACTICAL_FORMULA: Final = "K_prac: fewest tokens with Acc_K ÷ Acc_full ≥ 0.8 among those measured"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Speed(_Record):
    """Time and memory of one batch, per row; the median of the repeats."""

    rows: int
    prefill_ms: float
    """Vision tower, projector, ranking and language model."""
    ranking_ms: float
    """Of that, scoring and selecting."""
    decode_ms: float
    """One more token."""
    macs: float
    """Multiply-accumulates of the language model's prefill."""
    cache_bytes: float
    lengths: list[int]
    """Columns in each layer, padding included."""
    visual: list[float]
    """Visual tokens in each layer."""


class Setting(_Record):
    """One compression of one target; `compression` is "" for all visual tokens."""

    target: str
    compression: str
    method: str
    """The compression without its budget: settings of one method make a curve."""
    n: int
    right: int
    agrees: int | None = None
    """Answers equal to those with all tokens, right or wrong (loyalty); None for all tokens."""
    left: float
    """Visual tokens in the last layer of the language model, merged ones included; mean."""
    kept: float
    """Visual tokens left as themselves after the last cut; mean over samples."""
    tokens: float
    """Visual tokens of a picture, mean over samples."""
    evidence_kept: float | None = None
    """Share of the tokens that show what is asked about among those kept, mean over samples."""
    scores: dict[str, float] = Field(default_factory=dict)
    """What the data set's own scoring reports, e.g. POPE's F1 or MME's accuracy+."""
    errors: int = 0
    error: str | None = None
    speed: Speed | None = None
    grid: tuple[int, int] | None = None
    """Rows and columns of `frequency`, if all pictures have one grid."""
    frequency: list[float] | None = None
    """How often each position was kept, row by row."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.n if self.n else 0.0


class Overlap(_Record):
    """Mean Jaccard index of what two compressions of one target keep of the same pictures."""

    target: str
    first: str
    second: str
    jaccard: float


class Evidence(_Record):
    """Which tokens carry the answer to one sample, from a layer on."""

    target: str
    sample: str
    question: str
    answer: str
    layer: int
    grid: tuple[int, int]
    full: float
    none: float
    only: list[float]
    without: list[float]


class Vanishing(_Record):
    """Mean drop of the answer's log-probability when all visual tokens go at a layer."""

    target: str
    loss: list[float]
    layer: int
    tolerance: float
    n: int


class Measurement(_Record):
    """Everything ``redteam measure`` found."""

    version: int = 1
    name: str
    created: str
    seed: int
    data: str
    formula: str
    provenance: dict[str, Any]
    settings: list[Setting]
    overlaps: list[Overlap] = Field(default_factory=list)
    evidence: list[Evidence] = Field(default_factory=list)
    horizons: list[Vanishing] = Field(default_factory=list)

    def of(self, target: str) -> list[Setting]:
        """Settings of a target, all tokens first."""
        return [one for one in self.settings if one.target == target]

    def full(self, target: str) -> Setting:
        """The setting with all visual tokens."""
        return next(one for one in self.of(target) if not one.compression)

    def curves(self, target: str) -> Iterator[tuple[str, list[Setting]]]:
        """Methods of a target with their settings, most tokens first."""
        methods: dict[str, list[Setting]] = {}
        for one in self.of(target):
            if one.compression and one.n:
                methods.setdefault(one.method, []).append(one)
        for method, settings in methods.items():
            yield method, sorted(settings, key=lambda one: -one.left)

    def practical(self, target: str, method: str) -> Setting | None:
        """The setting at K_prac of a method (`PRACTICAL_FORMULA`); None if none qualifies."""
        bar = PRACTICAL * self.full(target).accuracy
        fit = [one for one in self.of(target) if one.method == method and one.accuracy > bar - 1e-9]
        return min(fit, key=lambda one: one.left, default=None)


def scores_text(one: Setting) -> str:
    """The data set's own scores in one line; "" where they say no more than the accuracy."""
    if not set(one.scores) - {"accuracy"} and not _differs(one):
        return ""
    return ", ".join(f"{name} {value:.4g}" for name, value in one.scores.items())


def _differs(one: Setting) -> bool:
    return abs(one.scores.get("accuracy", one.accuracy) - one.accuracy) > 1e-9


Bounds = tuple[float, float]


def accuracy_interval(one: Setting) -> Bounds:
    """Wilson's 95 % interval of the accuracy."""
    found = wilson(one.right, one.n)
    low = 0.0 if found.low is None else found.low
    return low, 1.0 if found.high is None else found.high


def write(folder: Path, measurement: Measurement) -> Path:
    """Write the record whole or not at all."""
    path = folder / FILE
    text = measurement.model_dump_json(indent=1)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def read(path: Path) -> Measurement:
    """Read a record.

    Raises:
        ReportError: if it is none.
    """
    try:
        return Measurement.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, json.JSONDecodeError) as error:
        raise ReportError(f"{path} is no measurement: {error}") from error


def rows(measurement: Measurement, target: str) -> Iterator[Sequence[str]]:
    """The table of a target, as text."""
    base = measurement.full(target)
    for one in measurement.of(target):
        low, high = accuracy_interval(one)
        speed = one.speed
        relative = base.speed
        yield (
            one.compression or "all tokens",
            f"{one.left:.4g} of {one.tokens:.4g}",
            "–" if speed is None else f"{sum(speed.visual) / max(1, len(speed.visual)):.4g}",
            "error" if not one.n else f"{one.accuracy:.3f} [{low:.2f}, {high:.2f}]",
            "–" if one.agrees is None or not one.n else f"{one.agrees / one.n:.3f}",
            "–" if one.evidence_kept is None else f"{one.evidence_kept:.2f}",
            "–" if speed is None else f"{speed.macs / 1e9:.3g}",
            "–" if speed is None else f"{speed.prefill_ms:.3g}",
            "–"
            if speed is None or relative is None
            else f"{relative.prefill_ms / max(1e-9, speed.prefill_ms):.2f}×",
            "–" if speed is None else f"{speed.decode_ms:.3g}",
            "–" if speed is None else f"{speed.cache_bytes / 1024:.4g}",
        )


COLUMNS: Final[Annotated[Sequence[str], "header of `rows`"]] = (
    "compression",
    "tokens left",
    "layer average",
    "accuracy [95 %]",
    "agrees",
    "evidence kept",
    "GMAC",
    "prefill ms",
    "faster",
    "decode ms",
    "cache KiB",
)
