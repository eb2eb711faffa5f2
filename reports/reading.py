"""What the numbers say, in sentences: for every renderer, from summary.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reports.marks import defense_text
from reports.text import count, epsilon_text, interval, number, plain

Cell = Mapping[str, Any]

DIAGNOSIS = {
    "ranking": (
        "Ranking",
        "Forcing the tokens kept on the clean image mends the attacked one, and forcing the tokens "
        "kept on the attacked image breaks the clean one: the choice of tokens is the cause.",
    ),
    "ranking_partial": (
        "Ranking (partial)",
        "Forcing the tokens kept on the clean image mends the attacked one, but the attacked "
        "choice alone does not break the clean image: the choice of tokens is necessary, not "
        "sufficient.",
    ),
    "content": (
        "Content",
        "Neither swap matters: the pixels mislead the compressed path whichever tokens are kept. "
        "This is an ordinary adversarial example that happens to spare the full path.",
    ),
    "mixed": (
        "Mixed",
        "The attacked choice of tokens breaks the clean image too, but the clean choice does not "
        "mend the attacked one: ranking and content both play a part.",
    ),
    "undiagnosed": (
        "Undiagnosed",
        "No swap test was made: the compressor has no kept set to exchange.",
    ),
}
"""Title and explanation of each diagnosis."""

KNOWLEDGE = {
    "none": ("Nothing", "the size of the image and of the token grid; a control, not an attacker"),
    "encoder": (
        "Vision encoder",
        "weights and gradients of the vision tower; not the text, the LLM or the compressor",
    ),
    "compressed": (
        "Encoder and compressor",
        "the vision tower, the compressor, and the LLM up to where the compressor ranks; "
        "not the answers",
    ),
    "white_box": ("Everything", "all weights, gradients through the whole model, and its answers"),
    "surrogate": ("Other models", "surrogate models only; nothing of the target"),
    "query": ("Answers only", "text answers of the deployed model, counted"),
    "scores": (
        "Answers and their scores",
        "text answers of the deployed model and how likely it finds each option, counted; "
        "no gradients",
    ),
}
"""Title and meaning of each level of knowledge."""

NORMS = {"linf": "ℓ∞", "l2": "ℓ2"}
"""How norms are written."""

HOW_TO_READ = (
    "Every sample is answered four times from saved 8-bit images: clean and attacked, with all "
    "visual tokens and with compression.",
    "The failure this tool looks for is right on clean full, clean compressed and attacked full, "
    "but wrong on attacked compressed. CSFR is its rate among the samples that are right clean.",
    "CSG is the relative accuracy lost to the attack with compression minus that lost without: "
    "0 means compression changes nothing, 1 that it alone decides. It can be negative.",
    "Brackets are 95 % intervals. n/a means an empty denominator, never 0.",
)
"""For readers who see such a report for the first time."""


def compression_known(knowledge: str, depends: bool) -> str:
    """What an attacker knows of the compression, in words.

    Args:
        knowledge: of the attack.
        depends: whether its images depend on the compressor.
    """
    if knowledge in ("query", "scores"):
        return "unknown, asked through"
    if knowledge == "surrogate":
        return "unknown"
    return "known" if depends else "unknown"


def minimal_text(found: Mapping[str, Any], epsilon: float) -> str:
    """What a search for minimal epsilons found, in one sentence.

    Args:
        found: ``minimal_epsilon`` of a cell.
        epsilon: budget of the cell, where the search ends.
    """
    ends = [
        "beyond the budget" if found[key] is None else epsilon_text(found[key])
        for key in ("median", "low", "high")
    ]
    if found["low"] is None:
        ends[1:] = []
    interval = f" (95 % interval {ends[1]} to {ends[2]})" if ends[1:] else ""
    return (
        f"Half of {count(found['n'], 'sample')} break at {ends[0]}{interval}; "
        f"{found['held']:,} hold at {epsilon_text(epsilon)}, the end of the search, and count as "
        "larger."
    )


def cell_name(cell: Cell) -> str:
    """Attack and budget of a cell, defence included if there is one."""
    shown = defense_text(cell)
    defense = f" against {shown}" if shown else ""
    return f"{plain(cell['attack'])} at ε {epsilon_text(cell['epsilon'])}{defense}"


def statements(summary: Mapping[str, Any]) -> list[str]:
    """What stands out, one statement per target and compression, the worst first."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in summary["cells"]:
        if cell["metrics"]["csfr"]["value"] is not None:
            groups.setdefault((cell["target"], cell["compression"]), []).append(cell)
    worst = {key: max(cells, key=_severity) for key, cells in groups.items()}
    ordered = sorted(groups, key=lambda key: -_severity(worst[key])[0])
    several = len({target for target, _ in groups}) > 1
    said = [_statement(key, worst[key], groups[key], several) for key in ordered]
    return said + [
        f"{_where(cell['target'], cell['compression'], several)}, {plain(cell['attack'])}: "
        f"{minimal_text(cell['minimal_epsilon'], cell['epsilon'])}"
        for cell in summary["cells"]
        if cell.get("minimal_epsilon", {}).get("n")
    ]


def _where(target: str, compression: str, several: bool) -> str:
    return f"{plain(compression)} on {plain(target)}" if several else plain(compression)


def _severity(cell: Cell) -> tuple[float, float]:
    csfr = cell["metrics"]["csfr"]
    return csfr["low"], csfr["value"]


def _statement(key: tuple[str, str], worst: Cell, cells: Sequence[Cell], several: bool) -> str:
    csfr, upr = worst["metrics"]["csfr"], worst["metrics"]["upr"]
    where = _where(*key, several)
    if not worst["failures"]:
        return (
            f"{where}: no attack broke a sample only when compressed; the rate may still be up to "
            f"{_percent(csfr['high'])} (95 %, n = {csfr['n']:,})."
        )
    text = (
        f"{where}: {cell_name(worst)} breaks {_percent(csfr['value'])} of the samples only when "
        f"compressed (CSFR {interval(csfr, 2)}, n = {csfr['n']:,}), while the full path keeps "
        f"{_percent(upr['value'])} of its accuracy."
    )
    return f"{text} {_cause(worst)}{_control(worst, cells)} {_alone(worst)}"


def _alone(cell: Cell) -> str:
    """What compression costs without an attack, so that it is never read as one."""
    drop = cell["metrics"]["clean_drop"]
    return f"Compression alone, without an attack, costs {interval(drop, 2)} of accuracy."


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.0f} %"


def _cause(cell: Cell) -> str:
    name, n = max(cell["diagnosis"].items(), key=lambda item: item[1])
    return f"Cause: {DIAGNOSIS[name][0].lower()} in {n} of {count(cell['failures'], 'failure')}."


def _control(worst: Cell, cells: Sequence[Cell]) -> str:
    """Compare with the cell of an attacker who knows nothing, at the same budget."""
    for cell in cells:
        same = (cell["epsilon"], cell["defense"]) == (worst["epsilon"], worst["defense"])
        if cell["knowledge"] == "none" and same and cell is not worst:
            csfr, mine = cell["metrics"]["csfr"], worst["metrics"]["csfr"]
            apart = mine["low"] > csfr["high"]
            return (
                f" At the same budget {plain(cell['attack'])} reaches {number(csfr['value'], 2)}; "
                f"the intervals {'do not overlap' if apart else 'overlap'}."
            )
    return ""
