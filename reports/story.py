"""What happened to one sample in one cell, in lines for a terminal; every foreign string inert."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from reports.gate import cell_label
from reports.reading import DIAGNOSIS
from reports.records import Answer, Cell, Tokens, Trial
from reports.text import epsilon_text, number, plain

_WIDTH: Final = 400
"""Characters of an answer, a question or a message."""


def heading(trial: Trial) -> list[str]:
    """The sample itself: id, question, truth."""
    kind = f" ({plain(trial.kind, 80)})" if trial.kind else ""
    return [
        f"{plain(trial.sample, _WIDTH)}{kind}",
        f"question   {plain(trial.question, _WIDTH)}",
        f"truth      {plain(trial.truth, _WIDTH)}",
    ]


def story(trial: Trial, cell: Cell, folder: Path) -> list[str]:
    """One cell: the four answers, how far the image moved, what was kept, why it failed.

    Args:
        trial: of the sample.
        cell: of the trial.
        folder: of the run, for the paths and the command.
    """
    lines = [f"{plain(cell.id)}   {cell_label(cell)}"]
    if trial.error is not None:
        lines += [
            f"error      {plain(trial.error.type)} in {plain(trial.error.where, _WIDTH)}: "
            f"{plain(trial.error.message, _WIDTH)}",
        ]
    else:
        lines += [*_answers(trial), *_distance(trial), *_kept(trial.tokens), *_cause(trial)]
    lines += [f"check      {plain(check, _WIDTH)}" for check in trial.checks]
    lines += _images(trial)
    if trial.error is None:
        lines.append(f"replay     {_command(trial, folder)}")
    return lines


def verdict(trial: Trial) -> str:
    """What the four answers say, in one sentence."""
    if trial.answers is None:
        return "not measured"
    if trial.compression_specific_failure:
        return "a compression-specific failure: wrong only attacked and compressed"
    full, compressed = trial.outcome("full").value, trial.outcome("compressed").value
    words = {
        "success": "the attack succeeds",
        "failure": "the attack fails",
        "not_applicable": "wrong on the clean image already",
    }
    return f"with all tokens {words[full]}, with compression {words[compressed]}"


def _answers(trial: Trial) -> list[str]:
    found = trial.answers
    if found is None:
        return []
    rows = (
        ("", "all tokens", "compressed"),
        ("clean", _answer(found.clean_full), _answer(found.clean_compressed)),
        ("attacked", _answer(found.attacked_full), _answer(found.attacked_compressed)),
    )
    width = max(len(middle) for _, middle, _ in rows)
    table = [f"{first:11}{middle:{width}}   {last}" for first, middle, last in rows]
    return [*table, f"finding    {verdict(trial)}"]


def _answer(answer: Answer) -> str:
    return f"{plain(answer.text, _WIDTH)} ({'right' if answer.correct else 'WRONG'})"


def _distance(trial: Trial) -> list[str]:
    found = trial.distance
    if found is None:
        return []
    psnr = "equal images" if found.psnr is None else f"PSNR {number(found.psnr, 1)} dB"
    return [f"distance   linf {epsilon_text(found.linf)}, l2 {number(found.l2, 2)}, {psnr}"]


def _kept(tokens: Tokens | None) -> list[str]:
    if tokens is None:
        return ["kept       unknown: the compressor has no kept set"]
    clean, attacked = set(tokens.kept_clean), set(tokens.kept_attacked)
    lines = [
        f"kept       {len(clean):,} tokens clean, {len(attacked):,} attacked, "
        f"{len(clean & attacked):,} in both (Jaccard {number(tokens.jaccard, 2)}, "
        f"Spearman {number(tokens.spearman, 2)})"
    ]
    if tokens.evidence is not None:
        evidence = set(tokens.evidence)
        lines.append(
            f"evidence   {len(evidence & clean):,} of {len(evidence):,} tokens kept clean, "
            f"{len(evidence & attacked):,} attacked"
        )
    return lines


def _cause(trial: Trial) -> list[str]:
    if trial.swap is None:
        return []
    name, meaning = DIAGNOSIS[trial.swap.diagnosis.value]
    clean, attacked = trial.swap.recovered_text, trial.swap.reproduced_text
    again = "right again" if trial.swap.recovered else "still WRONG"
    breaks = "WRONG too" if trial.swap.reproduced else "still right"
    return [
        f"diagnosis  {name}. {meaning}",
        f"swap test  attacked image, clean kept set: {plain(clean, _WIDTH)} ({again})",
        f"           clean image, attacked kept set: {plain(attacked, _WIDTH)} ({breaks})",
    ]


def _images(trial: Trial) -> list[str]:
    named = (("clean png", trial.clean_png), ("attacked", trial.attacked_png))
    return [
        f"{label:11}images/{plain(name[:2])}/{plain(name)}.png" for label, name in named if name
    ]


def _command(trial: Trial, folder: Path) -> str:
    words: Sequence[str] = (
        "redteam", "replay", str(folder), "--sample", trial.sample, "--cell", trial.cell,
    )  # fmt: skip
    command = shlex.join(words)
    if plain(command) != command:
        return "redteam replay, with folder and sample as they are: they hold hidden characters"
    return command
