"""results.sarif: failed and undecided gates for code scanning, as SARIF 2.1.0 (OASIS standard).

One result for each gate that failed (level *error*) or is inconclusive (level *warning*), at the
gate's line in the scenario; a gate that passed is no result. The metrics of the gates are the
rules. What could not be measured is a notification of the invocation, never a result.

In SARIF a message may hold placeholders ``{0}`` and links ``[text](place)``. Foreign strings may
not, so their braces are doubled and their brackets escaped (sections 3.11.5 and 3.11.6).
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final
from urllib.parse import quote

from reports import taxonomy
from reports.command import scenario_in
from reports.records import Cell, Manifest
from reports.registry import METRICS
from reports.text import count, plain
from reports.undecided import cause_of
from reports.verdict import ExitCode, Verdict

SCHEMA: Final = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
FINGERPRINT: Final = "redteamGate/v1"
"""Name of the fingerprint by which the same gate is known in another run."""

_LEVELS: Final = {Verdict.FAIL: "error", Verdict.INCONCLUSIVE: "warning"}
_CELLS: Final = 20
"""Cells that a message lists; all are in summary.json."""
_UTC: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(?:Z|\+00:00)")


def render_sarif(manifest: Manifest, summary: Mapping[str, Any], scenario: str = "") -> str:
    """Write results.sarif.

    Args:
        manifest: of the run.
        summary: as in summary.json.
        scenario: text of the scenario as the run folder keeps it.
    """
    found = [gate for gate in summary["gates"] if gate["verdict"] in _LEVELS]
    rules = list(dict.fromkeys(plain(gate["metric"]) for gate in summary["gates"]))
    entries = taxonomy.entries(manifest.cells)
    taxa = _Taxa(entries)
    place = _Place.of(manifest, scenario)
    run = {
        "tool": {"driver": _driver(manifest, rules, taxa)},
        "invocations": [_invocation(manifest, summary)],
        "taxonomies": taxa.components,
        "originalUriBaseIds": {place.base: {"description": {"text": place.meaning}}},
        "automationDetails": {"id": f"redteam/{quote(plain(manifest.name), safe='')}/"},
        "columnKind": "unicodeCodePoints",
        "results": _results(found, rules, manifest, taxa, place),
        "properties": {
            "verdict": summary["verdict"],
            "exitCode": summary["exit_code"],
            "headline": plain(summary["headline"]),
            "scenarioHash": plain(summary["scenario_hash"]),
            "taxonomyVersion": taxonomy.VERSION,
            "taxonomyNote": taxonomy.NOTE,
        },
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


class _Taxa:
    """The taxonomies of a run and references into them."""

    def __init__(self, entries: Sequence[taxonomy.Entry]) -> None:
        keys = list(dict.fromkeys(entry.key for entry in entries))
        grouped = {key: [entry for entry in entries if entry.key == key] for key in keys}
        self.components = [_component(taxonomy.SCHEMES[key], grouped[key]) for key in keys]
        self.supported = [
            _reference(taxonomy.SCHEMES[key], index) for index, key in enumerate(keys)
        ]
        self._places = {
            (entry.key, entry.id): {
                "id": entry.id,
                "index": row,
                "toolComponent": self.supported[index],
            }
            for index, key in enumerate(keys)
            for row, entry in enumerate(grouped[key])
        }

    def of(self, cells: Iterable[Cell]) -> list[dict[str, Any]]:
        """References to what applies to some of the run's cells."""
        return [self._places[entry.key, entry.id] for entry in taxonomy.entries(cells)]


def _guid(scheme: taxonomy.Scheme) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{scheme.url}#{scheme.edition}"))


def _reference(scheme: taxonomy.Scheme, index: int) -> dict[str, Any]:
    return {"name": scheme.name, "index": index, "guid": _guid(scheme)}


def _component(scheme: taxonomy.Scheme, entries: Sequence[taxonomy.Entry]) -> dict[str, Any]:
    return {
        "name": scheme.name,
        "version": scheme.edition,
        "guid": _guid(scheme),
        "organization": scheme.organization,
        "informationUri": scheme.url,
        "shortDescription": {"text": f"{scheme.title}."},
        "isComprehensive": False,
        "taxa": [
            {
                "id": entry.id,
                "shortDescription": {"text": f"{entry.title}."},
                "fullDescription": {"text": f"{entry.title}: {entry.relation}."},
            }
            for entry in entries
        ],
    }


def _driver(manifest: Manifest, rules: Sequence[str], taxa: _Taxa) -> dict[str, Any]:
    version = str(manifest.provenance.get("versions", {}).get("redteam", ""))
    known = re.fullmatch(r"\d+(\.\d+)*[\w.+-]*", version)
    relations = [
        {"target": reference, "kinds": ["relevant"]} for reference in taxa.of(manifest.cells)
    ]
    return {
        "name": "redteam",
        **({"version": version} if known else {}),
        "shortDescription": {
            "text": "Robustness testing of compressed inference in large vision-language models."
        },
        "supportedTaxonomies": taxa.supported,
        "rules": [_rule(name, relations) for name in rules],
    }


def _rule(name: str, relations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metric = METRICS.get(name)
    title = metric.title if metric else _inert(name)
    definition = _inert(metric.definition) if metric else "There is no metric of this name."
    help_text = (
        f"{definition} Defined over {metric.denominator if metric else 'nothing'}. A gate fails "
        "if the bound of the metric at the gate's confidence is beyond the limit, and is "
        "inconclusive (a warning) if the limit lies between its bounds, or if something could not "
        "be measured. Open report.html of the run for the pictures, the tokens kept and the cause "
        "of each failure; more samples bring the bounds together; a defence or a larger token "
        "budget lowers the rate."
    )
    return {
        "id": name,
        "name": "".join(map(str.capitalize, re.findall(r"[A-Za-z0-9]+", name))) + "Gate",
        "shortDescription": {"text": f"{title} is beyond the limit of a gate."},
        "fullDescription": {"text": definition},
        "help": {"text": help_text, "markdown": help_text},
        "defaultConfiguration": {"level": "error"},
        "properties": {
            "tags": ["security", "robustness", "machine-learning", "external/cwe/cwe-1039"],
            "precision": "high",
        },
        "relationships": list(relations),
    }


def _invocation(manifest: Manifest, summary: Mapping[str, Any]) -> dict[str, Any]:
    progress, code = summary["progress"], summary["exit_code"]
    notes = []
    if code in (ExitCode.INCOMPLETE, ExitCode.NOTHING_SELECTED):
        notes.append({"level": "error", "message": {"text": _inert(summary["why"])}})
    if progress["errors"]:
        text = f"{count(progress['errors'], 'trial')} ended in an error and are in no metric."
        notes.append({"level": "warning", "message": {"text": text}})
    started = _UTC.fullmatch(manifest.created)
    return {
        "executionSuccessful": code not in (ExitCode.INCOMPLETE, ExitCode.NOTHING_SELECTED),
        "exitCode": code,
        "exitCodeDescription": _inert(summary["headline"]),
        **({"startTimeUtc": f"{started[1]}Z"} if started else {}),
        "toolExecutionNotifications": notes,
    }


def _results(
    gates: Sequence[Mapping[str, Any]],
    rules: Sequence[str],
    manifest: Manifest,
    taxa: _Taxa,
    place: _Place,
) -> list[dict[str, Any]]:
    seen: dict[str, int] = {}
    cells = {cell.id: cell for cell in manifest.cells}
    found = []
    for gate in gates:
        print_ = _fingerprint(manifest, gate)
        seen[print_] = seen.get(print_, 0) + 1
        twin = "" if seen[print_] == 1 else f":{seen[print_]}"  # the same gate written twice
        covered = [cells[one["cell"]] for one in gate["cells"]]
        found.append(
            {
                "ruleId": plain(gate["metric"]),
                "ruleIndex": rules.index(plain(gate["metric"])),
                "kind": "fail",
                "level": _LEVELS[gate["verdict"]],
                "message": {"text": _message(gate)},
                "locations": [place.at(gate["line"])],
                "partialFingerprints": {FINGERPRINT: f"{print_}{twin}"},
                "taxa": taxa.of(covered or manifest.cells),
                "properties": _numbers(gate),
            }
        )
    return found


def _numbers(gate: Mapping[str, Any]) -> dict[str, Any]:
    """The decision in numbers, cell by cell."""
    inconclusive = gate["verdict"] == Verdict.INCONCLUSIVE
    limits = ("max", "min", "max_increase", "max_decrease", "confidence")
    numbers = ("cell", "verdict", "value", "low", "high", "bound_low", "bound_high", "n")
    return {
        "verdict": gate["verdict"],
        **({"inconclusive": cause_of(gate)} if inconclusive else {}),
        **{key: gate[key] for key in limits if gate[key] is not None},
        "cells": [{key: one[key] for key in numbers} for one in gate["cells"]],
    }


def _message(gate: Mapping[str, Any]) -> str:
    parts = [f"{gate['name']}: {gate['verdict']}. {gate['reason']}"]
    others = [one for one in gate["cells"] if one["verdict"] == gate["verdict"]]
    if len(others) > 1:
        shown = [f"{one['label']}: {one['reason']}" for one in others[:_CELLS]]
        more = f" and {len(others) - _CELLS} more" if len(others) > _CELLS else ""
        parts.append(f"{count(len(others), 'cell')}: {'; '.join(shown)}{more}.")
    return _inert(" ".join(parts), 8_000)


def _fingerprint(manifest: Manifest, gate: Mapping[str, Any]) -> str:
    """Equal for the same gate in another run, whatever its limit, its line and what was found."""
    what = [manifest.name, gate["name"], gate["metric"], sorted(gate["where"].items())]
    text = json.dumps(what, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Place:
    """The scenario file, as far as it can be named.

    The command that made the run names it relative to where it was started, in continuous
    integration the repository. Where it does not, the copy in the run folder is meant, which
    begins with one comment line for each ``--set``.
    """

    def __init__(self, uri: str, base: str, meaning: str, shift: int) -> None:
        self.base, self.meaning = base, meaning
        self._uri, self._shift = uri, shift

    @classmethod
    def of(cls, manifest: Manifest, scenario: str) -> _Place:
        path = _path_in(str(manifest.provenance.get("command", "")))
        if path:
            return cls(quote(path), "SRCROOT", "Where the run was started.", 0)
        copied = sum(1 for _ in _leading_overrides(scenario))
        return cls("scenario.yaml", "RUNFOLDER", "The folder of the run.", copied)

    def at(self, line: int | None) -> dict[str, Any]:
        """Location of a gate; one that came by ``--set`` has no line and stands at the top."""
        return {
            "physicalLocation": {
                "artifactLocation": {"uri": self._uri, "uriBaseId": self.base},
                "region": {"startLine": 1 if line is None else line + self._shift},
            }
        }


def _leading_overrides(scenario: str) -> Iterable[str]:
    for line in scenario.splitlines():
        if not line.startswith("# --set "):
            return
        yield line


def _path_in(command: str) -> str:
    """The scenario file of a command if it lies below the folder of the command; "" if not."""
    name = plain(scenario_in(command)).replace("\\", "/")
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "…" in path.parts or ":" in name
    return "" if outside or not name else str(path)


def _inert(text: str, limit: int = 2_000) -> str:
    """A foreign string as literal text of a message: no placeholder, no link, nothing hidden."""
    doubled = plain(text, limit).replace("{", "{{").replace("}", "}}")
    return re.sub(r"([\\\[\]])", r"\\\1", doubled)
