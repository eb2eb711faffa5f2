"""A run folder in which every string that came from outside is hostile."""

from __future__ import annotations

from pathlib import Path

from report_data import cell, manifest, swap, tokens, trial

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


def build(folder: Path) -> Path:
    """Write the run folder, without reports."""
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
    return folder
