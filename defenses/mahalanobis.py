"""Mahalanobis detector: is the picture far from what clean pictures look like to the tower?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from defenses.base import AdaptiveRoute, DefenseError
from defenses.detector import Cost, Detector, Observation, State, Traffic, standardise

MOST = 128
"""Dimensions the paper takes."""
_FAINT = 1e-6
"""Share of the largest variance below which a direction is rounding."""


@dataclass(frozen=True, kw_only=True)
class Mahalanobis(Detector):
    """The larger of two standardised distances from clean pictures: of CLS and of the mean patch.

    Paper: "Mahalanobis-Max" in "Feature-Aware Token Attack" (FATA), appendix H. Features of the
    vision tower's feature layer are projected onto the first principal components of n clean
    samples, with variances λ there::

        D(f) = sqrt( Σ_j (w_j · (f − mean))² / λ_j ),      score = max over CLS, patch of z(D)

    z standardises by mean and deviation of D over the clean samples.

    Args:
        dimensions: principal components, ≥ 1, at most n − 1 and the width; None is the smallest of
            128, a third of n and the width.

    Raises:
        DefenseError: if there are too few clean samples to fit.

    *Differs from the paper in …*: the exact layers and standardisation are not published, so this
    is a reconstruction [inferred]; a tower without CLS has the mean patch alone; with fewer than
    384 samples fewer components are taken, because a distance in as many dimensions as samples says
    nothing. Components with less than a millionth of the largest variance are dropped.
    """

    name: ClassVar[str] = "mahalanobis"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE
    learns: ClassVar[bool] = True

    dimensions: Annotated[int, Ge(1)] | None = None

    def observe(self, traffic: Traffic) -> Observation:
        """Features ``[B, D]`` of CLS, where there is one, and of the mean patch."""
        passes = traffic.model.passes
        inputs, layout, _ = passes.inputs(traffic.images)
        vision = passes.family.encode(inputs, [layout] * len(traffic.images))
        present = vision.present[..., None].to(vision.hidden().dtype)
        mean = (vision.hidden() * present).sum(1) / present.sum(1)
        found = {"patch": mean.double()}
        return found if vision.cls is None else {"cls": vision.cls.double(), **found}

    def fit(self, clean: Observation, noisy: Observation, attacked: Observation) -> State:
        """Components, variances, and the distances' own mean and deviation."""
        del noisy, attacked
        found: dict[str, Tensor] = {}
        for name, values in clean.items():
            found |= {f"{name}.{key}": one for key, one in self._fitted(values).items()}
        return found

    def _fitted(self, values: Tensor) -> dict[str, Tensor]:
        count, width = values.shape
        wanted = min(MOST, count // 3, width) if self.dimensions is None else self.dimensions
        if wanted < 1 or wanted > min(count - 1, width):
            raise DefenseError(
                f"defence {self.name}: {count} clean samples of width {width} do not fit "
                f"{max(wanted, 1)} dimensions; allowed are 1 to {min(count - 1, width)}, so raise "
                "calibration.samples or lower dimensions"
            )
        mean, components, variances = principal(values.double(), wanted)
        distances = distance(values.double(), mean, components, variances)
        return {
            "mean": mean,
            "components": components,
            "variances": variances,
            "centre": distances.mean(),
            "spread": distances.std(),
        }

    def judge(self, seen: Observation, state: State) -> Tensor:
        """The larger standardised distance."""
        scores = []
        for name, values in seen.items():
            one = {key: state[f"{name}.{key}"].to(values) for key in _KEYS}
            far = distance(values, one["mean"], one["components"], one["variances"])
            scores.append(standardise(far, one["centre"], one["spread"]))
        return torch.stack(scores).amax(0)

    def cost(self, full: float) -> Cost:
        """Nothing to speak of: the features are those of the answer's own pass."""
        del full
        return Cost(language=0.0, tower=0.0)


_KEYS = ("mean", "components", "variances", "centre", "spread")


def principal(values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[D]``, first principal components ``[k, D]`` and their variances ``[k]``.

    Args:
        values: float64 ``[n, D]``, n ≥ 2.
        count: components wanted; fewer come back where the rest has no variance.

    Raises:
        DefenseError: if all values are the same.
    """
    mean = values.mean(0)
    _, strengths, rows = torch.linalg.svd(values - mean, full_matrices=False)
    variances = strengths.square() / (len(values) - 1)
    real = variances > _FAINT * variances[0]
    if not bool(variances[0] > 0):
        raise DefenseError("defence mahalanobis: the features of all clean samples are the same")
    k = min(count, int(real.sum()))
    return mean, rows[:k], variances[:k]


def distance(values: Tensor, mean: Tensor, components: Tensor, variances: Tensor) -> Tensor:
    """Mahalanobis distance ``[B]`` of features ``[B, D]`` in the space of the components."""
    projected = (values - mean) @ components.T
    squared = (projected.square() / variances).sum(1)
    return (squared + 1e-18).sqrt()  # the root has no gradient at 0
