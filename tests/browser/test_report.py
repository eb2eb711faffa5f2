"""The report in a real browser: by keyboard, on a phone, printed, without script, under attack."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import browser
import hostile_page
import judged_run
import pytest
from browser import Tab
from measured import measurement, setting
from synthetic_run import build

from reports import build_reports
from reports.findings import SHOWN
from reports.html.measurement import write

pytestmark = pytest.mark.browser
AXE = "axe_core_python"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if browser.CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    with browser.opened(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("runs") / "run", samples=36)
    return build_reports(folder).report


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reports(hostile_page.build(tmp_path_factory.mktemp("runs") / "hostile")).report


def shown(tab: Tab, selector: str) -> list[str]:
    """Text of what matches and is on the page."""
    found: list[str] = tab.evaluate(
        f"[...document.querySelectorAll({json.dumps(selector)})]"
        ".filter(e => e.checkVisibility()).map(e => e.textContent.trim())"
    )
    return found


def unfold(tab: Tab) -> None:
    tab.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")


def settled(tab: Tab) -> None:
    """Wait for what a pause in typing sets off."""
    tab.evaluate("new Promise(done => setTimeout(done, 250))")


def choose(tab: Tab, select: str, value: str) -> None:
    tab.evaluate(
        f"(() => {{ const e = document.getElementById({json.dumps(select)}); "
        f"e.value = {json.dumps(value)}; e.dispatchEvent(new Event('change')); }})()"
    )


def fill(tab: Tab, selector: str, text: str) -> None:
    """Type into a field that is empty or not."""
    field = f"document.querySelector({json.dumps(selector)})"
    tab.evaluate(f"(e => {{ e.focus(); e.select(); }})({field})")
    if text:
        tab.send("Input.insertText", text=text)
    else:
        tab.send("Input.dispatchKeyEvent", type="keyDown", key="Delete", windowsVirtualKeyCode=46)
    settled(tab)


def focused(tab: Tab) -> str:
    """What has the focus: its id, or its name and text."""
    name: str = tab.evaluate(
        "(e => e.id ? '#' + e.id : e.tagName.toLowerCase() + ' '"
        " + e.textContent.trim().slice(0, 40))(document.activeElement)"
    )
    return name


def tab_to(tab: Tab, wanted: str, limit: int = 400) -> list[str]:
    """Press Tab until something has the focus; what had it on the way."""
    way: list[str] = []
    for _ in range(limit):
        tab.key("Tab")
        way.append(focused(tab))
        if re.fullmatch(wanted, way[-1]):
            return way
    raise AssertionError(f"{wanted} is not reached: {way[:20]} …")


def audit(tab: Tab) -> list[str]:
    """Violations that axe finds, with everything unfolded."""
    pytest.importorskip(AXE)
    script = files(AXE) / "axe.min.js"
    unfold(tab)
    tab.evaluate(script.read_text(encoding="utf-8") + "; 0")
    found: list[dict[str, Any]] = tab.evaluate(
        "axe.run(document, {resultTypes: ['violations']}).then(r => r.violations)"
    )
    return [
        f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}: "
        f"{one['nodes'][0]['failureSummary']}"
        for one in found
    ]


def test_nothing_is_said_requested_or_blocked(tab: Tab, report: Path) -> None:
    tab.go(report)
    unfold(tab)
    fill(tab, "#filter-text", "colour")
    tab.evaluate("document.querySelector('button.sort').click()")
    settled(tab)
    assert tab.console == []
    assert [one for one in tab.requests if not one.startswith("data:")] == [report.as_uri()]
    assert not tab.evaluate("document.getElementById('finding-filters').hidden"), "our script ran"


def test_what_is_smuggled_into_the_page_is_blocked(tab: Tab, report: Path, tmp_path: Path) -> None:
    page = tmp_path / "smuggled.html"
    text = report.read_text(encoding="utf-8")
    page.write_text(
        text.replace(
            "<main",
            "<script>document.title = 'owned'</script>"
            "<img src=x onerror=\"document.title='owned'\">"
            "<img src='https://example.invalid/x.png'><main",
        ),
        encoding="utf-8",
    )
    tab.go(page)
    assert tab.evaluate("document.title") != "owned"
    assert sum("Content Security Policy" in line for line in tab.console) >= 3, tab.console


def test_hostile_strings_stay_inert(tab: Tab, hostile: Path) -> None:
    tab.go(hostile)
    unfold(tab)
    for text in hostile_page.HOSTILE:
        fill(tab, "#filter-text", text)
    assert tab.console == []
    assert [one for one in tab.requests if not one.startswith("data:")] == [hostile.as_uri()]
    assert tab.evaluate("document.scripts.length") == 1
    elements = (
        "document.querySelectorAll('img, iframe, object, embed, form, b > b, svg svg svg svg')"
    )
    assert tab.evaluate(f"{elements}.length") == 0
    handlers = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    assert tab.evaluate(f"{handlers}.filter(name => name.startsWith('on'))") == []
    assert "redteam report" in tab.evaluate("document.title")


def test_hostile_strings_can_be_searched_for(tab: Tab, hostile: Path) -> None:
    tab.go(hostile)
    for text in ("<script>alert(1)</script>", "{{ 7 * 7 }}", "no such words"):
        fill(tab, "#filter-text", text)
        wanted = 0 if text == "no such words" else len(hostile_page.HOSTILE)  # each has all answers
        assert len(shown(tab, ".finding")) == wanted, text


def test_the_style_is_applied_and_every_picture_is_drawn(tab: Tab, report: Path) -> None:
    tab.go(report)
    display = "getComputedStyle(document.querySelector('.pictures')).display"
    assert tab.evaluate(display) == "grid"
    drawn = (
        "[...document.querySelectorAll('article .pictures use')]"
        ".filter(u => u.getBBox().width > 0).length"
    )
    assert tab.evaluate(drawn) == 5 * SHOWN
    unfold(tab)
    brief = "[...document.querySelectorAll('.brief')].filter(one => !one.hidden)"
    small = f"{brief}.flatMap(one => [...one.querySelectorAll('use')])"
    assert tab.evaluate(f"{small}.length") > 0
    assert tab.evaluate(f"{small}.every(u => u.getBBox().width > 0)")


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_never_scrolls_sideways(tab: Tab, report: Path, width: int) -> None:
    tab.go(report, width=width)
    unfold(tab)
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_it_prints(tab: Tab, report: Path, tmp_path: Path) -> None:
    tab.go(report)
    tab.pdf(tmp_path / "report.pdf")
    data = (tmp_path / "report.pdf").read_bytes()
    assert data.startswith(b"%PDF-")
    tab.send("Emulation.setEmulatedMedia", media="print")
    assert shown(tab, ".filters") == []
    assert shown(tab, ".printed-only") == ["The further findings are in the file, not on paper."]
    assert len(shown(tab, "article.finding")) == SHOWN
    tab.send("Emulation.setEmulatedMedia", media="")


def values(tab: Tab, column: int) -> list[str]:
    found: list[str] = tab.evaluate(
        "[...document.querySelectorAll('[aria-label=\"Outcomes of every cell\"] tbody tr')]"
        ".filter(row => !row.matches('.group'))"
        f".map(row => row.cells[{column}].firstChild.textContent)"
    )
    return found


def test_a_table_is_sorted_and_put_back(tab: Tab, report: Path) -> None:
    tab.go(report)
    head = 'document.querySelector(\'[aria-label="Outcomes of every cell"] th[data-col="8"]\')'
    assert "CSFR" in tab.evaluate(f"{head}.textContent")
    home = values(tab, 8)
    numbers = [float(value) for value in home]
    assert numbers != sorted(numbers, reverse=True), "else this shows nothing"
    for state, order in (
        ("descending", sorted(numbers, reverse=True)),
        ("ascending", sorted(numbers)),
        (None, numbers),
    ):
        tab.evaluate(f"{head}.querySelector('button').click()")
        assert [float(value) for value in values(tab, 8)] == order
        assert tab.evaluate(f"{head}.getAttribute('aria-sort')") == state
    tab.evaluate(f"{head}.querySelector('button').click()")
    moved = "document.querySelector('.flat [data-group]')"
    label = tab.evaluate(f"getComputedStyle({moved}, '::before').content")
    assert "visionzip" in label, "a row that left its group says which it was"


def test_rows_are_filtered_and_counted(tab: Tab, report: Path) -> None:
    tab.go(report)
    field = "input[aria-label='Filter rows: Outcomes of every cell']"
    rows = "[aria-label='Outcomes of every cell'] tbody tr:not(.group)"
    assert len(shown(tab, rows)) == 18
    fill(tab, field, "visionzip caa")
    assert len(shown(tab, rows)) == 3
    assert "3 of 18 rows" in shown(tab, ".filters [role=status]")
    fill(tab, field, "")
    assert len(shown(tab, rows)) == 18


def test_findings_are_filtered_by_cell_cause_and_text(tab: Tab, report: Path) -> None:
    tab.go(report)
    every = tab.evaluate("document.querySelectorAll('.finding').length")
    assert every > SHOWN
    cell = tab.evaluate("document.querySelector('#filter-cell').options[1].value")
    cells = tab.evaluate("[...document.querySelectorAll('.finding')].map(f => f.dataset.cell)")
    of_cell = cells.count(cell)
    choose(tab, "filter-cell", cell)
    assert 0 < of_cell < every
    assert len(shown(tab, ".finding")) == of_cell, "the folded ones too: what fits is unfolded"
    assert shown(tab, "#filter-count") == [f"{of_cell} of {every} findings"]
    choose(tab, "filter-cell", "")
    choose(tab, "filter-cause", "Content")
    assert set(shown(tab, ".finding .tag")) == {"Content"}
    choose(tab, "filter-cause", "")
    fill(tab, "#filter-text", "WHAT colour")
    found = shown(tab, ".finding")
    assert 0 < len(found) < every
    assert all("what colour" in text.lower() for text in found)


def test_long_lists_come_in_pages(tab: Tab, report: Path) -> None:
    tab.go(report)
    tab.evaluate("document.getElementById('further').open = true")
    every = tab.evaluate("document.querySelectorAll('.brief').length")
    assert every > 50
    assert len(shown(tab, ".brief")) == 50
    assert shown(tab, "#show-more") == [f"Show {min(50, every - 50)} more of {every - 50}"]
    tab.evaluate("document.getElementById('show-more').focus()")
    tab.key("Enter")
    assert len(shown(tab, ".brief")) == min(100, every)
    assert tab.evaluate("document.activeElement.parentElement.className") == "finding brief"


def test_a_link_to_a_folded_finding_opens_it(tab: Tab, report: Path) -> None:
    tab.go(report)
    last = tab.evaluate("[...document.querySelectorAll('.brief')].at(-1).id")
    tab.evaluate(f"location.hash = {json.dumps(last)}")
    settled(tab)
    assert len(shown(tab, f"#{last} .said")) == 1


def test_the_keyboard_reaches_everything(tab: Tab, report: Path) -> None:
    tab.go(report)
    way = tab_to(tab, "#filter-cell")
    assert way[0].startswith("a Skip to the results")
    assert [one for one in way if one.startswith("a ")][1:4] == [
        "a Verdict",
        "a Tested",
        "a Results",
    ]
    assert any(one.startswith("button CSFR") for one in way), "sorting"
    assert any(one.startswith("summary All outcome metrics") for one in way)
    assert tab_to(tab, "#filter-cause|#filter-text", 2)
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert tab.evaluate(outline) != "none", "one sees where one is"


def test_the_keyboard_sorts_filters_and_unfolds(tab: Tab, report: Path) -> None:
    tab.go(report)
    tab_to(tab, "button CSFR.*")
    tab.key("Enter")
    assert tab.evaluate("document.activeElement.parentElement.getAttribute('aria-sort')")
    tab_to(tab, "summary All outcome metrics")
    tab.key(" ")
    assert tab.evaluate("document.activeElement.parentElement.open")
    tab_to(tab, "#filter-text")
    tab.type("triangle")
    settled(tab)
    assert all("triangle" in text for text in shown(tab, ".finding"))
    tab_to(tab, "summary Replay")
    tab.key("Enter")
    assert tab.evaluate("document.activeElement.parentElement.open")
    assert "redteam replay" in tab.evaluate("document.activeElement.parentElement.textContent")


def test_without_script_everything_is_there(tab: Tab, report: Path, tmp_path: Path) -> None:
    page = tmp_path / "plain.html"
    text = report.read_text(encoding="utf-8")
    page.write_text(text.replace("<script>", "<script>throw 1;"), encoding="utf-8")  # another hash
    tab.go(page)
    assert shown(tab, ".filters") == [], "no dead controls"
    assert shown(tab, "button") == []
    tab.evaluate("document.querySelector('#further > summary').focus()")
    tab.key("Enter")
    every = tab.evaluate("document.querySelectorAll('.finding').length")
    assert len(shown(tab, ".finding")) == every > SHOWN


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_axe_finds_nothing(tab: Tab, report: Path, width: int, scheme: str) -> None:
    tab.go(report, width=width, prefers_color_scheme=scheme)
    assert audit(tab) == []


def test_axe_finds_nothing_among_hostile_strings(tab: Tab, hostile: Path) -> None:
    tab.go(hostile)
    assert audit(tab) == []


def test_axe_would_find_something(tab: Tab, report: Path) -> None:
    tab.go(report)
    tab.evaluate("document.querySelector('#filter-text').parentElement.replaceWith("
                 "document.querySelector('#filter-text'))")  # fmt: skip
    assert [one.partition(":")[0] for one in audit(tab)] == ["label"]


def test_self_checks_suites_and_minimal_epsilons(tab: Tab, tmp_path: Path) -> None:
    """Curves in two panels, a step curve, the table of checks: silent, styled, fit for a phone."""
    page = build_reports(judged_run.build(tmp_path / "run")).report
    tab.go(page, width=380)
    assert tab.evaluate("document.documentElement.scrollWidth <= 380")
    tab.go(page, width=900)
    curves = "#results figure > [role=img] > svg.curves"
    assert tab.evaluate(f"document.querySelectorAll('{curves}').length") == 3
    dashed = "getComputedStyle(document.querySelector('.curve.dash0')).strokeDasharray"
    assert tab.evaluate(dashed) == "none"
    colours = (
        f"new Set([...document.querySelectorAll('{curves}')[0].querySelectorAll('.curve')]"
        ".map(one => getComputedStyle(one).stroke)).size"
    )
    assert tab.evaluate(colours) == 6, "five attacks and the control"
    assert tab.console == []
    assert audit(tab) == []


def test_the_page_of_a_measurement(tab: Tab, tmp_path: Path) -> None:
    """Silent, styled, and no wider than a phone."""
    found = measurement(
        setting("", right=90),
        *(setting(f"method-{i} 25%", right=80 - i, frequency=True) for i in range(6)),
    )
    page = write(tmp_path, found)
    tab.go(page, width=380)
    assert tab.evaluate("document.documentElement.scrollWidth <= 380")
    tab.go(page, width=900)
    fill_ = "getComputedStyle(document.querySelector('.heat .above')).fill"
    assert tab.evaluate(fill_).startswith("rgb(")
    assert tab.evaluate("document.querySelectorAll('svg.curves').length") == 6
    assert tab.console == []
