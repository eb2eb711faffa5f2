"""A realistic run folder without a model: drawn scenes, plausible answers and rankings.

Run it to look at the report: ``python tests/support/synthetic_run.py FOLDER``.
"""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from reports.records import (
    Answer,
    Answers,
    Cell,
    Diagnosis,
    Distance,
    GateSpec,
    Manifest,
    Swap,
    Tokens,
    Trial,
    TrialError,
)
from reports.store import RunStore

GRID, PATCH, KEEP = 12, 8, 36
SIZE = GRID * PATCH
COLOURS = {
    "red": (214, 62, 62),
    "green": (70, 160, 80),
    "blue": (66, 100, 205),
    "yellow": (222, 196, 70),
    "purple": (140, 80, 170),
}
SHAPES = ("circle", "square", "triangle", "diamond")
COMPRESSIONS = ("fastv@2", "visionzip")
ATTACKS = {  # name: knowledge, share broken only when compressed at 8/255, share broken on both
    "noise": ("none", 0.00, 0.02),
    "pgd": ("white_box", 0.04, 0.62),
    "caa": ("compressed", 0.38, 0.03),
}
EPSILONS = (4 / 255, 8 / 255, 16 / 255)


def scene(seed: int) -> tuple[Image.Image, str, str, str, list[int]]:
    """Image, question, truth, kind and the tokens of the object asked about."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)  # noqa: S311
    coarse = noise.uniform(70, 190, (6, 6, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        points = [rng.randrange(SIZE) for _ in range(4)]
        draw.line(points, fill=tuple(rng.randrange(90, 180) for _ in range(3)), width=1)
    placed = rng.sample([(r, c) for r in range(1, GRID, 3) for c in range(1, GRID, 3)], 3)
    objects = [(rng.choice(list(COLOURS)), rng.choice(SHAPES), at) for at in placed]
    for colour, shape, (row, column) in objects:
        _draw(draw, shape, COLOURS[colour], column * PATCH, row * PATCH)
    pixels = np.asarray(image, dtype=np.int16) + noise.integers(-8, 9, (SIZE, SIZE, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    colour, shape, (row, column) = objects[0]
    evidence = [(row + dr) * GRID + column + dc for dr in (-1, 0) for dc in (-1, 0)]
    if rng.random() < 0.5:
        return image, f"what colour is the {shape}?", colour, "colour", sorted(evidence)
    return image, f"is there a {colour} {shape}?", "yes", "pope", sorted(evidence)


def _draw(
    draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: int, y: int
) -> None:
    r = 7
    if shape == "circle":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)
    elif shape == "square":
        draw.rectangle([x - r, y - r, x + r, y + r], fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
    else:
        draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=colour)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def cells() -> list[Cell]:
    return [
        Cell(
            id=f"{index:08x}",
            target="scenes-a",
            compression=compression,
            attack=attack,
            defense="none",
            epsilon=epsilon,
            knowledge=ATTACKS[attack][0],
            knows_compression=attack == "caa",
            spec={
                "target": {"type": "scenes", "checkpoint": "scenes-a"},
                "compression": {"type": compression.split("@")[0], "retention": 0.25},
                "attack": {"type": attack, "steps": 30},
            },
        )
        for index, (compression, attack, epsilon) in enumerate(
            (c, a, e) for c in COMPRESSIONS for a in ATTACKS for e in EPSILONS
        )
    ]


def manifest(samples: int) -> Manifest:
    scenario = {
        "name": "quickstart",
        "seed": 0,
        "targets": [{"type": "scenes", "checkpoint": "scenes-a"}],
        "dataset": {"type": "scenes", "split": "test", "samples": samples},
        "compressions": [
            {"type": "fastv", "layer": 2, "retention": 0.25},
            {"type": "visionzip", "retention": 0.25},
        ],
        "attacks": [{"type": "noise"}, {"type": "pgd", "steps": 20}, {"type": "caa", "steps": 30}],
        "epsilons": list(EPSILONS),
        "defenses": [],
    }
    return Manifest(
        name="quickstart",
        description="Does compressing visual tokens open a door? FastV and VisionZip at 25 %.",
        created="2026-01-02T03:04:05+00:00",
        scenario=scenario,
        scenario_hash="3fa9c1d2e4b50617",
        seed=0,
        cells=cells(),
        samples=[f"scenes-test-{i:04d}" for i in range(samples)],
        gates=[
            GateSpec(name="no compression-specific failures", metric="csfr", max=0.10,
                     where={"attack": "caa", "epsilon": 8 / 255}, line=23),
            GateSpec(name="noise is harmless", metric="csg", max=0.10,
                     where={"attack": "noise"}, line=26),
            GateSpec(name="clean accuracy holds", metric="acc_compressed_clean", min=0.92, line=28),
        ],
        provenance={
            "command": "redteam run scenarios/quickstart.yaml",
            "redteam": "0.1.0",
            "python": "3.11.7",
            "packages": {"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6"},
            "hardware": {"device": "cpu", "cores": 2, "threads": 2},
            "targets": {"scenes-a": {"weights": "9b1c44aa0c7be07d", "attention": "eager"}},
        },
    )  # fmt: skip


def trial(cell: Cell, sample: str, index: int, store: RunStore) -> Trial:
    image, question, truth, kind, evidence = scene(index // 2)
    seed = f"{cell.id}{index}"
    rng = random.Random(seed)  # noqa: S311
    head = {"cell": cell.id, "sample": sample, "image": f"scene-{index // 2}", "kind": kind,
            "question": question, "truth": truth, "seed": index}  # fmt: skip
    if cell.attack == "pgd" and index == 7 and cell.compression == "visionzip":
        error = TrialError(
            type="OutOfMemoryError", message="tried to allocate 2.1 GiB", where="attack",
            traceback="Traceback (most recent call last):\n  File …\nOutOfMemoryError",
        )  # fmt: skip
        return Trial(**head, error=error)
    outcome = _outcome(cell, index, rng)
    wrong = "no" if truth == "yes" else rng.choice([c for c in COLOURS if c != truth])
    answers = Answers(
        **{name: Answer(text=truth if ok else wrong, correct=ok) for name, ok in outcome.items()}
    )
    levels = round(cell.epsilon * 255)
    delta = np.random.default_rng(abs(hash_of(seed))).integers(-levels, levels + 1, (SIZE, SIZE, 3))
    if cell.attack != "noise":
        delta = np.sign(delta) * levels
    attacked = (np.asarray(image, dtype=np.int16) + delta).clip(0, 255).astype(np.uint8)
    change = (attacked.astype(float) - np.asarray(image)) / 255
    failed = [*outcome.values()] == [True, True, True, False]
    start, losses = rng.uniform(1, 2), []
    for step in range(30):
        losses.append(round(start * 0.9**step + rng.uniform(0, 0.05), 4))
    return Trial(
        **head,
        answers=answers,
        tokens=_tokens(cell, evidence, failed, rng),
        swap=_swap(cell, truth, wrong, rng) if failed else None,
        distance=Distance(
            linf=float(np.abs(change).max()),
            l2=float(np.sqrt((change**2).sum())),
            psnr=float(-10 * np.log10((change**2).mean())),
        ),
        clean_png=store.save_png(png(image)),
        attacked_png=store.save_png(png(Image.fromarray(attacked))),
        loss=[] if cell.attack == "noise" else losses,
        checks=["loss still falling at the last step: raise steps"] if rng.random() < 0.01 else [],
        timings={"attack": 0.31, "answer": 0.05},
    )


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[-7:], "big")


def _outcome(cell: Cell, index: int, rng: random.Random) -> dict[str, bool]:
    base = random.Random(index)  # noqa: S311
    full = base.random() < 0.97
    compressed = full and base.random() < 0.985
    strength = (cell.epsilon * 255 / 8) ** 0.7
    only, both = (min(0.95, share * strength) for share in ATTACKS[cell.attack][1:])
    if cell.compression == "visionzip":
        only = min(0.95, only * 1.4)
    draw = rng.random()
    return {
        "clean_full": full,
        "clean_compressed": compressed,
        "attacked_full": full and draw >= both,
        "attacked_compressed": compressed and draw >= both + only,
    }


def _tokens(cell: Cell, evidence: list[int], failed: bool, rng: random.Random) -> Tokens:
    others = [i for i in range(GRID * GRID) if i not in evidence]
    near = sorted(others, key=lambda i: (abs(i - evidence[0]) // 14, rng.random()))
    clean = sorted({*evidence, *near[:16], *rng.sample(near[16:], KEEP - 16 - len(evidence))})
    share = {"noise": 0.08, "pgd": 0.35, "caa": 0.75 if failed else 0.6}[cell.attack]
    out = set(rng.sample(clean, round(share * KEEP)))
    if failed:
        out |= set(evidence[: rng.choice([3, 4])])
    stay = [i for i in clean if i not in out]
    attacked = sorted([*stay, *rng.sample([i for i in others if i not in clean], KEEP - len(stay))])
    both, union = len({*clean} & {*attacked}), len({*clean, *attacked})
    return Tokens(
        grid=(GRID, GRID), kept_clean=clean, kept_attacked=attacked, jaccard=both / union,
        spearman=1 - 1.3 * share, kendall=1 - 1.2 * share, top_preserved=1 - share,
        bottom_infiltrated=share / 2, evidence=evidence, evidence_kept_clean=1.0,
        evidence_kept_attacked=len({*evidence} & {*attacked}) / len(evidence),
    )  # fmt: skip


def _swap(cell: Cell, truth: str, wrong: str, rng: random.Random) -> Swap:
    draw = rng.random() if cell.attack == "caa" else 1.0
    name = (
        Diagnosis.RANKING if draw < 0.75
        else Diagnosis.RANKING_PARTIAL if draw < 0.88
        else Diagnosis.MIXED if draw < 0.93
        else Diagnosis.CONTENT
    )  # fmt: skip
    recovered = name in (Diagnosis.RANKING, Diagnosis.RANKING_PARTIAL)
    reproduced = name in (Diagnosis.RANKING, Diagnosis.MIXED)
    return Swap(
        recovered=recovered, reproduced=reproduced, diagnosis=name,
        recovered_text=truth if recovered else wrong,
        reproduced_text=wrong if reproduced else truth,
    )  # fmt: skip


def build(folder: Path, samples: int = 96) -> Path:
    """Write a complete run folder, without reports."""
    planned = manifest(samples)
    with RunStore.create(folder, planned, "name: quickstart\n# as the user wrote it\n") as store:
        for cell in planned.cells:
            store.append(
                [trial(cell, name, index, store) for index, name in enumerate(planned.samples)]
            )
    return folder


if __name__ == "__main__":
    from reports import build_reports

    built = build_reports(build(Path(sys.argv[1])))
    sys.stdout.write(f"{built.headline}: {built.why}\n{built.report}\n")
