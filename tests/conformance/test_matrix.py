"""Every compressor on every family: it works, or it refuses with a reason; never silently wrong.

`docs/compatibility.md` is made of what happens here. To write it anew:
``REDTEAM_WRITE_DOCS=1 pytest tests/conformance/test_matrix.py``.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, batch, build

from redteam.catalog import BUILTIN, entries, load
from targets.compression import compress
from targets.compression.base import Compressor, Stage
from targets.errors import CompressionError
from targets.families import SUPPORTED, family_of

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
CLOSE = {"rtol": 0, "atol": 5e-5}
OPTIONS: dict[str, dict[str, Any]] = {
    **{
        # Weights belong to one model; here only the road they take is tried.
        name: {"retention": 0.5, "weights": "none"}
        for name in ("explainability", "quecc", "tokenflex")
    },
    "drop_all": {"layer": 2},
    "random": {"retention": 0.5, "layer": 2},
    "fastv": {"retention": 0.5, "layer": 2},
}
"""Options of compressors that need more than half of the tokens to be asked for."""
NAMES = sorted(set(BUILTIN["compressors"]) - {"pipeline"})
VERDICTS: dict[tuple[str, str], str] = {}
"""What happened: "" for works, else the reason it was refused."""


def compressor(name: str) -> Compressor:
    made: Compressor = load(entries("compressors")[name])(**OPTIONS.get(name, {"retention": 0.5}))
    return made


@lru_cache(maxsize=len(FAMILIES))
def model_of(family: str) -> tuple[Any, Any]:
    return build(family)


def logits(family: str, case: str, one: Compressor | None, mode: Any = "hard") -> Any:
    """Logits of the prompt's last token in each row, and the trace."""
    model, processor = model_of(family)
    inputs = batch(family, processor, case)
    with torch.no_grad():
        if one is None:
            return model(**inputs).logits[:, -1], None
        with compress(model, one, mode=mode, seeds=range(len(inputs["input_ids"]))) as session:
            return model(**inputs).logits[:, -1], session.trace


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_works_or_says_why_not(family: str, name: str) -> None:
    one = compressor(name)
    if one.stage is Stage.PIXELS:
        _on_pixels(family, one)
        return
    try:
        hard, trace = logits(family, "mixed", one)
    except CompressionError as error:
        reason = str(error).removeprefix(f"compressor {name}: ")
        assert len(reason.split()) > 4, f"{reason!r} is no reason"
        VERDICTS[family, name] = reason
        return
    plain, _ = logits(family, "mixed", None)
    # The row without an image stays as it is, those with images do not.
    assert torch.allclose(hard[2], plain[2], **CLOSE)
    assert float((hard[:2] - plain[:2]).abs().amax()) > 1e-4
    masked, _ = logits(family, "mixed", one, "masked")
    if one.stage is not Stage.ATTENTION:
        assert torch.allclose(hard, masked, **CLOSE)
    if trace.kept is not None:
        assert trace.kept.shape[0] == 3
    text, _ = logits(family, "text only", one)
    bare, _ = logits(family, "text only", None)
    assert torch.allclose(text, bare, **CLOSE)
    VERDICTS[family, name] = ""


def _on_pixels(family: str, one: Compressor) -> None:
    """Those act before the processor: fewer pixels, and fewer tokens where the family is native."""
    model, processor = model_of(family)
    preprocess = family_of(model).preprocessing(processor)
    reason = one.refuses(family_of(model))
    if reason:
        VERDICTS[family, one.name] = reason
        return
    images = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    small = one.shrink(images)
    before = preprocess.layout((96, 64)).tokens
    after = preprocess.layout((small.shape[-2], small.shape[-1])).tokens
    assert after < before
    VERDICTS[family, one.name] = ""


def page() -> str:
    """The page as it should be."""
    header = "| compressor | " + " | ".join(FAMILIES) + " |"
    lines = [header, "|---" * (len(FAMILIES) + 1) + "|"]
    reasons: dict[str, int] = {}
    for name in NAMES:
        cells = []
        for family in FAMILIES:
            reason = VERDICTS[family, name]
            number = reasons.setdefault(reason, len(reasons) + 1) if reason else 0
            cells.append(f"[{number}]" if reason else "yes")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = [f"- [{number}] {reason}" for reason, number in reasons.items()]
    intro = (
        "# What works with what\n\n"
        "Every compressor on every family of models, as the test suite found it on tiny\n"
        "randomly initialised models (`tests/conformance/test_matrix.py` makes this page).\n"
        "*yes*: a batch of rows with two images, one and none runs; dropping tokens equals\n"
        "masking them; rows without images are left alone. A number: it refuses, for the\n"
        "reason below. Trained methods (explainability, quecc, tokenflex) are tried in their\n"
        "untrained mode, since weights belong to one model: those that redteam ships belong to\n"
        "its scenes LVLM, and are refused on others.\n\n"
    )
    return intro + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


def test_the_page_says_what_happened() -> None:
    if len(VERDICTS) < len(FAMILIES) * len(NAMES):
        pytest.skip("runs after the whole matrix only; run the whole file")
    if os.environ.get("REDTEAM_WRITE_DOCS"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_family_has_a_fixture() -> None:
    assert set(FAMILIES) == set(SUPPORTED)
