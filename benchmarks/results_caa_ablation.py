"""Make docs/results/caa-ablation.md: ``python benchmarks/results_caa_ablation.py``.

Runs (or resumes) `scenarios/caa-ablation.yaml` and writes its table beside the published one. The
measured figures are made from the run folder alone, and so is every statement about the order.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from results_scenes import arrow, interval, value

from reports.measure import Row, row_of
from reports.statistics import cluster_bootstrap
from reports.store import RunStore

SCENARIO: Final = Path("scenarios/caa-ablation.yaml")


class Published(NamedTuple):
    """Means over LLaVA and Qwen-VL × POPE, TextVQA, MME at 32/255; None where not published."""

    upr: float | None
    cae: float | None
    csg: float
    rank: int
    """Place in the published order; rows of one rank are within .01 of each other."""


PUBLISHED: Final[Mapping[str, Published]] = {
    "noise": Published(None, None, 0.0236, 0),
    "without-bpr": Published(None, 0.1715, 0.136, 1),
    "most-only": Published(None, None, 0.1919, 2),
    "caa-full": Published(0.7691, None, 0.3475, 3),
    "without-query": Published(0.9159, 0.5705, 0.4863, 4),
    "without-erasure": Published(0.9081, 0.5807, 0.4887, 4),
    "without-hierarchy": Published(0.9240, 0.5714, 0.4954, 4),
    "caa": Published(0.9152, 0.6691, 0.5842, 5),
}
"""Figures of "Compression-Aware Attack" (arXiv 2601.12042); those of six cells are averaged here,
the noise is over all its settings, and the CSG without BPR is what is left of the full one after
the published loss of .4482."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenario", type=Path, default=SCENARIO)
    parser.add_argument("--run", type=Path, default=Path("runs/caa-ablation"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/caa-ablation.md"))
    parser.add_argument("--limit", type=int, help="at most so many samples")
    parser.add_argument("--split", choices=("validation", "test"), help="other than the scenario's")
    parser.add_argument("--only-page", action="store_true", help="do not run; use the run folder")
    arguments = parser.parse_args()
    if not arguments.only_page:
        command = [sys.executable, "-m", "redteam", "run", str(arguments.scenario)]
        if arguments.limit:
            command += ["--limit", str(arguments.limit)]
        if arguments.split:
            command += ["--set", f"dataset.split={arguments.split}"]
        result = subprocess.run([*command, "--out", str(arguments.run)], check=False)  # noqa: S603
        if result.returncode not in (0, 1, 4):
            raise SystemExit(result.returncode)
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(page(arguments.run), encoding="utf-8")
    print(f"written: {arguments.page}")


def page(folder: Path) -> str:
    """The whole page, from a run folder."""
    store = RunStore.read(folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows: dict[str, list[Row]] = {}
    for trial in store.trials():
        rows.setdefault(trial.cell, []).append(row_of(trial))
    epsilons = sorted({cell["epsilon"] for cell in summary["cells"]})
    parts, seed = [_head(store, summary)], store.manifest.seed
    parts += [_section(epsilon, summary["cells"], rows, seed) for epsilon in epsilons]
    return "\n".join(parts)


def _head(store: RunStore, summary: Mapping[str, Any]) -> str:
    manifest = store.manifest
    split = manifest.scenario["dataset"].get("split", "")
    identity = manifest.provenance.get("identity", {})
    options = "; ".join(
        f"`{one['name']}`: {_options(one)}" for one in manifest.scenario["attacks"] if _options(one)
    )
    progress = summary["progress"]
    return f"""# The ablation of CAA on the scenes LVLM, beside the published one

Made by `python benchmarks/results_caa_ablation.py`, which runs `{SCENARIO}`; do not edit.

{len(manifest.samples)} samples of the {split} split, one question a picture; seed {manifest.seed};
device {identity.get("device", "unknown")}; {manifest.created}. {progress["errors"]} trials ended in
an error, {progress["missing"]} did not run. 95 % intervals: paired bootstrap by picture.

The published figures are means over LLaVA and Qwen-VL on POPE, TextVQA and MME under FastV, second
layer, 20 % of the tokens, 32/255. **Loss, weights, steps and group sizes of that attack are not
public; ours are a reconstruction.** Ours is one tiny model of a drawn world, so figures cannot be
compared, only their order, and that with care. What the columns mean: [metrics.md](../metrics.md).

Options other than the defaults: {options}.
"""


def _options(attack: Mapping[str, Any]) -> str:
    """What an attack of the scenario says beside the defaults of its class."""
    from redteam.catalog import find
    from redteam.signature import signature

    known = signature(find("attacks", attack["type"])).options
    return ", ".join(
        f"{name} {attack[name]}"
        for name, option in known.items()
        if name in attack and attack[name] != option.default
    )


def _section(
    epsilon: float,
    cells: Sequence[Mapping[str, Any]],
    rows: Mapping[str, Sequence[Row]],
    seed: int,
) -> str:
    here = {cell["attack"]: cell for cell in cells if cell["epsilon"] == epsilon}
    order = sorted(here, key=lambda name: -(here[name]["metrics"]["csg"]["value"] or 0.0))
    titles = ["attack", "n", "full, clean → attacked", "compressed, clean → attacked"]
    titles += ["UPR", "CAE", "**CSG**", "published UPR", "CAE", "CSG"]
    lines = [f"## {epsilon * 255:g}/255", "", f"| {' | '.join(titles)} |"]
    lines += ["|" + "---|" * len(titles)]
    lines += [_row(here[name], PUBLISHED.get(name)) for name in order]
    pairs = list(_pairs(here, rows, seed))
    lines += ["", "### Against the published order", ""]
    counts = {word: sum(pair.verdict == word for pair in pairs) for word in VERDICTS}
    said = ", ".join(f"{counts[word]} {word}" for word in VERDICTS)
    lines += [f"Of {len(pairs)} pairs of rows that the published figures tell apart: {said}.", ""]
    lines += ["| published: larger | smaller | CSG here, difference | verdict |"]
    lines += ["|---|---|---|---|"]
    lines += [
        f"| {pair.larger} | {pair.smaller} | {pair.value:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}] "
        f"| {pair.verdict} |"
        for pair in pairs
    ]
    return "\n".join(lines) + "\n"


VERDICTS: Final = ("agree", "not told apart", "disagree")


class Pair(NamedTuple):
    """Two rows, the published order and ours."""

    larger: str
    smaller: str
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """From the interval of the difference."""
        return VERDICTS[0] if self.low > 0 else VERDICTS[2] if self.high < 0 else VERDICTS[1]


def _pairs(
    here: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Sequence[Row]], seed: int
) -> Iterator[Pair]:
    known = [name for name in PUBLISHED if name in here]
    for smaller, larger in itertools.combinations(known, 2):
        if PUBLISHED[larger].rank > PUBLISHED[smaller].rank:
            first, second = (rows[here[name]["id"]] for name in (larger, smaller))
            yield Pair(larger, smaller, *difference(first, second, seed))


def difference(
    first: Sequence[Row], second: Sequence[Row], seed: int
) -> tuple[float, float, float]:
    """CSG of one attack minus that of another on the same samples, with its 95 % interval."""
    other = {row.sample: row for row in second if not row.error}
    table: dict[str, NDArray[np.int64]] = {}
    for row in first:
        pair = other.get(row.sample)
        if row.error or pair is None:
            continue
        counts = (
            row.full_clean,
            row.compressed_clean,
            row.full_attacked,
            row.compressed_attacked,
            pair.full_attacked,
            pair.compressed_attacked,
        )
        table[row.image] = table.get(row.image, np.zeros(6, np.int64)) + np.array(counts, np.int64)

    def statistic(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore"):
            one = sums[:, 2] / sums[:, 0] - sums[:, 3] / sums[:, 1]
            two = sums[:, 4] / sums[:, 0] - sums[:, 5] / sums[:, 1]
        return (one - two)[:, None]

    found = cluster_bootstrap(np.stack(list(table.values())), statistic, seed=seed)
    point, low, high = (float(part[0]) for part in found)
    return point, low, high


def _row(cell: Mapping[str, Any], known: Published | None) -> str:
    figures = [
        cell["attack"],
        str(cell["n"]),
        arrow(dict(cell), "full"),
        arrow(dict(cell), "compressed"),
        value(dict(cell), "upr"),
        value(dict(cell), "cae"),
        interval(dict(cell), "csg"),
        *(_shown(part) for part in (known[:3] if known else (None, None, None))),
    ]
    return f"| {' | '.join(figures)} |"


def _shown(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.3f}"


if __name__ == "__main__":
    main()
