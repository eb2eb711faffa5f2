"""Activation trajectory: does the picture move through the layers as attacked ones do?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn.functional import normalize

from defenses.base import AdaptiveRoute, DefenseError
from defenses.detector import SPREAD, Cost, Detector, Observation, State, Traffic, standardise

STAGES = ("vision", "projector", "language")
"""Parts of a model, each with a score of its own."""
_TAPS = 4
"""Taps in the tower and in the language model: at every quarter of their depth."""


@dataclass(frozen=True, kw_only=True)
class ActivationTrajectory(Detector):
    """Project activations on the direction attacks move them in, layer by layer.

    Paper: ML-ATD in "Feature-Aware Token Attack" (FATA), appendix H. Taps: the vision tower at each
    quarter of its depth (6, 12, 18, 24 of 24 layers), projector input and output, the language
    model at each quarter of its depth (8, 16, 24, 32 of 32), each averaged over the visual tokens
    and of unit length, f_l. With references that are clean or noisy (−) and attacked (+)::

        d_l = normalise(mean f_l⁺ − mean f_l⁻),  u_l = (f_l − mean f_l⁻) · d_l,
        z_l = u_l / std⁻(u_l),    A_stage = ∫ z dl (trapezoid, over the stage's depth),
        score = z⁻(A_stage)

    It has seen an attack: how well it does against another one, or another budget, is what a run
    measures. References are made of calibration pictures, never of tested ones.

    Args:
        stage: of which part the score is; ``mean`` is the mean of the three.
        reference: the attack the positive references are made with, with its own defaults.
        reference_epsilon: its budget and that of the noise, linf in [0, 1] pixel units.

    Raises:
        DefenseError: if there are fewer than two references of a kind.

    *Differs from the paper in …*: the paper averages the metrics of its three stages, not their
    scores, so ``mean`` is ours; depth runs from 0 to 1 in each stage, so that models of any number
    of layers can be compared; taps of a shallow tower that fall on one layer are one tap. How many
    references are taken and how their noise is drawn is not published [inferred]: one each, noise
    uniform. It looks at all visual tokens, whatever the compressor keeps, so watching costs a full
    prefill.
    """

    name: ClassVar[str] = "activation_trajectory"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE
    learns: ClassVar[bool] = True
    contrasts: ClassVar[bool] = True

    stage: Literal["vision", "projector", "language", "mean"] = "mean"
    reference: Literal["attention_only", "fata", "caa", "pgd", "noise"] = "attention_only"
    reference_epsilon: Annotated[float, Interval(gt=0, le=1)] = 0.03137254901960784

    def observe(self, traffic: Traffic) -> Observation:
        """Unit activations ``[B, D]`` at each tap, named ``stage.depth``."""
        passes, count = traffic.model.passes, len(traffic.images)
        family = passes.family
        layers = quarters(family.tower_depth)
        inputs, layout, size = passes.inputs(traffic.images)
        vision = family.encode(inputs, [layout] * count, sorted({*layers, family.feature_layer}))
        present = vision.present[..., None]
        found = {
            f"vision.{(layer + 1) / family.tower_depth:.4f}": _mean(vision.hidden(layer), present)
            for layer in layers
        }
        projected = family.project_tokens(vision.patches)
        found["projector.0.0000"] = _mean(vision.patches, present)
        found["projector.1.0000"] = _mean(projected, present)
        prompt = passes.prompts.prompt(traffic.questions, layout, size)
        depths = quarters(len(family.layers))
        with _Listening([family.layers[depth] for depth in depths]) as heard:
            family.run(prompt.ids, prompt.mask, family.encoded(inputs), inputs)
        visual = (prompt.ids == family.image_token_id)[..., None]
        for depth, hidden in zip(depths, heard.outputs, strict=True):
            name = f"language.{(depth + 1) / len(family.layers):.4f}"
            found[name] = _mean(hidden, visual.to(hidden.device)).to(traffic.images.device)
        return {name: normalize(one.double(), dim=-1) for name, one in found.items()}

    def fit(self, clean: Observation, noisy: Observation, attacked: Observation) -> State:
        """Directions and the negatives' own scales."""
        for what, part in (("clean", clean), ("noisy", noisy), ("attacked", attacked)):
            count = min((len(one) for one in part.values()), default=0)
            if count < 2:
                raise DefenseError(
                    f"defence {self.name}: {count} {what} references; at least 2 are needed, so "
                    "raise calibration.samples"
                )
        state: dict[str, Tensor] = {}
        for name in clean:
            negative = torch.cat([clean[name], noisy[name]]).double()
            centre = negative.mean(0)
            direction = normalize(attacked[name].double().mean(0) - centre, dim=0)
            along = (negative - centre) @ direction
            state |= {
                f"{name}.centre": centre,
                f"{name}.direction": direction,
                f"{name}.spread": along.std(),
            }
        both = {name: torch.cat([clean[name], noisy[name]]).double() for name in clean}
        for stage, area in areas(both, state).items():
            state |= {f"{stage}.mean": area.mean(), f"{stage}.deviation": area.std()}
        return state

    def judge(self, seen: Observation, state: State) -> Tensor:
        """The stage's score, or the mean of the three."""
        scores = {
            stage: standardise(area, state[f"{stage}.mean"], state[f"{stage}.deviation"])
            for stage, area in areas(seen, state).items()
        }
        if self.stage != "mean":
            return scores[self.stage]
        return torch.stack([scores[stage] for stage in STAGES]).mean(0)

    def cost(self, full: float) -> Cost:
        """A prefill with all visual tokens, and the tower."""
        return Cost(language=full, tower=1.0)


def areas(seen: Observation, state: State) -> dict[str, Tensor]:
    """Area under the z-scores over the depth of each stage, ``[B]`` each.

    A stage with a single tap has that tap's z-score.

    Args:
        seen: unit activations by tap.
        state: ``centre``, ``direction`` and ``spread`` of each tap.
    """
    found = {}
    for stage in STAGES:
        names = sorted(name for name in seen if name.startswith(f"{stage}."))
        scores, depths = [], []
        for name in names:
            values = seen[name]
            centre, direction = (state[f"{name}.{key}"].to(values) for key in _OF_TAP)
            along = (values - centre) @ direction
            scores.append(along / state[f"{name}.spread"].to(values).clamp_min(SPREAD))
            depths.append(float(name.partition(".")[2]))
        found[stage] = trapezoid(torch.stack(scores, 1), depths)
    return found


_OF_TAP = ("centre", "direction")


def trapezoid(values: Tensor, depths: Sequence[float]) -> Tensor:
    """Mean height of the polygon through values ``[B, n]`` at rising depths, ``[B]``."""
    if len(depths) == 1:
        return values[:, 0]
    place = values.new_tensor(depths)
    return torch.trapezoid(values, place, dim=1) / (place[-1] - place[0])


def quarters(depth: int) -> list[int]:
    """Layers (0-based) that end each quarter of so many; each once."""
    return sorted({max(round(depth * part / _TAPS), 1) - 1 for part in range(1, _TAPS + 1)})


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of ``[B, n, D]`` over the places that count, bool ``[B, n, 1]``."""
    weight = counts.to(values.dtype)
    return (values * weight).sum(1) / weight.sum(1).clamp_min(1)


class _Listening:
    """Outputs of layers of a language model in one forward pass, in their order."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._found: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    @property
    def outputs(self) -> list[Tensor]:
        return [self._found[index] for index in range(len(self._layers))]

    def __enter__(self) -> _Listening:
        self._handles = [
            layer.register_forward_hook(self._keep(index))
            for index, layer in enumerate(self._layers)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, index: int) -> Any:  # noqa: ANN401 - a forward hook
        def hook(module: object, inputs: object, output: Any) -> None:  # noqa: ANN401
            del module, inputs
            self._found.setdefault(index, output[0] if isinstance(output, tuple) else output)

        return hook
