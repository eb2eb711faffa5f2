"""Two runs side by side, sample by sample: what broke, what was mended, and whether it is chance.

Compared is the answer through compression on the attacked image. Beside it stands the same on the
clean image, which no attack has touched: what compression alone breaks is not read as an attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from reports.aggregate import worst_case
from reports.baseline import Baseline, refuse_unlike
from reports.design import Clusters
from reports.errors import ReportError
from reports.gate import cell_label
from reports.matching import Matching, match
from reports.measure import Row, measure
from reports.multiplicity import holm
from reports.paired import PairedTable, newcombe, sign_test
from reports.records import Cell, Manifest
from reports.text import count, epsilon_text, plain
from reports.verdict import ExitCode

CONFIDENCE = 0.95
"""Of the intervals, and of the family of all cells: a difference by chance in any has 5 %."""

Numbers = dict[str, float | int | None]
State = Literal["worse", "better", "no difference shown", "not comparable"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Change(_Record):
    """One answer of the same samples in both runs."""

    n: int
    before: int
    """Right in the baseline."""
    now: int
    """Right in the run."""
    broke: list[str]
    """Ids that were right and are wrong."""
    mended: list[str]
    """Ids that were wrong and are right."""
    difference: Numbers
    """Accuracy now less before, Newcombe's paired interval; below 0 is worse."""
    effective_n: float | None
    """Independent samples that would say as much, where several share an image."""
    p: float
    """Two-sided exact McNemar."""


class ComparedCell(_Record):
    """One cell in both runs."""

    label: str
    """Of the run's cell, or of the worst case over several."""
    before: list[str]
    """Ids of the baseline's cells; several of a worst case."""
    now: list[str]
    state: State
    why: str
    """Why it is not comparable; "" otherwise."""
    attacked: Change | None
    """Through compression, on attacked images."""
    clean: Change | None
    """Through compression, on clean images: compression alone."""
    broke_clean: int
    """Of what broke under attack, what is wrong on the clean image already."""
    p_holm: float | None
    """McNemar's p of `attacked`, corrected for all cells."""
    clean_drop: tuple[Numbers, Numbers]
    """What compression alone costs, before and now."""
    csfr: tuple[Numbers, Numbers]


class Comparison(_Record):
    """Two runs compared."""

    schema_version: Literal[1] = 1
    before: dict[str, str]
    now: dict[str, str]
    exit_code: ExitCode
    headline: str
    compared: list[str]
    """What differs between the runs in target, compression, defence, seed or length of answers."""
    cells: list[ComparedCell]
    only_before: list[str]
    """Labels of cells of the baseline that the run does not have."""
    only_now: list[tuple[str, str]]
    """Labels of cells of the run without a partner, each with the reason."""
    next: str


def compare(before: Baseline, now: Baseline) -> Comparison:
    """Compare a run with a baseline.

    Raises:
        ReportError: if they are not on the same data and samples, or have no cell in common.
    """
    refuse_unlike(before.manifest, now.manifest, before.folder)
    _refuse_other_questions(before, now)
    matching = match(before.manifest.cells, now.manifest.cells)
    if not matching.pairs:
        reasons = dict.fromkeys(f"{cell_label(cell)}: {why}" for cell, why in matching.only_now)
        raise ReportError(
            f"no cell of {now.folder} is comparable with one of {before.folder}: "
            f"{'; '.join(list(reasons)[:3]) or 'one of them has none'}"
        )
    cells = _corrected(
        [
            *(_cell(before, now, [pair]) for pair in matching.pairs),
            *(_cell(before, now, pairs) for pairs in _corners(matching)),
        ]
    )
    code = _code(cells, matching)
    return Comparison(
        before=before.told,
        now=now.told,
        exit_code=code,
        headline=_headline(cells, matching, code),
        compared=[*_settings(before.manifest, now.manifest), *matching.compared],
        cells=cells,
        only_before=[cell_label(cell) for cell in matching.only_before],
        only_now=[(cell_label(cell), why) for cell, why in matching.only_now],
        next=_next(cells, before.folder, code),
    )


def _refuse_other_questions(before: Baseline, now: Baseline) -> None:
    """Ids may agree where the questions do not, such as after an edit of a file."""
    shared = before.asked.keys() & now.asked.keys()
    other = sorted(name for name in shared if before.asked[name] != now.asked[name])
    if other:
        raise ReportError(
            f"{before.folder} cannot be compared with {now.folder}: {count(len(other), 'sample')} "
            f"of {len(shared):,} have another question, answer or image under the same id, first "
            f"{plain(other[0])!r}; run both on the same data"
        )


def _settings(before: Manifest, now: Manifest) -> list[str]:
    """What differs besides cells and data, and may explain a difference."""
    seeds, answers = (before.seed, now.seed), [one.scenario.get("answers") for one in (before, now)]
    found = [f"seed: {seeds[0]} → {seeds[1]}"] if seeds[0] != seeds[1] else []
    if answers[0] != answers[1]:
        found.append(f"answers: {answers[0] or 'default'} → {answers[1] or 'default'}")
    return found


Pairs = Sequence[tuple[Cell, Cell]]


def _corners(matching: Matching) -> list[Pairs]:
    """Matched cells that differ in the attack alone, for the worst case; noise is no attack."""
    corners: dict[tuple[object, ...], list[tuple[Cell, Cell]]] = {}
    for before, now in matching.pairs:
        if now.knowledge != "none":
            place = (now.target, now.compression, now.defense, round(now.epsilon, 9), now.norm)
            corners.setdefault(place, []).append((before, now))
    return [pairs for pairs in corners.values() if len(pairs) > 1]


def _cell(before: Baseline, now: Baseline, pairs: Pairs) -> ComparedCell:
    old = worst_case([before.rows[cell.id] for cell, _ in pairs])
    new = worst_case([now.rows[cell.id] for _, cell in pairs])
    names = [name for name in new if name in old]
    rows = [old[name] for name in names], [new[name] for name in names]
    attacked, clean = _change(*rows, "compressed_attacked"), _change(*rows, "compressed_clean")
    wrong = {row.sample for row in rows[1] if not row.compressed_clean}
    drops, rates = zip(*(_rates(side) for side in rows), strict=True)
    why = _objection(before, now, pairs)
    return ComparedCell(
        label=_label([cell for _, cell in pairs]),
        before=[cell.id for cell, _ in pairs],
        now=[cell.id for _, cell in pairs],
        state="not comparable" if why or attacked is None else "no difference shown",
        why=why or ("" if attacked else "no sample was measured in both runs"),
        attacked=attacked,
        clean=clean,
        broke_clean=sum(name in wrong for name in attacked.broke) if attacked else 0,
        p_holm=None,
        clean_drop=drops,
        csfr=rates,
    )


def _label(cells: Sequence[Cell]) -> str:
    if len(cells) == 1:
        return cell_label(cells[0])
    one, names = cells[0], ", ".join(plain(cell.attack) for cell in cells)
    defense = "" if one.defense == "none" else f" · {plain(one.defense)}"
    return (
        f"{plain(one.target)} · {plain(one.compression)} · worst of {names}{defense} · "
        f"ε {epsilon_text(one.epsilon)}"
    )


def _objection(before: Baseline, now: Baseline, pairs: Pairs) -> str:
    """Missing trials and errors, in either run."""
    found = chain.from_iterable(
        (
            (f"in the baseline {why}" if (why := before.progress(old).objection()) else ""),
            (f"in the run {why}" if (why := now.progress(new).objection()) else ""),
        )
        for old, new in pairs
    )
    return next((why for why in found if why), "")


def _rates(rows: Sequence[Row]) -> tuple[Numbers, Numbers]:
    found = measure(rows, seed=0, names=("clean_drop", "csfr"))
    return found["clean_drop"].as_json(), found["csfr"].as_json()


def _change(before: Sequence[Row], now: Sequence[Row], answer: str) -> Change | None:
    """How one answer changed; rows are of the same samples in the same order."""
    if not now:
        return None
    pairs = [
        (bool(getattr(new, answer)), bool(getattr(old, answer)))
        for old, new in zip(before, now, strict=True)
    ]
    table = PairedTable.of(pairs)
    moved = np.array([float(new) - float(old) for new, old in pairs])
    clusters = Clusters.of(moved, [row.image for row in now])
    size = clusters.effective_size(0.5 + CONFIDENCE / 2)
    worth = table.scaled(size)
    return Change(
        n=len(pairs),
        before=round(table.both + table.only_second),
        now=round(table.both + table.only_first),
        broke=[row.sample for row, pair in zip(now, pairs, strict=True) if pair == (False, True)],
        mended=[row.sample for row, pair in zip(now, pairs, strict=True) if pair == (True, False)],
        difference={**newcombe(worth, CONFIDENCE).as_json(), "n": len(pairs)},
        effective_n=None if clusters.alone else round(size, 3),
        p=float(f"{sign_test(worth.only_first, worth.only_second):.6g}"),
    )


def _corrected(cells: Sequence[ComparedCell]) -> list[ComparedCell]:
    """The cells with Holm's p-values and what follows from them."""
    p_values = [1.0 if one.attacked is None else one.attacked.p for one in cells]
    return [
        one.model_copy(update={"p_holm": float(f"{p:.6g}"), "state": _state(one, p)})
        if one.attacked is not None and not one.why
        else one
        for one, p in zip(cells, holm(p_values), strict=True)
    ]


def _state(cell: ComparedCell, p: float) -> State:
    change = cell.attacked
    if change is None or p > 1 - CONFIDENCE or len(change.broke) == len(change.mended):
        return "no difference shown"
    return "worse" if len(change.broke) > len(change.mended) else "better"


def _code(cells: Sequence[ComparedCell], matching: Matching) -> ExitCode:
    states = {one.state for one in cells}
    if "worse" in states:
        return ExitCode.FAIL
    whole = "not comparable" not in states and not matching.only_before
    return ExitCode.PASS if whole else ExitCode.INCONCLUSIVE


def _headline(cells: Sequence[ComparedCell], matching: Matching, code: ExitCode) -> str:
    worse = sum(one.state == "worse" for one in cells)
    better = sum(one.state == "better" for one in cells)
    of = f"of {count(len(matching.pairs), 'matching cell')}"
    extra = len(cells) - len(matching.pairs)
    of += f" and {count(extra, 'worst case')}" if extra else ""
    if code is ExitCode.FAIL:
        return f"Worse: {worse} {of} broke more than chance explains; {better} mended more"
    if code is ExitCode.INCONCLUSIVE:
        return f"Not everything could be compared: nothing worse is shown {of}, but cells are open"
    return f"Nothing worse is shown {of}; {better} mended more than chance explains"


def _next(cells: Sequence[ComparedCell], folder: str, code: ExitCode) -> str:
    if code is ExitCode.FAIL:
        return "look at the samples that broke in report.html of both runs; --json lists all ids"
    if code is ExitCode.INCONCLUSIVE:
        return "run the missing cells or samples, with the same attacks, and compare again"
    unseen = [-float(low) for one in cells if (low := _low(one)) is not None]
    worst = max(unseen, default=0.0)
    return (
        f"this is no proof that nothing got worse: a loss of up to {worst:.3f} of the accuracy "
        "under attack is not excluded. To decide that, gate on it: {metric: "
        f"acc_compressed_attacked, max_decrease: 0.05, baseline: {folder}}}"
    )


def _low(cell: ComparedCell) -> float | None:
    return None if cell.attacked is None else cell.attacked.difference["low"]
