"""The report and the Markdown of a drawn run, and of a run in which every string is hostile."""

import html.parser
import re
from pathlib import Path

import pytest
from report_data import cell, manifest, swap, tokens, trial
from synthetic_run import build

import reports
from reports.findings import SHOWN
from reports.markdown import LIMIT
from reports.reading import compression_known
from reports.records import Answer, Answers, GateSpec
from reports.store import RunStore

HOSTILE = [
    "<script>alert(1)</script>",
    "</title></style><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% include 'x' %}",
    "[click](https://evil.example) ![x](https://evil.example/x.png)",
    "| a | b |\n|---|---|\n# heading\n- list\n> quote\n```",
    "https://evil.example www.evil.example @everyone #1 $x^2$ ~~gone~~",
    "safe\u202egnp.exe \u2066x\u2069 \u200b\u0000\u0007\u009b31m\ufeff",
    "&lt;b&gt; &amp; &#60;",
    "<!-- --> ]]> <?php",
]
FORBIDDEN = ["\u202e", "\u2066", "\u200b", "\u0000", "\u0007", "\u009b", "\ufeff"]


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
    folder = tmp_path_factory.mktemp("runs") / "hostile"
    odd = cell(
        "c1", target=HOSTILE[0], compression=HOSTILE[1], attack=HOSTILE[2], defense=HOSTILE[3],
        knowledge=HOSTILE[5], norm=HOSTILE[0], spec={"attack": {HOSTILE[0]: HOSTILE[1]}},
    )  # fmt: skip
    samples = [f"{i} {text}" for i, text in enumerate(HOSTILE)] + ["e"]
    planned = manifest(
        cells=[odd],
        gates=[GateSpec(name=HOSTILE[6], metric=HOSTILE[0], max=0.1, where={"attack": HOSTILE[1]})],
        name=HOSTILE[7], description=HOSTILE[8], provenance={HOSTILE[0]: [HOSTILE[9]]},
        scenario={"dataset": {HOSTILE[1]: HOSTILE[0]}},
    ).model_copy(update={"samples": samples})  # fmt: skip
    right, wrong = (Answer(text=" ".join(HOSTILE), correct=flag) for flag in (True, False))
    answers = Answers(
        clean_full=right, clean_compressed=right, attacked_full=right, attacked_compressed=wrong
    )
    with RunStore.create(folder, planned, "\n".join(HOSTILE)) as store:
        store.append(
            trial(
                f"{i} {text}", question=text, truth=text, kind=text, image=text, answers=answers,
                swap=swap().model_copy(update={"recovered_text": text}), tokens=tokens(),
                checks=[text], clean_png="0" * 64, attacked_png="f" * 64,
            )
            for i, text in enumerate(HOSTILE)
        )  # fmt: skip
        failed = trial("e", "error").error
        assert failed is not None
        store.append([trial("e", "error", error=failed.model_copy(
            update={"type": HOSTILE[0], "message": HOSTILE[1], "where": HOSTILE[2],
                    "traceback": "\n".join(HOSTILE)}))])  # fmt: skip
    reports.build_reports(folder)
    return folder


@pytest.fixture(params=["drawn", "hostile"])
def page(request: pytest.FixtureRequest) -> str:
    folder: Path = request.getfixturevalue(request.param)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_and_nothing_runs(page: str) -> None:
    for tag, attributes in Page(page).tags:
        assert tag not in {"script", "iframe", "object", "embed", "link", "base", "form", "img"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", "the content security policy allows none"
            if name in {"href", "src", "xlink:href", "action"}:
                assert re.match(r"#|data:image/(png|webp);base64,", value or ""), (tag, value)


def test_the_policy_is_strict_and_matches_the_style(page: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    assert "script-src" not in policy[1], "falls back to none"


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


def test_findings_are_capped_and_the_rest_is_listed(drawn: Path) -> None:
    page = (drawn / "report.html").read_text(encoding="utf-8")
    assert page.count('<article class="finding"') == SHOWN
    assert "further finding" in page
    assert page.count("data:image/png;base64,") == 3 * SHOWN


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
