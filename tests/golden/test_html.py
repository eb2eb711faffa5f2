"""The report and the Markdown of a drawn run, and of a run in which every string is hostile."""

import base64
import hashlib
import html.parser
import re
import shlex
from pathlib import Path

import hostile_page
import pytest
from hostile_page import FORBIDDEN, HOSTILE
from report_data import cell, manifest, trial
from synthetic_run import build

import reports
from reports.findings import SHOWN, collect
from reports.markdown import LIMIT
from reports.reading import compression_known
from reports.store import RunStore


class Page(html.parser.HTMLParser):
    """Collects tags and what they would load, the way a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("runs") / "drawn", samples=24)
    reports.build_reports(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = hostile_page.build(tmp_path_factory.mktemp("runs") / "hostile")
    reports.build_reports(folder)
    return folder


@pytest.fixture(params=["drawn", "hostile"])
def page(request: pytest.FixtureRequest) -> str:
    folder: Path = request.getfixturevalue(request.param)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_and_nothing_of_the_data_runs(page: str) -> None:
    tags = Page(page).tags
    for tag, attributes in tags:
        assert tag not in {"iframe", "object", "embed", "link", "base", "form", "img"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", "the content security policy allows none"
            if name in {"href", "src", "xlink:href", "action"}:
                assert re.match(r"#|data:image/(png|webp);base64,", value or ""), (tag, value)
    assert [attributes for tag, attributes in tags if tag == "script"] == [{}], "ours, inline"


@pytest.mark.parametrize("part", ["style", "script"])
def test_the_policy_names_the_only_style_and_script_by_their_hashes(page: str, part: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    assert policy[1].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[1]
    (inline,) = re.findall(rf"<{part}>(.*?)</{part}>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    assert f"{part}-src 'sha256-{digest}';" in policy[1]


def test_the_script_is_the_one_in_the_repository(page: str) -> None:
    ours = Path(reports.__file__).parent / "html" / "templates" / "report.js"
    assert f"<script>{ours.read_text(encoding='utf-8')}</script>" in page
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(|fetch\(|http",
                         ours.read_text(encoding="utf-8"))  # fmt: skip


def test_no_hidden_character_survives(page: str) -> None:
    for character in FORBIDDEN:
        assert character not in page, f"U+{ord(character):04X}"


def test_the_page_is_well_formed_enough(page: str) -> None:
    found = Page(page)
    names = [tag for tag, _ in found.tags]
    assert names.count("html") == names.count("body") == names.count("h1") == 1
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"] for t, a in found.tags if t in {"a", "use"}}
    assert {f"#{one}" for one in ids} >= targets
    for name in ("section", "article", "table", "details", "figure", "div", "svg", "span"):
        assert page.count(f"<{name}") == page.count(f"</{name}>"), name


def test_hostile_strings_are_shown_as_they_are(hostile: Path) -> None:
    shown = "".join(Page((hostile / "report.html").read_text(encoding="utf-8")).text)
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[5], "⟨U+202E⟩gnp.exe", "⟨U+0000⟩"):
        assert text in shown


def test_missing_images_do_not_spoil_the_report(hostile: Path) -> None:
    shown = (hostile / "report.html").read_text(encoding="utf-8")
    assert "The images cannot be shown" in shown


def test_markdown_is_inert(hostile: Path) -> None:
    text = (hostile / "summary.md").read_text(encoding="utf-8")
    for character in FORBIDDEN:
        assert character not in text
    assert not re.search(r"(?<!\\)<", text), "HTML"
    assert not re.search(r"(?<!\\)\]\(", text), "link"
    assert not re.search(r"(?<!\\)`(?!report\.html`|$| )", text.replace("`report.html`", ""))
    assert "://" not in text, "bare link"
    assert not re.search(r"www\.", text), "bare link"
    assert "@" not in text, "mention"
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}
        assert len(columns) == 1, block
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert [line for line in headings if line not in {
        "### Gates", "### What stands out", "### Results", "### Defences", "### Findings",
        "### Before you trust it", "### How to read it",
        "### In public taxonomies"}] == [headings[0]]  # fmt: skip


def test_markdown_says_the_verdict_first(drawn: Path) -> None:
    text = (drawn / "summary.md").read_text(encoding="utf-8")
    assert text.startswith("## ❌ Fail: quickstart\n")
    assert len(text.encode()) < 20_000


def test_markdown_stays_under_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIMIT < 1024 * 1024
    monkeypatch.setattr("reports.markdown.LIMIT", 6_000)
    planned = manifest(cells=[cell(f"c{i}", attack=f"attack-{i}") for i in range(200)])
    with RunStore.create(tmp_path / "run", planned) as store:
        store.append([trial("s0", cell="c0")])
    text = reports.build_reports(tmp_path / "run").markdown.read_text(encoding="utf-8")
    assert 5_000 < len(text.encode()) <= 6_000
    assert text.endswith("… cut to fit; the whole is in summary.json and report.html.\n")
    assert text.splitlines()[-3].endswith("|"), "no row is torn"


def test_findings_are_whole_first_and_then_folded(drawn: Path) -> None:
    page = (drawn / "report.html").read_text(encoding="utf-8")
    found = collect(RunStore.read(drawn))
    assert page.count('<article class="finding"') == SHOWN
    assert page.count("data:image/png;base64,") == 3 * SHOWN
    assert found.total == SHOWN + len(found.listed) > SHOWN
    assert page.count('<details class="finding brief"') == len(found.listed)
    small = page.count('<image id="small-')
    pictures = {name for one in found.listed for name in (one.clean_png, one.attacked_png)}
    assert small == len(pictures) < 2 * len(found.listed), "a picture of two findings is there once"
    assert "are not on this page" not in page


def test_what_does_not_fit_is_said(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = collect(RunStore.read(drawn))
    monkeypatch.setattr("reports.findings.LISTED", 5)
    try:
        page = reports.build_reports(drawn).report.read_text(encoding="utf-8")
    finally:
        monkeypatch.undo()
        reports.build_reports(drawn)
    assert page.count('class="finding brief"') == 5
    assert (
        f"The other {before.total - SHOWN - 5} are not on this page, which holds at most 29" in page
    )


def test_each_finding_says_how_to_see_it_again(drawn: Path) -> None:
    page = (drawn / "report.html").read_text(encoding="utf-8")
    found = collect(RunStore.read(drawn))
    for one in (*found.shown, *found.listed):
        for verb in ("show", "replay"):
            assert f"redteam {verb} drawn --sample {one.sample} --cell {one.cell}<" in page


def test_a_hostile_name_stays_one_word_of_the_command(hostile: Path) -> None:
    page = (hostile / "report.html").read_text(encoding="utf-8")
    commands = re.findall(r"<code>(redteam show .*?)</code>", page)
    assert len(commands) == len(HOSTILE)
    for command in commands:
        words = shlex.split(html.unescape(command))
        assert words[:3] == ["redteam", "show", "hostile"]
        assert words[3] == "--sample"
        assert words[5:] == ["--cell", "c1"]


def test_a_run_without_failures_says_so(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", manifest()) as store:
        store.append([trial(f"s{i}", "1111") for i in range(4)])
    built = reports.build_reports(tmp_path / "run")
    page = built.report.read_text(encoding="utf-8")
    assert "No sample was right on clean full" in page
    assert "Not gated" in page
    assert built.exit_code == 0


def test_an_empty_run_still_has_a_report(tmp_path: Path) -> None:
    RunStore.create(tmp_path / "run", manifest(0, cells=[])).close()
    built = reports.build_reports(tmp_path / "run")
    assert built.exit_code == 5
    assert "Nothing was selected" in built.report.read_text(encoding="utf-8")


def test_the_reports_are_the_same_when_built_again(drawn: Path) -> None:
    names = ("summary.json", "summary.md", "report.html")
    before = [(drawn / name).read_bytes() for name in names]
    reports.build_reports(drawn)
    assert [(drawn / name).read_bytes() for name in names] == before


def test_the_terminal_table_leaves_out_what_never_changes(drawn: Path) -> None:
    built = reports.build_reports(drawn)
    assert built.table.columns == (
        "compression", "attack", "ε", "n", "errors", "full", "compressed", "CSG", "CSFR",
        "diagnosis",
    )  # fmt: skip
    assert len(built.table.rows) == 18
    assert all(len(row) == len(built.table.columns) for row in built.table.rows)
    assert built.verdict.value == "fail"


def test_options_are_written_as_people_write_them() -> None:
    from reports.html.render import _options

    spec = {"type": "caa", "steps": 20, "alpha": 4 / 255, "promote": None}
    assert _options(spec, steps=True) == "caa: steps 20, alpha 4/255"
    assert _options({"type": "vcd", "alpha": 1.0}) == "vcd: alpha 1.0", "a weight, no step size"
    assert _options({"type": "noise", "border": None}) == "noise"


@pytest.mark.parametrize(
    ("knowledge", "depends", "said"),
    [
        ("compressed", True, "known"),
        ("white_box", True, "known"),
        ("white_box", False, "unknown"),  # CAA on a declared range, PGD on the full path
        ("encoder", False, "unknown"),
        ("surrogate", False, "unknown"),
        ("query", True, "unknown, asked through"),
    ],
)
def test_the_report_says_whether_an_attack_knows_the_compression(
    knowledge: str, depends: bool, said: str
) -> None:
    assert compression_known(knowledge, depends) == said
