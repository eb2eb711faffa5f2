"""Measurements made up for tests of their page."""

from __future__ import annotations

from typing import Any

from reports.measurement import Evidence, Measurement, Overlap, Setting, Speed, Vanishing


def setting(compression: str, *, n: int = 100, frequency: bool = False, **more: Any) -> Setting:
    """One setting of target ``t`` with 144 tokens."""
    fields: dict[str, Any] = {
        "target": "t",
        "compression": compression,
        "method": compression,
        "n": n,
        "left": 36.0,
        "kept": 36.0,
        "tokens": 144.0,
        "speed": Speed(
            rows=4,
            prefill_ms=10.0,
            ranking_ms=0.1,
            decode_ms=1.0,
            macs=1e9,
            cache_bytes=2048.0,
            lengths=[10, 10],
            visual=[8.0, 8.0],
        ),
    }
    if frequency:
        fields |= {"grid": (2, 3), "frequency": [0.0, 0.1, 0.2, 0.3, 0.4, 1.0]}
    return Setting(**{**fields, **more})


def measurement(
    *settings: Setting, name: str = "made up", question: str = "what is it ?"
) -> Measurement:
    """A measurement of the settings, with one evidence map, one horizon and all overlaps."""
    names = [one.compression for one in settings if one.compression]
    return Measurement(
        name=name,
        created="2026-01-01T00:00:00+00:00",
        seed=0,
        data="0" * 64,
        formula="n",
        provenance={"command": "redteam measure x", "hardware": {"device": "cpu", "threads": 1}},
        settings=list(settings),
        overlaps=[
            Overlap(target="t", first=first, second=second, jaccard=0.5)
            for place, first in enumerate(names)
            for second in names[place + 1 :]
        ],
        evidence=[
            Evidence(
                target="t",
                sample="s",
                question=question,
                answer="a",
                layer=0,
                grid=(1, 2),
                full=0.9,
                none=0.1,
                only=[0.2, -0.1],
                without=[0.0, 0.3],
            )
        ],
        horizons=[Vanishing(target="t", loss=[1.0, 0.0], layer=1, tolerance=0.01, n=10)],
    )
