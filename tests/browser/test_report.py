"""The report in a real browser: nothing is blocked or requested, and it fits a phone."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import judged_run
import pytest
from measured import measurement, setting
from synthetic_run import build

from reports import build_reports
from reports.html.measurement import write

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--allow-file-access-from-files", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    folder = build(tmp_path_factory.mktemp("runs") / "run", samples=24)
    return build_reports(folder).report


def chromium(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    return subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )


def probe(report: Path, tmp_path: Path, width: int, script: str) -> str:
    """Show the report in a frame and evaluate an expression on its document `d`."""
    page = tmp_path / "probe.html"
    page.write_text(
        f'<iframe id="f" src="{report.as_uri()}" style="width:{width}px;height:900px"></iframe>'
        '<pre id="out"></pre><script>f.onload = () => { const d = f.contentDocument, w = '
        f"f.contentWindow; out.textContent = String({script}); }}</script>",
        encoding="utf-8",
    )
    dom = chromium(page, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=5000").stdout
    found = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
    assert found
    return html.unescape(found[1])


def console(page: Path, profile: Path) -> list[str]:
    log = chromium(page, profile, "--dump-dom", "--enable-logging=stderr", "--v=0").stderr
    return [line for line in log.splitlines() if "CONSOLE" in line]


def test_the_console_stays_silent(report: Path, tmp_path: Path) -> None:
    assert console(report, tmp_path / "profile") == []


def test_what_is_smuggled_into_the_page_is_blocked(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "smuggled.html"
    text = report.read_text(encoding="utf-8")
    page.write_text(
        text.replace("<main", "<script>document.title = 'owned'</script><main"), encoding="utf-8"
    )
    lines = console(page, tmp_path / "profile")
    assert any("Content Security Policy" in line for line in lines), lines


def test_the_style_is_applied_and_every_picture_is_drawn(report: Path, tmp_path: Path) -> None:
    script = (
        "[w.getComputedStyle(d.querySelector('.pictures')).display,"
        " d.querySelectorAll('.store image').length,"
        " [...d.querySelectorAll('.pictures use')].filter(u => u.getBBox().width > 0).length,"
        " w.performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:'))"
        ".length].join()"
    )
    assert probe(report, tmp_path, 1280, script) == "grid,72,120,0"


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_never_scrolls_sideways(report: Path, tmp_path: Path, width: int) -> None:
    wide = probe(report, tmp_path, width, "d.documentElement.scrollWidth - w.innerWidth")
    assert int(wide) <= 0


def test_it_prints(report: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.pdf"
    chromium(report, tmp_path / "profile", f"--print-to-pdf={target}")
    assert target.read_bytes().startswith(b"%PDF-")


def test_self_checks_suites_and_minimal_epsilons(tmp_path: Path) -> None:
    """Curves in two panels, a step curve, the table of checks: silent, styled, fit for a phone."""
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    page = build_reports(judged_run.build(tmp_path / "run")).report
    assert console(page, tmp_path / "profile") == []
    assert probe(page, tmp_path, 380, "d.documentElement.scrollWidth <= 380") == "true"
    assert probe(page, tmp_path, 900, "d.querySelectorAll('svg.curves').length") == "3"
    dashed = "w.getComputedStyle(d.querySelector('.curve.dash0')).strokeDasharray"
    assert probe(page, tmp_path, 900, dashed) == "none"
    colours = (
        "new Set([...d.querySelectorAll('svg.curves')[0].querySelectorAll('.curve')]"
        ".map(one => w.getComputedStyle(one).stroke)).size"
    )
    assert probe(page, tmp_path, 900, colours) == "6", "five attacks and the control"


def test_the_page_of_a_measurement(tmp_path: Path) -> None:
    """Silent, styled, and no wider than a phone."""
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    found = measurement(
        setting("", right=90),
        *(setting(f"method-{i} 25%", right=80 - i, frequency=True) for i in range(6)),
    )
    page = write(tmp_path, found)
    assert console(page, tmp_path / "profile") == []
    assert probe(page, tmp_path, 380, "d.documentElement.scrollWidth <= 380") == "true"
    shown = "w.getComputedStyle(d.querySelector('.heat .above')).fill"
    assert probe(page, tmp_path, 900, shown).startswith("rgb(")
    assert probe(page, tmp_path, 900, "d.querySelectorAll('svg.curves').length") == "6"
