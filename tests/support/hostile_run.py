"""A run in which every string that comes from outside is hostile."""

from __future__ import annotations

from pathlib import Path

from report_data import cell, manifest, swap, tokens, trial

from reports.records import Answer, Answers, GateSpec
from reports.store import RunStore

HOSTILE = [
    "<script>alert(1)</script>",
    "</failure></testcase><testcase name='injected'/>",
    '"><svg onload=alert(1)> & <!ENTITY x SYSTEM "file:///etc/passwd"> &x;',
    "]]> <![CDATA[ x ]]> <?xml version='1.0'?>",
    "{0} {{ 7 * 7 }} [click](https://evil.example) ![x](https://evil.example/x.png) [1](2)",
    "| a | b |\n|---|---|\n# heading\n- list\n```\n---\nmodel-index: []\n...",
    "https://evil.example www.evil.example @everyone #1 $x^2$ ~~gone~~",
    "safe\u202egnp.exe \u2066x\u2069 \u200b\u0000\u0007\u001b[31mred\u001b]0;title\u0007"
    "\u009b31m\ufeff",
    "odd \uffff \ufffe \x7f \x0b \x0c \x85 \u2028 end",
    "=cmd|' /C calc'!A0",
    "+1+1\t=2",
    "-2+3+cmd|' /C calc'!A0",
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "\t=1+1",
    "\r\n=1+1,second,third",
    "＝1+1",
    ' "=1+1',
    "../../etc/passwd",
    "..\\..\\windows:CON",
    "$(touch /tmp/owned) `id`; rm -rf ~",
    "[bold red]markup[/bold red] [link=https://evil.example]x[/link]",
    "yes: &anchor !!python/object/apply:os.system ['id']",
]
"""Markup, links, control and bidirectional characters, formulas, paths, commands."""

FORBIDDEN = [
    "\u202e", "\u2066", "\u2069", "\u200b", "\u0000", "\u0007", "\u001b", "\u009b", "\ufeff",
    "\ufffe", "\uffff", "\x7f", "\x0b", "\x0c", "\x85", "\u2028",
]  # fmt: skip
"""Characters that no text for people may hold."""


def samples() -> list[str]:
    """Ids, one for each hostile string, and one that ends in an error."""
    return [f"{text} {i}" for i, text in enumerate(HOSTILE)] + ["e"]


def build(folder: Path) -> Path:
    """Write the run folder, without reports."""
    odd = cell(
        "c1", target=HOSTILE[0], compression=HOSTILE[9], attack=HOSTILE[7], defense=HOSTILE[4],
        knowledge=HOSTILE[5], norm=HOSTILE[0], spec={"attack": {HOSTILE[0]: HOSTILE[1]}},
    )  # fmt: skip
    gates = [
        GateSpec(name=text, metric="csfr" if i else text, max=0.1, line=i + 1)
        for i, text in enumerate(HOSTILE)
    ]
    gates.append(GateSpec(name="none", metric="csfr", max=0.1, where={"attack": HOSTILE[1]}))
    planned = manifest(
        cells=[odd], gates=gates, name=HOSTILE[3], description=HOSTILE[8],
        created=HOSTILE[10], scenario_hash=HOSTILE[4],
        provenance={
            "command": f"redteam run {HOSTILE[19]}.yaml",
            "versions": {"redteam": HOSTILE[0]},
            HOSTILE[0]: [HOSTILE[9]],
        },
        scenario={"dataset": {"type": HOSTILE[5], "split": HOSTILE[21]}},
    ).model_copy(update={"samples": samples()})  # fmt: skip
    with RunStore.create(folder, planned, "\n".join(HOSTILE)) as store:
        store.append(
            trial(
                name, question=text, truth=text, kind=text, image=text, answers=_answers(text),
                swap=swap().model_copy(update={"recovered_text": text, "reproduced_text": text}),
                tokens=tokens(), checks=[text], made_by=text,
                clean_png="0" * 64, attacked_png="f" * 64,
            )
            for name, text in zip(samples(), HOSTILE, strict=False)
        )  # fmt: skip
        failed = trial("e", "error").error
        assert failed is not None
        store.append([trial("e", "error", error=failed.model_copy(
            update={"type": HOSTILE[0], "message": HOSTILE[9], "where": HOSTILE[7],
                    "traceback": "\n".join(HOSTILE)}))])  # fmt: skip
    return folder


def _answers(text: str) -> Answers:
    right, wrong = (Answer(text=text, correct=flag) for flag in (True, False))
    return Answers(
        clean_full=right, clean_compressed=right, attacked_full=right, attacked_compressed=wrong
    )
