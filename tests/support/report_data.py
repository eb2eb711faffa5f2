"""Small trials, cells and manifests for tests of `reports`."""

from __future__ import annotations

from typing import Any

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

RIGHT, WRONG = "yes", "no"


def cell(id: str = "c1", **changes: Any) -> Cell:
    fields: dict[str, Any] = {
        "id": id,
        "target": "scenes-a",
        "compression": "fastv",
        "attack": "caa",
        "defense": "none",
        "epsilon": 8 / 255,
        "knowledge": "compressed",
        "knows_compression": True,
        "spec": {},
    }
    return Cell(**(fields | changes))


def manifest(
    samples: int = 4,
    *,
    cells: list[Cell] | None = None,
    gates: list[GateSpec] | None = None,
    **changes: Any,
) -> Manifest:
    fields: dict[str, Any] = {
        "name": "test",
        "created": "2026-01-02T03:04:05+00:00",
        "scenario": {"name": "test", "seed": 0, "attacks": [{"type": "caa", "steps": 30}]},
        "scenario_hash": "0" * 16,
        "seed": 0,
        "cells": cells if cells is not None else [cell()],
        "samples": [f"s{i}" for i in range(samples)],
        "gates": gates or [],
    }
    return Manifest(**(fields | changes))


def trial(sample: str = "s0", outcome: str = "1110", cell: str = "c1", **changes: Any) -> Trial:
    """A trial; `outcome` is right (1) or wrong (0) for c, c_K, c', c'_K, or "error"."""
    fields: dict[str, Any] = {
        "cell": cell,
        "sample": sample,
        "image": f"image-{sample}",
        "kind": "",
        "question": "is there a red circle?",
        "truth": RIGHT,
        "seed": 1,
    }
    if outcome == "error":
        fields["error"] = TrialError(
            type="RuntimeError", message="out of memory", where="attack", traceback="Traceback …"
        )
    else:
        c, c_k, c_adv, c_k_adv = (
            Answer(text=RIGHT if bit == "1" else WRONG, correct=bit == "1") for bit in outcome
        )
        fields["answers"] = Answers(
            clean_full=c, clean_compressed=c_k, attacked_full=c_adv, attacked_compressed=c_k_adv
        )
        fields["distance"] = Distance(linf=8 / 255, l2=3.0, psnr=31.0)
    return Trial(**(fields | changes))


def swap(diagnosis: Diagnosis = Diagnosis.RANKING) -> Swap:
    recovered = diagnosis in (Diagnosis.RANKING, Diagnosis.RANKING_PARTIAL)
    reproduced = diagnosis in (Diagnosis.RANKING, Diagnosis.MIXED)
    return Swap(
        recovered=recovered,
        reproduced=reproduced,
        recovered_text=RIGHT if recovered else WRONG,
        reproduced_text=WRONG if reproduced else RIGHT,
        diagnosis=diagnosis,
    )


def tokens(**changes: Any) -> Tokens:
    fields: dict[str, Any] = {
        "grid": (2, 2),
        "kept_clean": [0, 1],
        "kept_attacked": [1, 2],
        "jaccard": 1 / 3,
        "spearman": 0.2,
        "kendall": 0.1,
        "top_preserved": 0.0,
        "bottom_infiltrated": 1.0,
        "evidence": [0],
        "evidence_kept_clean": 1.0,
        "evidence_kept_attacked": 0.0,
    }
    return Tokens(**(fields | changes))
