"""The embedded target: a small LLaVA trained on drawn scenes, shipped with the package.

`load_scenes("scenes-a")` is the default target; "scenes-b" and "scenes-c", of other shapes and
seeds, are surrogates for transfer attacks. Recipe: `targets.scenes.train`; data:
`targets.scenes.world`. `hardened()` are adversarially trained vision towers for them, made by
`targets.scenes.harden`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from targets.errors import TargetError

if TYPE_CHECKING:
    from targets.lvlm import LVLM

WEIGHTS: Final = Path(__file__).parent / "weights"


def checkpoints() -> tuple[str, ...]:
    """Names of the shipped checkpoints."""
    return tuple(sorted(p.parent.name for p in WEIGHTS.glob("*/model.safetensors")))


def hardened() -> dict[str, Path]:
    """The shipped hardened vision towers: ``CHECKPOINT-NAME`` and the folder of each."""
    found = sorted(WEIGHTS.glob("*/robust/*/model.safetensors"))
    return {f"{p.parent.parent.parent.name}-{p.parent.name}": p.parent for p in found}


def load_scenes(checkpoint: str = "scenes-a", **options: Any) -> LVLM:  # noqa: ANN401
    """Load a shipped checkpoint.

    Args:
        checkpoint: one of `checkpoints()`.
        **options: passed on to `LVLM.load` (device, dtype, attn_implementation).

    Raises:
        TargetError: if there is no such checkpoint.
    """
    from targets.lvlm import LVLM

    if checkpoint not in checkpoints():
        raise TargetError(
            f"scenes checkpoint {checkpoint!r} does not exist; shipped: "
            f"{', '.join(checkpoints()) or 'none (the installation is incomplete)'}"
        )
    return LVLM.load(WEIGHTS / checkpoint, **options)
