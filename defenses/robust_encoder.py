"""Robust encoder: the vision tower with adversarially trained weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from torch import Tensor, nn

from defenses.base import AdaptiveRoute, DefenseError
from defenses.encoder import EncoderDefense

if TYPE_CHECKING:
    from defenses.tower_weights import TowerWeights
    from targets.lvlm import LVLM

_TOWERS: Final = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True, kw_only=True)
class RobustEncoder(EncoderDefense):
    """Replace the weights of the vision tower; projector and language model stay as they are.

    FARE ("Robust CLIP", arXiv 2402.12336), TeCoA (arXiv 2212.07016) and Sim-CLIP (arXiv
    2407.14971) are CLIP towers fine-tuned on attacked pictures. They are static: no randomness, no
    gradient to hide, no further pass, so answers take as long as before. They are trained on the
    *final embedding*, not on which tokens attention ranks first, on 224-pixel pictures; what they
    do for the ranking has to be measured. `scenes-a-ranking` is ours, for the scenes LVLM, and
    trained on the ranking (`targets.scenes.harden`).

    Args:
        weights: shipped tower (``scenes-a-ranking``), local folder, or hub id (such as
            ``chs20/fare2-clip``, ``chs20/fare4-clip``, ``chs20/tecoa2-clip`` or
            ``chs20/tecoa4-clip``), in OpenCLIP's or transformers' names; safetensors only.
        revision: commit, tag or branch of a hub id.
        file: which file of the folder, if there are several.
        positions: how position embeddings are interpolated if the tower was trained on another
            grid (16 × 16 patches at 224 pixels, 24 × 24 at 336), or ``refuse``. Recorded.

    Raises:
        DefenseError: if the weights are not there, pickled, of another shape or activation, or if
            the target has no tower of CLIP or SigLIP.

    *Differs from the papers in …*: where the grid differs, position embeddings are interpolated
    here and not trained on; FARE's own LLaVA results use the tower at its 224 pixels. [inferred]
    """

    name: ClassVar[str] = "robust_encoder"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    weights: str = "scenes-a-ranking"
    revision: str | None = None
    file: str | None = None
    positions: Literal["bicubic", "bilinear", "refuse"] = "bicubic"

    def harden(self, model: LVLM) -> LVLM:
        """The model with this tower; all other weights are the same tensors, not copies.

        Args:
            model: the target as loaded; stays as it is.

        Returns:
            Its `identity` is the target's with ``encoder`` (source), ``encoder_weights`` (SHA-256
            of the files), ``encoder_layout``, ``encoder_positions`` (``as trained``, or how they
            were interpolated), ``encoder_tokens``, ``encoder_activation`` and, from the hub,
            ``encoder_revision``.
        """
        from defenses import tower_weights

        inner = model.family.model
        config = getattr(inner.config, "vision_config", None)
        kind = getattr(config, "model_type", None)
        if config is None or kind not in _TOWERS:
            raise DefenseError(
                f"defence {self.name}: the target's vision tower is {kind!r}; towers that can be "
                f"replaced are {', '.join(_TOWERS)}"
            )
        tower = model.family.tower
        found = self._read(model)
        self._same_activation(found, str(config.hidden_act))
        side = int(config.image_size) // int(config.patch_size)
        new, done = tower_weights.fitted(found, tower, (side, side), self.positions)
        return model.around(
            _with_tower(inner, tower, new),
            model.identity
            | {
                "encoder": found.source,
                "encoder_weights": found.digest,
                "encoder_layout": found.layout,
                "encoder_positions": done,
                "encoder_tokens": str(side * side),
                "encoder_activation": f"{config.hidden_act}"
                + ("" if found.activation else " (the target's; the tower does not say)"),
            }
            | ({"encoder_revision": found.revision} if found.revision else {}),
        )

    def _read(self, model: LVLM) -> TowerWeights:
        """The weights; a shipped tower only for the checkpoint it was made for."""
        from dataclasses import replace

        from defenses import tower_weights
        from targets.scenes import checkpoints, hardened

        shipped = hardened()
        if self.weights not in shipped:
            if "/" not in self.weights and not self.weights.startswith((".", "~")):
                from pathlib import Path

                if not Path(self.weights).is_dir():
                    raise DefenseError(
                        f"defence {self.name}: weights is {self.weights!r}, which is no folder, no "
                        f"hub id (owner/name) and no shipped tower; shipped: "
                        f"{', '.join(shipped) or 'none (the installation is incomplete)'}"
                    )
            return tower_weights.read(self.weights, self.revision, self.file)
        folder = shipped[self.weights]
        owner, target = folder.parent.parent.name, model.identity.get("name", "")
        if target in checkpoints() and target != owner:
            raise DefenseError(
                f"defence {self.name}: {self.weights} was made for {owner}; the target is {target}"
            )
        return replace(tower_weights.read(str(folder)), source=self.weights)

    def _same_activation(self, found: TowerWeights, own: str) -> None:
        """Weights trained under another activation would give other features, without a word."""
        if found.activation not in (None, own):
            raise DefenseError(
                f"defence {self.name}: the tower {found.source!r} was trained with activation "
                f"{found.activation}, the target's tower has {own}; its features would be wrong"
            )


def _with_tower(model: Any, tower: Any, new: dict[str, Tensor]) -> Any:  # noqa: ANN401 - untyped
    """A model whose tower has other values and whose other weights are the very same tensors."""
    from defenses.tower_weights import canonical

    memo: dict[int, Any] = {}
    for one in (*model.parameters(), *model.buffers()):
        memo[id(one)] = one
    for name, one in tower.named_parameters():
        value = new[canonical(name)].to(device=one.device, dtype=one.dtype, copy=True)
        memo[id(one)] = nn.Parameter(value, requires_grad=False)
    return copy.deepcopy(model, memo)
