"""How a scenario names targets, and the absence of a defence: options that load on demand.

Reading this module costs nothing; torch is imported by `load`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from redteam.errors import InstallationError

if TYPE_CHECKING:
    from defenses.base import Defense
    from targets.compression.base import Compressor
    from targets.lvlm import LVLM


@dataclass(frozen=True, kw_only=True)
class ScenesTarget:
    """The embedded LVLM, trained by this repository on drawn scenes; needs no download.

    Args:
        checkpoint: which of the shipped ones.
        dtype: of the weights.
        attn_implementation: ``auto`` is flash_attention_2 where it runs, else sdpa.
    """

    name: ClassVar[str] = "scenes"
    capabilities: ClassVar[tuple[str, ...]] = (
        "gradients",
        "visual_tokens",
        "option_scores",
        "generate",
    )
    seconds: ClassVar[tuple[float, float]] = (0.006, 0.015)
    """Rough CPU seconds of one answer and of one gradient step of one image (two cores)."""

    checkpoint: str = "scenes-a"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"

    def load(self, device: str) -> LVLM:
        """Load it onto a device (``auto``, ``cpu``, ``cuda``, ``cuda:1`` …).

        Raises:
            TargetError: if there is no such checkpoint.
            InstallationError: if the installation ships none at all.
        """
        from targets.scenes import checkpoints, load_scenes

        if not checkpoints():
            raise InstallationError(
                "the weights of the scenes LVLM are missing from this installation "
                "(targets/scenes/weights); reinstall, or train them: python -m targets.scenes.train"
            )
        return load_scenes(
            self.checkpoint,
            device=device,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointTarget:
    """Any LVLM checkpoint of a supported family: a local folder or a hub id.

    Args:
        model: folder (relative to the scenario file) or hub id.
        revision: commit, tag or branch of a hub id; pin a commit for results that last.
        dtype: of the weights; ``auto`` is bfloat16 on a GPU that has it, else float32.
        device_map: ``single`` device, ``balanced`` over all GPUs, or ``auto``: balanced only where
            one GPU has too little free memory.
        attn_implementation: ``auto`` is flash_attention_2 where it runs, else sdpa.
        trust_remote_code: run Python code that comes with the checkpoint.
    """

    name: ClassVar[str] = "lvlm"
    capabilities: ClassVar[tuple[str, ...]] = (
        "gradients",
        "visual_tokens",
        "option_scores",
        "generate",
    )
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device_map: Literal["auto", "single", "balanced"] = "auto"
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False

    def load(self, device: str) -> LVLM:
        """Load it onto a device (``auto``, ``cpu``, ``cuda``, ``cuda:1`` …).

        Raises:
            TargetError: if it cannot be loaded as asked; the message says why.
        """
        from targets.lvlm import LVLM

        return LVLM.load(
            self.model,
            revision=self.revision,
            device=device,
            dtype=self.dtype,
            device_map=self.device_map,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, kw_only=True)
class Undefended:
    """No defence: the model as it is. List it beside defences to have the control."""

    name: ClassVar[str] = "none"
    kind: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Several compressors one after the other, each on what the one before has left.

    Args:
        stages: compressors as entries of their own (type and options), in the order they act.
    """

    name: ClassVar[str] = "pipeline"

    stages: tuple[str, ...]

    @staticmethod
    def of(parts: Sequence[Compressor]) -> Compressor:
        """The compressors as one.

        Raises:
            CompressionError: if they are not in the order they act.
        """
        from targets.compression.pipeline import Pipeline

        return Pipeline(stages=tuple(parts))


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """Several defences deployed together; written ``{stack: [robust_encoder, hybrid]}``.

    Args:
        stack: defences as entries of their own, in the order they act; at most one each of those
            that change weights, decoding or the number of tokens, or that rank other views.
    """

    name: ClassVar[str] = "stack"
    kind: ClassVar[str] = "stack"

    stack: tuple[str, ...]

    @staticmethod
    def of(members: Sequence[Defense]) -> Defense:
        """The defences as one.

        Raises:
            DefenseError: if they cannot act together.
        """
        from defenses.stack import Stack

        return Stack(members=tuple(members))
