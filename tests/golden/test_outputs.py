"""JUnit, SARIF, model card and table of trials: valid, inert, and of one mind with the verdict."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest
import synthetic_run
import xmlschema
import yaml
from hostile_run import FORBIDDEN, HOSTILE, build, samples
from report_data import cell, manifest, trial

import reports
from reports import taxonomy
from reports.errors import ReportError, StoreError
from reports.export import FORMATS, export
from reports.records import GateSpec
from reports.sarif import FINGERPRINT
from reports.store import RunStore
from reports.trials_table import COLUMNS, neutral

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
PUBLISHED = "node_modules/@microsoft/sarif-multitool-linux/sarif-2.1.0.json"
XSD = xmlschema.XMLSchema10(FIXTURES / "junit.xsd")


def published_schema() -> Path:
    """The schema of OASIS, from a package of npm."""
    return Path(os.environ.get("SARIF_SCHEMA", ROOT / PUBLISHED))


def junit(folder: Path) -> ET.Element:
    XSD.validate(folder / "junit.xml")
    return ET.parse(folder / "junit.xml").getroot()  # noqa: S314 - written a moment ago


def sarif(folder: Path) -> dict[str, Any]:
    log = json.loads((folder / "results.sarif").read_text(encoding="utf-8"))
    schema = json.loads((FIXTURES / "sarif-reduced.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(schema).validate(log)
    (run,) = log["runs"]
    found: dict[str, Any] = run
    return found


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = synthetic_run.build(tmp_path_factory.mktemp("runs") / "drawn", samples=24)
    reports.build_reports(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("runs") / "hostile")
    reports.build_reports(folder)
    for name in FORMATS:
        export(folder, name)
    return folder


# One object, many readers.


def gated(folder: Path, **limits: float) -> None:
    """Change the limits of the first gate in the manifest, and leave it alone."""
    path = folder / "manifest.json"
    found = json.loads(path.read_text())
    found["gates"] = [{**found["gates"][0], "max": None, **limits}]
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("limits", "verdict", "code", "tag", "level", "mark"),
    [
        ({"max": 0.1}, "fail", 1, "failure", "error", "❌"),
        ({"max": 0.6}, "inconclusive", 4, "skipped", "warning", "❔"),
        ({"max": 0.95}, "pass", 0, None, None, "✅"),
        ({"min": 0.9}, "fail", 1, "failure", "error", "❌"),
    ],
)
def test_every_reader_follows_the_decision(
    tmp_path: Path, limits: dict[str, float], verdict: str, code: int, tag: str | None,
    level: str | None, mark: str,
) -> None:  # fmt: skip
    folder = synthetic_run.build(tmp_path / "run", samples=24)
    gated(folder, **limits)
    built = reports.build_reports(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert (built.verdict, int(built.exit_code)) == (verdict, code)
    assert (summary["verdict"], summary["exit_code"]) == (verdict, code)
    done = subprocess.run(
        [sys.executable, "-m", "redteam", "report", str(folder)], cwd=ROOT, capture_output=True
    )
    assert done.returncode == code
    page = (folder / "report.html").read_text()
    assert f"<h2>{built.headline}</h2>" in page
    assert (folder / "summary.md").read_text().startswith(f"## {mark} {built.headline}: ")
    gates = junit(folder)[0]
    (case,) = gates.findall("testcase")
    counts = {name: int(gates.attrib[name]) for name in ("failures", "errors", "skipped")}
    assert counts == {
        "failures": tag == "failure", "errors": tag == "error", "skipped": tag == "skipped"
    }  # fmt: skip
    results = sarif(folder)["results"]
    assert [one["level"] for one in results] == ([level] if level else [])
    reason = summary["gates"][0]["reason"]
    if tag:
        element = case.find(tag)
        assert element is not None
        assert element.get("message") == reason
        assert reason in results[0]["message"]["text"].replace("\\", "")


@pytest.mark.parametrize(
    ("now", "limit", "verdict", "tag", "level"),
    [
        ("1110", 0.1, "fail", "failure", "error"),
        ("1111", 0.1, "pass", None, None),
        (None, 0.1, "inconclusive", "error", "warning"),
    ],
)
def test_a_gate_since_a_baseline_reads_the_same(
    tmp_path: Path, now: str | None, limit: float, verdict: str, tag: str | None, level: str | None
) -> None:
    cells = [cell(), cell("c2", attack="noise", knowledge="none")]  # no doubt without a control
    gate = GateSpec(name="g", metric="csfr", max_increase=limit, where={"attack": "noise"}, line=3)
    for name, outcome in (("base", "1111"), ("run", now or "1111")):
        with RunStore.create(tmp_path / name, manifest(60, cells=cells, gates=[gate])) as store:
            for one in cells:
                store.append(trial(f"s{i}", outcome, one.id) for i in range(60))
    baseline = tmp_path / "base" if now else None
    built = reports.build_reports(tmp_path / "run", baseline)
    assert built.verdict == verdict
    (case,) = junit(tmp_path / "run")[0].findall("testcase")
    assert [one for one in ("failure", "error", "skipped") if case.find(one) is not None] == (
        [tag] if tag else []
    )
    results = sarif(tmp_path / "run")["results"]
    assert [one["level"] for one in results] == ([level] if level else [])
    assert all(one["properties"]["max_increase"] == limit for one in results)
    again = export(tmp_path / "run", "junit", tmp_path / "again.xml", baseline)
    assert again.read_text() == (tmp_path / "run" / "junit.xml").read_text()


def undecided_run(folder: Path, outcomes: list[str], **limits: float) -> Path:
    gates = [GateSpec(name="g", metric="csfr", line=7, **limits)]
    with RunStore.create(folder, manifest(len(outcomes), gates=gates)) as store:
        store.append(trial(f"s{i}", one) for i, one in enumerate(outcomes) if one != "missing")
    reports.build_reports(folder)
    return folder


@pytest.mark.parametrize(
    ("outcomes", "kind", "tag"),
    [
        (["1111"] * 4, "samples", "skipped"),
        (["1111"] * 8 + ["error"], "incomplete", "error"),
        (["1111"] * 40 + ["missing"], "incomplete", "error"),
        (["0000"] * 4, "unmeasured", "error"),
        (["1111"] * 60, "doubt", "error"),
    ],
)
def test_what_cannot_be_measured_is_an_error(
    tmp_path: Path, outcomes: list[str], kind: str, tag: str
) -> None:
    folder = undecided_run(tmp_path / "run", outcomes, max=0.1)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["gates"][0]["verdict"] == "inconclusive", summary["gates"][0]["reason"]
    (case,) = junit(folder)[0].findall("testcase")
    element = case.find(tag)
    assert element is not None
    assert element.get("type") == f"inconclusive: {kind}"
    (result,) = sarif(folder)["results"]
    assert (result["level"], result["properties"]["inconclusive"]) == ("warning", kind)


def test_an_incomplete_run_is_an_error_of_its_cells(tmp_path: Path) -> None:
    folder = undecided_run(tmp_path / "run", ["1110"] * 40 + ["missing"], max=0.1)
    gates, cells = junit(folder)
    assert (gates.get("failures"), cells.get("errors")) == ("1", "1"), "failed all the same"
    (told,) = sarif(folder)["invocations"]
    assert (told["executionSuccessful"], told["exitCode"]) == (False, 3)
    assert told["toolExecutionNotifications"][0]["level"] == "error"


def test_a_gate_without_cells_is_an_error(tmp_path: Path) -> None:
    gates = [GateSpec(name="g", metric="csfr", max=0.1, where={"attack": "nobody"})]
    with RunStore.create(tmp_path / "run", manifest(1, gates=gates)) as store:
        store.append([trial()])
    reports.build_reports(tmp_path / "run")
    (case,) = junit(tmp_path / "run")[0].findall("testcase")
    assert case.find("error") is not None


# JUnit.


def test_the_schema_is_that_of_pytest(tmp_path: Path) -> None:
    """Its own files are valid; ours then speak the same dialect."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n"
        "@pytest.fixture\ndef broken():\n    raise RuntimeError('no')\n\n"
        "def test_passes(record_property):\n    record_property('a', 'b')\n    print('said')\n\n"
        "def test_fails():\n    assert 1 == 2, '<&]]>'\n\n"
        "def test_errors(broken): ...\n\n"
        "@pytest.mark.skip(reason='not now')\ndef test_skips(): ...\n"
    )
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".",
         "--junitxml=out.xml", "test_it.py"], cwd=tmp_path, capture_output=True,
    )  # fmt: skip
    XSD.validate(tmp_path / "out.xml")
    (suite,) = ET.parse(tmp_path / "out.xml").getroot()  # noqa: S314 - likewise
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == [
        "4", "1", "1", "1"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"(</?)testsuites", r"\1suites"),
        (r'tests="3"', 'tests="three"'),
        (r'tests="3" ', ""),
        (r"(</?)failure\b", r"\1failed"),
        (r' message="', ' words="'),
        (r' time="', ' time="x'),
        (r'timestamp="2026-01-02T', 'timestamp="today '),
        (r"<testcase ", '<testcase owner="me" '),
        (r"(<testcase[^>]*>)", r'\1<skipped message="" />'),
    ],
)
def test_the_schema_refuses_what_is_wrong(drawn: Path, pattern: str, replacement: str) -> None:
    text = (drawn / "junit.xml").read_text(encoding="utf-8")
    broken, count = re.subn(pattern, replacement, text)
    assert count
    assert XSD.is_valid(text)
    assert not XSD.is_valid(broken)


def test_junit_of_a_drawn_run(drawn: Path) -> None:
    gates, cells = junit(drawn)
    assert [case.get("name") for case in gates.findall("testcase")] == [
        "no compression-specific failures", "noise is harmless", "clean accuracy holds"
    ]  # fmt: skip
    assert [gates.get(name) for name in ("tests", "failures", "errors", "skipped")] == [
        "3", "1", "0", "2"
    ]  # fmt: skip
    assert cells.get("tests") == "18"
    case = cells.findall("testcase")[2]
    assert case.get("name") == "scenes-a · fastv@2 · noise · none · ε 16/255"
    assert "24 measured" in str(case.findtext("system-out"))
    failure = gates[1].find("failure")
    assert failure is not None
    assert "scenario.yaml, line 23" in str(failure.text)


def test_junit_without_gates_tells_the_cells(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", manifest()) as store:
        store.append([trial(f"s{i}", "1110") for i in range(4)])
    reports.build_reports(tmp_path / "run")
    (cells,) = junit(tmp_path / "run")
    (case,) = cells.findall("testcase")
    assert "csfr: 1.000" in str(case.findtext("system-out"))
    assert cells.get("failures") == cells.get("errors") == cells.get("skipped") == "0"


def test_junit_of_nothing(tmp_path: Path) -> None:
    RunStore.create(tmp_path / "run", manifest(0, cells=[])).close()
    reports.build_reports(tmp_path / "run")
    (cells,) = junit(tmp_path / "run")
    assert cells.get("errors") == "1"
    assert sarif(tmp_path / "run")["invocations"][0]["exitCode"] == 5


# SARIF.


def test_sarif_stands_at_the_gate(drawn: Path) -> None:
    run = sarif(drawn)
    assert [
        (one["ruleId"], one["level"], one["locations"][0]["physicalLocation"])
        for one in run["results"]
    ] == [
        (rule, level, {
            "artifactLocation": {"uri": "scenarios/quickstart.yaml", "uriBaseId": "SRCROOT"},
            "region": {"startLine": line},
        })
        for rule, level, line in (
            ("csfr", "error", 23), ("csg", "warning", 26), ("acc_compressed_clean", "warning", 28)
        )
    ]  # fmt: skip
    rules = run["tool"]["driver"]["rules"]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
    assert all(rule["help"]["text"] for rule in rules)


def test_sarif_references_hit_what_they_name(drawn: Path) -> None:
    run = sarif(drawn)
    names = {one["name"] for one in run["taxonomies"]}
    assert {"MITRE ATLAS", "CWE", "NIST AI 100-2", "EU AI Act"} <= names
    references = [
        *(reference for one in run["results"] for reference in one["taxa"]),
        *(
            one["target"]
            for rule in run["tool"]["driver"]["rules"]
            for one in rule["relationships"]
        ),
    ]
    assert {one["id"] for one in references} >= {"CWE-1039", "AML.T0043", "Article 15"}
    for reference in references:
        component = run["taxonomies"][reference["toolComponent"]["index"]]
        assert component["name"] == reference["toolComponent"]["name"]
        assert component["guid"] == reference["toolComponent"]["guid"]
        assert component["taxa"][reference["index"]]["id"] == reference["id"]


def test_sarif_says_evidence_and_never_compliant(drawn: Path) -> None:
    text = (drawn / "results.sarif").read_text()
    assert "evidence" in text
    for word in ("compliant", "certif"):
        assert word not in text.lower()


def test_a_fingerprint_is_of_the_gate_and_not_of_what_was_found(tmp_path: Path) -> None:
    def prints(folder: Path, outcome: str, line: int, limit: float, name: str) -> list[str]:
        gates = [GateSpec(name=name, metric="csfr", max=limit, line=line)] * 2
        with RunStore.create(folder, manifest(4, gates=gates)) as store:
            store.append(trial(f"s{i}", outcome) for i in range(4))
        reports.build_reports(folder)
        return [one["partialFingerprints"][FINGERPRINT] for one in sarif(folder)["results"]]

    first = prints(tmp_path / "a", "1110", 3, 0.1, "g")
    assert len(set(first)) == 2, "the same gate twice is two alerts"
    assert prints(tmp_path / "b", "1111", 90, 0.3, "g") == first
    assert set(prints(tmp_path / "c", "1110", 3, 0.1, "h")).isdisjoint(first)


@pytest.mark.parametrize(
    ("command", "uri", "line"),
    [
        ("redteam run a/b.yaml --limit 4", "a/b.yaml", 7),
        ("redteam run 'a b.yaml'", "a%20b.yaml", 7),
        ("redteam run --set dataset.path=x.yaml ci-gate", "scenario.yaml", 9),
        ("redteam run quickstart", "scenario.yaml", 9),
        ("redteam run ../x.yaml", "scenario.yaml", 9),
        ("redteam run …/x.yaml", "scenario.yaml", 9),
        ("redteam run /etc/x.yaml", "scenario.yaml", 9),
        ("redteam run file:x.yaml", "scenario.yaml", 9),
        ("redteam run 'unclosed.yaml", "scenario.yaml", 9),
        ("", "scenario.yaml", 9),
    ],
)
def test_sarif_names_a_file_of_the_repository_or_the_copy(
    tmp_path: Path, command: str, uri: str, line: int
) -> None:
    gates = [GateSpec(name="g", metric="csfr", max=0.1, line=7)]
    planned = manifest(1, gates=gates, provenance={"command": command})
    copy = "# --set seed=1\n# --set name=x\nname: x\n"
    with RunStore.create(tmp_path / "run", planned, copy) as store:
        store.append([trial()])
    reports.build_reports(tmp_path / "run")
    place = sarif(tmp_path / "run")["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == uri
    assert place["region"]["startLine"] == line, "the copy begins with the overrides"


@pytest.mark.skipif(
    not published_schema().is_file(),
    reason="npm install --no-save @microsoft/sarif-multitool-linux, or SARIF_SCHEMA=file",
)
@pytest.mark.parametrize("name", ["drawn", "hostile"])
def test_sarif_meets_the_published_schema(name: str, request: pytest.FixtureRequest) -> None:
    schema = json.loads(published_schema().read_text(encoding="utf-8-sig"))
    kind = jsonschema.validators.validator_for(schema)
    log = json.loads((request.getfixturevalue(name) / "results.sarif").read_text())
    kind(schema).validate(log)
    log["runs"][0]["results"][0]["levle"] = "error"
    with pytest.raises(jsonschema.ValidationError):
        kind(schema).validate(log)


# Taxonomy.


def test_the_taxonomy_is_one_versioned_file() -> None:
    data = json.loads((ROOT / "reports" / "taxonomy.json").read_text())
    assert data["version"] == taxonomy.VERSION
    keys = [(one["scheme"], one["id"]) for one in data["entries"]]
    assert len(keys) == len(set(keys))
    assert {scheme for scheme, _ in keys} == set(data["schemes"])
    assert "compliant" not in json.dumps(data)


def test_entries_follow_the_attacks() -> None:
    def ids(**changes: Any) -> set[str]:
        return {one.id for one in taxonomy.entries([cell(**changes)])}

    always = ids(knowledge="none")
    assert ids(knowledge="surrogate") - always == {"AML.T0043.002", "NISTAML.025"}
    assert ids(knowledge="encoder") - always == {"AML.T0043.000"}
    slow = ids(knowledge="none", spec={"attack": {"type": "verbose"}})
    assert slow - always == {"AML.T0029", "NISTAML.014", "LLM10"}
    assert [one.key for one in taxonomy.entries([cell()])] == sorted(
        (one.key for one in taxonomy.entries([cell()])), key=list(taxonomy.SCHEMES).index
    )


# Tables and cards.


def test_csv_has_a_line_for_each_trial(drawn: Path) -> None:
    found = rows(export(drawn, "csv"))
    trials = {(one.cell, one.sample): one for one in RunStore.read(drawn).trials()}
    assert len(found) == len(trials) == 18 * 24
    for row in found:
        one = trials[row["cell"], row["sample"]]
        if one.error is not None:
            assert row["error_type"] == "OutOfMemoryError"
            assert row["compression_specific_failure"] == row["linf"] == ""
            continue
        assert one.answers is not None
        assert one.distance is not None
        assert row["attacked_compressed_text"] == one.answers.attacked_compressed.text
        flag = {True: "true", False: "false"}
        assert row["compression_specific_failure"] == flag[one.compression_specific_failure]
        assert float(row["linf"]) == one.distance.linf
        assert (row["diagnosis"] != "") == (one.swap is not None)


def test_parquet_holds_the_same(drawn: Path, hostile: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(export(drawn, "parquet"))
    assert table.column_names == [one.name for one in COLUMNS]
    assert table.num_rows == 18 * 24
    found = rows(export(drawn, "csv"))
    assert table["question"].to_pylist() == [row["question"] for row in found]
    assert table["linf"].to_pylist() == [float(row["linf"] or "nan") or None if row["linf"] else
                                         None for row in found]  # fmt: skip
    raw = parquet.read_table(export(hostile, "parquet"))
    assert raw["truth"].to_pylist()[: len(HOSTILE)] == HOSTILE, "texts as they are"


def test_parquet_without_pyarrow_says_what_to_install(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ReportError, match=r"pip install 'redteam\[data\]', or .* --format csv"):
        export(drawn, "parquet", tmp_path / "t.parquet")
    assert not list(tmp_path.iterdir())


def test_every_column_is_documented() -> None:
    text = (ROOT / "docs" / "outputs.md").read_text(encoding="utf-8")
    names = [one.name for one in COLUMNS]
    assert len(names) == len(set(names))
    for name in names:
        assert f"`{name}`" in text, name
    assert all(one.meaning.endswith(".") for one in COLUMNS)


def front_matter(text: str) -> Any:
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert head
    return yaml.safe_load(head[1])


@pytest.mark.parametrize("name", ["drawn", "hostile"])
def test_the_hub_reads_the_model_card(name: str, request: pytest.FixtureRequest) -> None:
    hub = pytest.importorskip("huggingface_hub")
    path = export(request.getfixturevalue(name), "model-card")
    card = hub.ModelCard.load(path)
    assert card.data.eval_results
    assert {one.metric_type for one in card.data.eval_results} >= {"csfr", "csg"}
    assert all(isinstance(one.metric_value, float) for one in card.data.eval_results)


def test_a_model_card_says_what_was_measured(drawn: Path) -> None:
    text = export(drawn, "model-card").read_text(encoding="utf-8")
    (entry,) = front_matter(text)["model-index"]
    metrics = {one["name"]: one["value"] for one in entry["results"][0]["metrics"]}
    summary = json.loads((drawn / "summary.json").read_text())
    last = summary["cells"][-1]
    assert metrics["CSFR (visionzip, caa at 16/255)"] == last["metrics"]["csfr"]["value"]
    assert len(metrics) == 18 * 4 + 2 * 2, "clean accuracies once for each compression"
    assert "Verdict: **Fail**" in text
    assert "not a certificate" in text


# Hostile strings.


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    for name in ("junit.xml", "results.sarif", "trials.csv", "model-card.md", "summary.md"):
        yield name, (folder / name).read_text(encoding="utf-8")


def test_no_hidden_character_survives(hostile: Path) -> None:
    for name, text in texts(hostile):
        for character in FORBIDDEN:
            assert character not in text, f"{name}: U+{ord(character):04X}"
        allowed = {"\n", "\r"} if name == "trials.csv" else {"\n"}
        assert not {c for c in text if ord(c) < 32} - allowed, name


def test_junit_is_inert(hostile: Path) -> None:
    gates, cells = junit(hostile)
    assert len(gates.findall("testcase")) == len(HOSTILE) + 1, "nothing was injected"
    assert len(cells.findall("testcase")) == 1
    assert not [one for one in gates.iter("testcase") if one.get("name") == "injected"]
    text = (hostile / "junit.xml").read_text(encoding="utf-8")
    assert "<!" not in text
    assert "]]>" not in text
    assert text.count("<?") == 1
    assert {one.tag for one in gates.iter()} | {one.tag for one in cells.iter()} <= {
        "testsuite", "testcase", "properties", "property", "failure", "error", "skipped",
        "system-out",
    }  # fmt: skip
    assert gates.findall("testcase")[0].get("name") == HOSTILE[0]


def test_sarif_is_inert(hostile: Path) -> None:
    text = (hostile / "results.sarif").read_text(encoding="utf-8")
    assert text.isascii()
    run = sarif(hostile)
    assert len(run["results"]) == len(HOSTILE) + 1
    for result in run["results"]:
        message = result["message"]["text"]
        bare = re.sub(r"\\[\\\[\]]", "", message)
        assert "[" not in bare, "no link"
        assert "]" not in bare
        assert not re.search(r"(?<!\{)(\{\{)*\{\d+\}", message), "no placeholder"
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert re.fullmatch(r"[A-Za-z0-9._~%/-]+", uri)
        assert ".." not in uri
    assert "version" not in run["tool"]["driver"], "that of a hostile manifest is none"


def test_csv_is_inert(hostile: Path) -> None:
    path = hostile / "trials.csv"
    found = rows(path)
    assert len(found) == len(HOSTILE) + 1, "no text has torn a row"
    numbers = {one.name for one in COLUMNS if one.kind in ("integer", "number")}
    for row in found:
        assert None not in row, "no column too many"
        for name, value in row.items():
            if name not in numbers:
                assert not re.match(r"[\s'\"]*[=+\-@＝＋－＠|%]", value[value[:1] == "'" :]) or (
                    value.startswith("'")
                ), (name, value)
                assert "\n" not in value
    assert found[9]["truth"] == f"'{HOSTILE[9]}"
    assert [row["sample"] for row in found[:3]] == samples()[:3]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("yes", "yes"),
        ("", ""),
        ("it's 1+1", "it's 1+1"),
        ("=1", "'=1"),
        ("-1", "'-1"),
        ("  +1", "'  +1"),
        ("\t@x", "' @x"),
        ("\r=1", "' =1"),
        ("\u202e=1", "⟨U+202E⟩=1"),
        ("＝1", "'＝1"),
        ("'=1", "''=1"),
        ('"=1', "'\"=1"),
    ],
)
def test_formulas_become_texts(text: str, shown: str) -> None:
    assert neutral(text) == shown


def test_a_cell_is_no_longer_than_spreadsheets_take() -> None:
    assert len(neutral("=" * 100_000)) < 32_767


def test_the_model_card_is_inert(hostile: Path) -> None:
    text = (hostile / "model-card.md").read_text(encoding="utf-8")
    (entry,) = front_matter(text)["model-index"]
    assert entry["name"] == HOSTILE[0], "a text, whatever it looks like"
    body = text.split("\n---\n", 1)[1]
    assert not re.search(r"(?<!\\)<", body), "HTML"
    assert not re.search(r"(?<!\\)\]\(", body), "link"
    assert "://" not in body
    assert "@" not in body
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        "## Robustness under visual-token compression"
    ]
    for block in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1


def test_export_refuses_what_is_no_run(tmp_path: Path) -> None:
    for name in FORMATS:
        with pytest.raises(StoreError, match="not a run folder"):
            export(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_export_writes_where_it_is_told(drawn: Path, tmp_path: Path) -> None:
    for name in FORMATS:
        path = export(drawn, name, tmp_path / "new" / f"{name}.out")
        assert path == tmp_path / "new" / f"{name}.out"
        assert path.stat().st_size > 0
