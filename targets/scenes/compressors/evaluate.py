"""Measure a trained compressor on the test split and write its card.

``python -m targets.scenes.compressors.evaluate NAME FOLDER --write``: everything goes through
`LVLM.answer`, the road every scenario takes. Beside each setting stand the same method without its
weights and, at the same number of tokens, tokens drawn at random before the language model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from targets.scenes import load_scenes, world
from targets.scenes.compressors import training
from targets.scenes.compressors.card import write_card
from targets.scenes.evaluate import measure

if TYPE_CHECKING:
    from targets.compression.base import Compressor

TOKENS: Final[dict[str, tuple[int, ...]]] = {
    "explainability": (72, 36, 16),
    "quecc": (36, 16, 9, 4, 1),
    "tokenflex": (64, 36, 16),
    "sparsifiner": (72, 36, 16),
}
"""Visual tokens left of 144: 50, 25 and 11 %, or the counts a method can make."""


def settings(name: str, folder: Path) -> dict[str, Compressor | None]:
    """What a card reports, by label."""
    from targets.compression import Explainability, QueCC, Random, TokenFLEX

    kinds: dict[str, Any] = {
        "explainability": Explainability,
        "quecc": QueCC,
        "tokenflex": TokenFLEX,
    }
    if name == "sparsifiner":
        return connections(folder)
    out: dict[str, Compressor | None] = {"full tokens": None}
    for tokens in TOKENS[name]:
        out[f"{tokens} tokens"] = kinds[name](keep_tokens=tokens, weights=str(folder))
        out[f"{tokens} tokens, untrained"] = kinds[name](keep_tokens=tokens, weights="none")
        out[f"{tokens} tokens at random"] = Random(keep_tokens=tokens)
    return out


def connections(folder: Path) -> dict[str, Compressor | None]:
    """Sparsifiner's settings: sparse attention without dropping, and dropping without weights."""
    from targets.compression import Random, Sparsifiner

    out: dict[str, Compressor | None] = {"full tokens": None}
    for share in (0.5, 0.25, 0.1):
        for label, weights in (("", str(folder)), (", untrained", "none")):
            sparse = Sparsifiner(retention=1.0, connections=share, weights=weights)
            out[f"{share:.0%} of connections{label}"] = sparse
    for tokens in TOKENS["sparsifiner"]:
        out[f"{tokens} tokens, dense"] = Sparsifiner(keep_tokens=tokens)
        both = Sparsifiner(keep_tokens=tokens, connections=0.5, weights=str(folder))
        out[f"{tokens} tokens, 50% of connections"] = both
        out[f"{tokens} tokens at random"] = Random(keep_tokens=tokens)
    return out


def evaluate(name: str, folder: Path, checkpoint: str, asked: int) -> dict[str, Any]:
    """All settings on the first `asked` questions of the test split."""
    target = load_scenes(checkpoint)
    samples = world.samples("test", asked, questions_per_image=len(world.KINDS))
    scores = {}
    for label, compressor in settings(name, folder).items():
        scores[label] = measure(target, samples, compressor)
        sys.stdout.write(f"{label:32s} {scores[label].accuracy:.4f}\n")
        sys.stdout.flush()
    return {
        "compressor": name,
        "checkpoint": checkpoint,
        "split": "test",
        "questions": len(samples),
        "images": len({sample.image_id for sample in samples}),
        "accuracy": {label: round(score.accuracy, 4) for label, score in scores.items()},
        "by_kind": {label: score.by_kind for label, score in scores.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure a trained compressor.")
    parser.add_argument("name", choices=sorted(TOKENS))
    parser.add_argument("folder", type=Path, help="folder of its weights")
    parser.add_argument("--checkpoint", default="scenes-a")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--write", action="store_true", help="write evaluation.json and the card")
    arguments = parser.parse_args()
    result = evaluate(arguments.name, arguments.folder, arguments.checkpoint, arguments.questions)
    if arguments.write:
        path = arguments.folder / training.EVALUATION
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"written: {path}, {write_card(arguments.folder)}\n")


if __name__ == "__main__":
    main()
