"""Where what redteam measures stands in public taxonomies.

The mapping is ours: the bodies named neither made nor endorsed it. Identifiers move between
editions, so each entry names the edition it was read from and `VERSION` counts our changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reports.records import Cell

VERSION = 1
"""Of this table; counted up whenever an entry changes."""

NOTE = (
    "This mapping is ours; the bodies named neither made nor endorsed it. A report is evidence "
    "that can be used in an assessment. It shows no conformity with any of these texts."
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One identifier of a taxonomy.

    Attributes:
        scheme: the taxonomy and its edition.
        id: identifier in it.
        title: its name there.
        relation: how this run relates to it.
    """

    scheme: str
    id: str
    title: str
    relation: str


_ATLAS = "MITRE ATLAS (2025)"
_NIST = "NIST AI 100-2 E2025"

_ALWAYS = (
    Entry(_ATLAS, "AML.T0043", "Craft Adversarial Data", "what the attacks do"),
    Entry(_ATLAS, "AML.T0015", "Evade AI Model", "what a finding shows"),
    Entry(_ATLAS, "AML.T0031", "Erode AI Model Integrity", "what follows in a deployment"),
    Entry(_NIST, "NISTAML.022", "Evasion", "class of the attacks"),
    Entry(
        "CWE 4.x",
        "CWE-1039",
        "Inadequate Detection or Handling of Adversarial Input Perturbations in Automated "
        "Recognition Mechanism",
        "weakness that a finding is an instance of",
    ),
    Entry(
        "OWASP Top 10 for LLM Applications (2025)",
        "LLM01",
        "Prompt Injection",
        "related only: its multimodal form also enters through an image, but these attacks "
        "carry no instructions",
    ),
    Entry(
        "EU AI Act, Regulation (EU) 2024/1689",
        "Article 15",
        "Accuracy, robustness and cybersecurity",
        "evidence for testing of robustness against inputs designed to cause mistakes",
    ),
)

_BY_KNOWLEDGE = {
    "white_box": Entry(
        _ATLAS, "AML.T0043.000", "White-Box Optimization", "knowledge of the attacker"
    ),
    "compressed": Entry(
        _ATLAS, "AML.T0043.000", "White-Box Optimization", "knowledge of the attacker"
    ),
    "encoder": Entry(
        _ATLAS, "AML.T0043.000", "White-Box Optimization", "knowledge of the attacker"
    ),
    "query": Entry(_ATLAS, "AML.T0043.001", "Black-Box Optimization", "knowledge of the attacker"),
    "scores": Entry(_ATLAS, "AML.T0043.001", "Black-Box Optimization", "knowledge of the attacker"),
    "surrogate": Entry(_ATLAS, "AML.T0043.002", "Black-Box Transfer", "knowledge of the attacker"),
}
_BLACK_BOX = Entry(_NIST, "NISTAML.025", "Black-box Evasion", "class of the black-box attacks")


def entries(cells: Iterable[Cell]) -> list[Entry]:
    """Entries that apply to a run, by the knowledge its attacks use."""
    knowledge = {cell.knowledge for cell in cells}
    found = [*_ALWAYS, *(_BY_KNOWLEDGE[name] for name in sorted(knowledge & _BY_KNOWLEDGE.keys()))]
    if knowledge & {"query", "scores", "surrogate"}:
        found.append(_BLACK_BOX)
    unique = list(dict.fromkeys(found))
    schemes = list(dict.fromkeys(entry.scheme for entry in unique))
    return sorted(unique, key=lambda entry: (schemes.index(entry.scheme), entry.id))
