"""junit.xml: the verdict for continuous integration, in the dialect of pytest (``xunit2``).

| of redteam | in the file |
|---|---|
| a gate passed | a test case |
| a gate failed | ``<failure>`` |
| a gate inconclusive, and more samples decide | ``<skipped>`` |
| a gate inconclusive for any other cause: nothing measured, trials missing, doubt | ``<error>`` |
| a cell in an incomplete run that has missing trials or nothing measured | ``<error>`` |
| a cell without any measured trial, in a run that is complete | ``<skipped>`` |

An undecided gate is neither a failure, which would be a finding, nor an error of the run: it was
measured well, on too few samples. It never counts as passed either: the exit code is 4.

The first suite holds the gates, the second one test case for each cell, so that a run without gates
is readable too. Dialect: the elements and attributes that pytest 8 writes by default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from xml.etree import ElementTree as ET

from reports.records import Manifest
from reports.text import count, epsilon_text, interval, plain
from reports.undecided import cause_of
from reports.verdict import ExitCode, Verdict

_SHOWN = ("csfr", "csg", "acc_full_attacked", "acc_compressed_attacked")
_CELLS = 100
"""Cells of a gate that its text lists; all are in summary.json."""


def render_junit(manifest: Manifest, summary: Mapping[str, Any]) -> str:
    """Write junit.xml.

    Characters that XML cannot hold, and those that hide or reorder text, become visible escapes.

    Args:
        manifest: of the run.
        summary: as in summary.json.
    """
    root = ET.Element("testsuites", name="redteam")
    name = plain(manifest.name)
    if summary["gates"]:
        cases = [_gate(gate, f"{name}.gates") for gate in summary["gates"]]
        root.append(_suite(f"{name}: gates", manifest, cases, _properties(summary)))
    cases = [_cell(cell, summary, f"{name}.cells") for cell in summary["cells"]]
    if not cases:
        cases = [_nothing(summary, f"{name}.cells")]
    root.append(_suite(f"{name}: cells", manifest, cases, _properties(summary)))
    ET.indent(root)
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    return f"{head}{ET.tostring(root, encoding='unicode')}\n"


def _suite(
    name: str,
    manifest: Manifest,
    cases: Sequence[ET.Element],
    properties: Iterable[tuple[str, str]],
) -> ET.Element:
    totals = {
        attribute: str(sum(case.find(tag) is not None for case in cases))
        for attribute, tag in (("errors", "error"), ("failures", "failure"), ("skipped", "skipped"))
    }
    seconds = sum(float(case.get("time", "0")) for case in cases)
    suite = ET.Element(
        "testsuite",
        {
            "name": name,
            **totals,
            "tests": str(len(cases)),
            "time": f"{seconds:.3f}",
            **_timestamp(manifest),
        },
    )
    found = ET.SubElement(suite, "properties")
    for key, value in properties:
        ET.SubElement(found, "property", name=key, value=value)
    suite.extend(cases)
    return suite


def _timestamp(manifest: Manifest) -> dict[str, str]:
    try:
        return {"timestamp": datetime.fromisoformat(manifest.created).isoformat()}
    except ValueError:  # a manifest that was changed by hand
        return {}


def _properties(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    progress = summary["progress"]
    return [
        ("verdict", summary["verdict"]),
        ("exit_code", str(summary["exit_code"])),
        ("headline", plain(summary["headline"])),
        ("why", plain(summary["why"])),
        ("scenario_hash", plain(summary["scenario_hash"])),
        *((key, str(progress[key])) for key in ("expected", "measured", "errors", "missing")),
    ]


def _case(name: str, group: str, seconds: float = 0.0) -> ET.Element:
    return ET.Element("testcase", classname=group, name=name, time=f"{seconds:.3f}")


def _gate(gate: Mapping[str, Any], group: str) -> ET.Element:
    case = _case(plain(gate["name"]), group)
    place = f"scenario.yaml, line {gate['line']}" if gate["line"] else "scenario.yaml"
    more = len(gate["cells"]) - _CELLS
    lines = [
        f"{place}: {plain(gate['name'])}",
        *(f"{one['verdict']}: {one['label']}: {one['reason']}" for one in gate["cells"][:_CELLS]),
        *([f"and {count(more, 'further cell')}, see summary.json"] if more > 0 else []),
    ]
    if gate["verdict"] == Verdict.FAIL:
        return _with(case, "failure", "gate failed", gate["reason"], lines)
    if gate["verdict"] == Verdict.INCONCLUSIVE:
        tag = "skipped" if gate["more_samples_decide"] else "error"
        return _with(case, tag, f"inconclusive: {cause_of(gate)}", gate["reason"], lines)
    return _said(case, lines)


def _cell(cell: Mapping[str, Any], summary: Mapping[str, Any], group: str) -> ET.Element:
    seconds = sum(summary["timings"]["cells"].get(cell["id"], {}).values())
    name = " · ".join(
        plain(str(cell[key])) for key in ("target", "compression", "attack", "defense")
    )
    case = _case(f"{name} · ε {epsilon_text(cell['epsilon'])}", group, seconds)
    lines = [
        f"{cell['n']:,} measured, {count(cell['errors'], 'error')}, {cell['missing']:,} missing",
        *(f"{key}: {interval(cell['metrics'][key])}" for key in _SHOWN if key in cell["metrics"]),
    ]
    if summary["exit_code"] == ExitCode.INCOMPLETE and (cell["missing"] or not cell["n"]):
        return _with(case, "error", "not measured", lines[0], lines)
    if not cell["n"]:
        return _with(case, "skipped", "not measured", lines[0], lines)
    return _said(case, lines)


def _nothing(summary: Mapping[str, Any], group: str) -> ET.Element:
    why = plain(summary["why"])
    return _with(_case("plan", group), "error", "nothing selected", why, [why])


def _with(case: ET.Element, tag: str, kind: str, message: str, lines: Iterable[str]) -> ET.Element:
    found = ET.SubElement(case, tag, type=kind, message=plain(message))
    found.text = _text(lines)
    return case


def _said(case: ET.Element, lines: Iterable[str]) -> ET.Element:
    ET.SubElement(case, "system-out").text = _text(lines)
    return case


def _text(lines: Iterable[str]) -> str:
    return "\n".join(plain(line) for line in lines)
