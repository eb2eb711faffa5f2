# ruff: noqa: E501 - a page is written here, and its lines are long
"""Make docs/results/compressors.md: ``python benchmarks/results_compressors.py``.

Runs ``redteam measure scenarios/compressors.yaml --retention 0.5,0.25,0.11`` and writes its table.
The figures of the page are made from ``measurement.json`` alone; the explanations of methods that
do not beat chance stand below, and a method that needs one and has none stops the script.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Final

from reports.measurement import Measurement, Setting, accuracy_interval, read

SCENARIO: Final = Path("scenarios/compressors.yaml")
SHARES: Final = ("50%", "25%", "11%")
COMMAND: Final = f"redteam measure {SCENARIO} --retention 0.5,0.25,0.11 --horizon 100"
BASELINES: Final = ("random", "uniform", "grid", "pool", "information_horizon")
"""Methods that look at nothing, or end in chance: no claim is made that they beat it."""
WHY: Final = {
    "hiprune": (
        "its register tokens are those with the largest attention *received* from all patches, "
        "and in this four-layer tower that is nearly flat (largest ÷ mean about 1.05) and highest "
        "on the background: of what it keeps at 11 %, fewer tokens show the answer than chance "
        "would keep. Equal to its slow reference: `tests/golden/test_hiprune.py`"
    ),
    "sparsevlm": (
        "its raters are the words that the image is most similar to in the *input embeddings*, a "
        "similarity this model never learned, and at the official layers, moved to its depth (1, 2 "
        "and 3 of 6), the wrong words rate. With all words of the question rating instead, and "
        "nothing else changed, it has .92 at 25 and at 11 %; dropping at layers 3 and 4 only it has "
        "1.00 and .97; recycling makes no difference (.42 with and without at 25 %; 64 validation "
        "samples each). Equal to its slow reference: `tests/golden/test_sparsevlm.py`"
    ),
}
"""Why a method does not beat random tokens at 11 %, with the evidence that it is what it says."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/measure-compressors"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/compressors.md"))
    parser.add_argument("--only-page", action="store_true", help="do not measure")
    arguments = parser.parse_args()
    if not arguments.only_page:
        words = COMMAND.split()[1:]
        command = [sys.executable, "-m", "redteam", *words, "--out", str(arguments.folder)]
        done = subprocess.run(command, check=False)  # noqa: S603
        if done.returncode:
            raise SystemExit(done.returncode)
    found = read(arguments.folder / "measurement.json")
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(page(found), encoding="utf-8")
    print(f"written: {arguments.page}")


def page(found: Measurement) -> str:
    """The whole page."""
    target = found.settings[0].target
    full = found.full(target)
    by_label = {one.compression: one for one in found.of(target)}
    methods = list(dict.fromkeys(one.method for one in found.of(target) if one.compression))
    rows = [_row(found, method, by_label) for method in methods]
    chance = by_label["random 11%"]
    losers = [m for m in methods if _beaten(by_label.get(f"{m} 11%"), chance)]
    unexplained = [m for m in losers if m.split()[0] not in (*WHY, *BASELINES)]
    if unexplained:
        raise SystemExit(f"no explanation for {unexplained}, which do not beat random at 11 %")
    notes = [f"- **{m}**: {WHY[m.split()[0]]}." for m in losers if m.split()[0] in WHY]
    horizon = found.horizons[0] if found.horizons else None
    return f"""# Every compressor on the scenes LVLM

Made by `python benchmarks/results_compressors.py`, which runs `{COMMAND}`; do not edit.

{full.n} samples of the held-out test split, one question a picture; seed {found.seed}; target {target}, {full.tokens:.0f}
visual tokens; device {found.provenance["hardware"]["device"]}; {found.created}. Accuracy with all tokens {full.accuracy:.3f}; 95 % intervals are
Wilson's. Nothing was tuned on these samples: every method has its defaults. The target is a tiny model of a
drawn world whose text model has six layers; **the order of methods here says little about their order on a
large model**. What the columns mean: [measure.md](../measure.md).

| compression | accuracy at 50 % | at 25 % | at 11 % | tokens left | layer average | agrees | evidence kept | most alike at 25 % |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

*tokens left* (in the last layer), *layer average*, *agrees* (with the answers of all tokens) and *evidence kept* are
those at 25 %. Methods inside the language model keep all tokens in its first layers, so at one budget they
carry more on average than methods in front of it.

## Against chance

Random tokens before the language model: {_accuracy(chance)} at 11 %. Methods that do not beat that (the intervals
meet), baselines aside:

{chr(10).join(notes) or "none."}

{_horizon(horizon)}"""


def _row(found: Measurement, method: str, by_label: dict[str, Setting]) -> str:
    at = {share: by_label.get(f"{method} {share}") for share in SHARES}
    middle = at["25%"] or by_label.get(method)
    cells = [_accuracy(at[share]) for share in SHARES]
    if middle is None:
        return f"| {method} | {' | '.join(cells)} | – | – | – | – | – |"
    speed = middle.speed
    average = "–" if speed is None else f"{sum(speed.visual) / len(speed.visual):.1f}"
    agrees = "–" if middle.agrees is None or not middle.n else f"{middle.agrees / middle.n:.2f}"
    made_anew = not middle.kept or middle.evidence_kept is None
    evidence = "–" if made_anew else f"{middle.evidence_kept:.2f}"
    cells += [f"{middle.left:.1f}", average, agrees, evidence, _closest(found, middle)]
    return f"| {method} | {' | '.join(cells)} |"


def _accuracy(one: Setting | None) -> str:
    if one is None or not one.n:
        return "–"
    low, high = accuracy_interval(one)
    return f"{one.accuracy:.3f} [{low:.2f}, {high:.2f}]"


def _closest(found: Measurement, one: Setting) -> str:
    empty = {other.compression for other in found.of(one.target) if not other.kept}
    pairs = [
        (pair.jaccard, pair.second if pair.first == one.compression else pair.first)
        for pair in found.overlaps
        if one.compression in (pair.first, pair.second)
        and pair.first.endswith(" 25%")
        and pair.second.endswith(" 25%")
        and not empty & {pair.first, pair.second}
    ]
    if not pairs:
        return "–"
    jaccard, name = max(pairs)
    return f"{name.removesuffix(' 25%')} {jaccard:.2f}"


def _beaten(one: Setting | None, chance: Setting) -> bool:
    """Whether a method is not clearly better than chance."""
    if one is None or not one.n:
        return False
    return accuracy_interval(one)[0] <= accuracy_interval(chance)[1]


def _horizon(one: object) -> str:
    from reports.measurement import Vanishing

    if not isinstance(one, Vanishing):
        return ""
    losses = ", ".join(f"{value:.2f}" for value in one.loss)
    return f"""## Horizon

Removing *all* visual tokens at the input of layer 0, 1, … costs the right answer, on average over {one.n} samples,
{losses} nats. The horizon (at most {one.tolerance} nats from there on) is layer {one.layer} of {len(one.loss)}.
"""


if __name__ == "__main__":
    main()
