"""Find the threshold of `rank_margin` for a fall-back rate on clean data.

``python benchmarks/calibrate_rank_margin.py calibration.yaml --rate 0.05``. The scenario names
target, compressions and a data set **other than the one that is tested on**, such as its validation
split; each compression gets a threshold of its own for each signal. Attacks are left alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from statistics import median

from defenses.rank_margin import RankMargin, threshold_for
from redteam.batching import Batcher, Failure
from redteam.evaluation import Asker, Shot, good
from redteam.scenario import load_scenario
from targets.compression.base import Compressor


def main() -> None:
    """Print one line for each target, compression and signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario")
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--signal", nargs="+", default=["jaccard", "kendall", "gap"])
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    scenario = load_scenario(given.scenario)
    samples = scenario.dataset.create().open()
    shots = {index: Shot(one, one.image, "") for index, one in enumerate(samples)}
    for target in scenario.targets:
        model = target.create().load(given.device)
        asker = Asker(model, Batcher(scenario.engine.batch_size), scenario.seed, 1)
        for compression in scenario.compressions:
            for signal in given.signal:
                margin = RankMargin(signal=signal)
                values = stabilities(asker, shots, margin, asker.instance(compression))
                print(
                    f"{target.label} · {compression.label} · {signal}: threshold "
                    f"{threshold_for(values, given.rate):.4g} for a rate of {given.rate:g} "
                    f"(n = {len(values)}, median {median(values):.4g})",
                    flush=True,
                )


def stabilities(
    asker: Asker, shots: Mapping[int, Shot], margin: RankMargin, compressor: Compressor
) -> list[float]:
    """Signals of all pictures; an error of one ends the calibration."""

    def some(indices: Sequence[int]) -> list[float]:
        chosen = [shots[index] for index in indices]
        asked = [one.sample.question for one in chosen]
        seeds = [0] * len(chosen)
        images = asker.images(chosen)
        found: list[float] = margin.stability(
            asker.model, images, asked, compressor, seeds
        ).tolist()
        return found

    found = asker.each(shots, some, "ranking clean pictures")
    wrong = [one for one in found.values() if isinstance(one, Failure)]
    if wrong:
        raise SystemExit(f"{wrong[0].error.where}: {wrong[0].error.message}")
    return list(good(found).values())


if __name__ == "__main__":
    main()
