"""Findings as the template shows them: whole ones, and brief ones for a long list."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reports.html import svg
from reports.html.images import Pair, Picture, load_pair, load_small
from reports.reading import DIAGNOSIS
from reports.records import Trial
from reports.store import RunStore


@dataclass(frozen=True, slots=True)
class Finding:
    """What whole and brief findings have in common.

    Attributes:
        anchor: id in the page.
        trial: the finding.
        cell: label of its cell.
        kept_clean: drawing of the tokens kept on the clean image.
        kept_attacked: likewise on the attacked one.
        answers: (image, path, text, right).
        diagnosis: key, title and explanation.
        commands: what tells and repeats it at the command line.
    """

    anchor: str
    trial: Trial
    cell: str
    kept_clean: Markup
    kept_attacked: Markup
    answers: tuple[tuple[str, str, str, bool], ...]
    diagnosis: tuple[str, str, str]
    commands: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Whole:
    """A finding with its pictures as stored.

    Attributes:
        finding: the finding.
        pair: its pictures.
        problem: why there are none; "" if there are.
        spark: curve of the attack's loss.
    """

    finding: Finding
    pair: Pair | None
    problem: str
    spark: Markup


@dataclass(frozen=True, slots=True)
class Brief:
    """A finding with small pictures.

    Attributes:
        finding: the finding.
        clean: name of the clean picture in the page; "" if it cannot be shown.
        attacked: likewise.
    """

    finding: Finding
    clean: str
    attacked: str


def views(store: RunStore, trials: Sequence[Trial], labels: Mapping[str, str]) -> list[Whole]:
    """Whole findings, numbered from 1."""
    return [_whole(store, trial, index, labels) for index, trial in enumerate(trials, 1)]


def _whole(store: RunStore, trial: Trial, index: int, labels: Mapping[str, str]) -> Whole:
    pair = load_pair(store, trial.clean_png, trial.attacked_png)
    return Whole(
        finding=_finding(store, trial, index, labels),
        pair=None if isinstance(pair, str) else pair,
        problem=pair if isinstance(pair, str) else "",
        spark=svg.sparkline(trial.loss) if len(trial.loss) > 1 else Markup(),
    )


@dataclass(frozen=True, slots=True)
class Listed:
    """Brief findings, and the small pictures that they share: one in the page once.

    Attributes:
        findings: in order.
        pictures: by name.
    """

    findings: tuple[Brief, ...]
    pictures: Mapping[str, Picture]


def briefs(
    store: RunStore, trials: Sequence[Trial], labels: Mapping[str, str], *, start: int
) -> Listed:
    """Brief findings, numbered from `start`."""
    pictures: dict[str, Picture] = {}
    names: dict[str | None, str] = {None: ""}

    def named(stored: str | None) -> str:
        if stored not in names:
            picture = load_small(store, stored)
            names[stored] = "" if picture is None else f"small-{len(pictures)}"
            if picture is not None:
                pictures[names[stored]] = picture
        return names[stored]

    found = tuple(
        Brief(
            _finding(store, trial, index, labels, halo=False),
            named(trial.clean_png),
            named(trial.attacked_png),
        )
        for index, trial in enumerate(trials, start)
    )
    return Listed(found, pictures)


def _finding(
    store: RunStore, trial: Trial, index: int, labels: Mapping[str, str], *, halo: bool = True
) -> Finding:
    tokens, answers = trial.tokens, trial.answers
    key = trial.swap.diagnosis.value if trial.swap else "undiagnosed"
    rows = [] if answers is None else [
        ("clean", "full", answers.clean_full),
        ("clean", "compressed", answers.clean_compressed),
        ("attacked", "full", answers.attacked_full),
        ("attacked", "compressed", answers.attacked_compressed),
    ]  # fmt: skip
    overlays = (
        [svg.overlay(tokens.grid, kept, tokens.evidence, tokens.boxes, halo=halo)
         for kept in (tokens.kept_clean, tokens.kept_attacked)]
        if tokens
        else [Markup(), Markup()]
    )  # fmt: skip
    return Finding(
        anchor=f"finding-{index}",
        trial=trial,
        cell=labels[trial.cell],
        kept_clean=overlays[0],
        kept_attacked=overlays[1],
        answers=tuple((image, path, one.text, one.correct) for image, path, one in rows),
        diagnosis=(key, *DIAGNOSIS[key]),
        commands=(_command("show", store, trial), _command("replay", store, trial)),
    )


def _command(verb: str, store: RunStore, trial: Trial) -> str:
    words = ("redteam", verb, store.folder.name, "--sample", trial.sample, "--cell", trial.cell)
    return shlex.join(words)
