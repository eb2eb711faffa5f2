"""Gaussian smoothing with a vote: several noisy copies are answered, the majority is believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute, InputDefense


@dataclass(frozen=True, kw_only=True)
class GaussianVote(InputDefense):
    """Answer several copies of the picture, each with noise of its own, and take the majority.

    Paper: the prediction of randomised smoothing (Cohen et al., arXiv 1902.02918), for generated
    answers: ``argmax_a #{j : f(clip(x + sigma · z_j)) = a}`` with z standard normal.
    `defenses.voting.majority` says which answers are the same. **There is no certificate**: its
    radius is an l2 norm, and 2/255 on every pixel of a picture of 336 is an l2 norm of 4.6 already,
    against a sigma of a tenth.

    Args:
        sigma: deviation of the noise in [0, 1] pixel units, 0 to 1; 0 is no defence.
        copies: answers that vote, ≥ 1; each costs a whole answer.

    *Differs from the paper in …*: no certificate and no abstaining; few copies instead of
    thousands; equally frequent answers go to the earliest; noisy copies are clipped to valid
    colours. An adaptive attack takes the mean over draws of its loss, not of the votes.
    """

    name: ClassVar[str] = "gaussian_vote"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.EOT
    stochastic: ClassVar[bool] = True

    sigma: Annotated[float, Interval(ge=0, le=1)] = 0.05
    copies: Annotated[int, Ge(1)] = 5

    @property
    def route(self) -> AdaptiveRoute:
        """Without noise there is nothing to go through."""
        return self.adaptive if self.draws else AdaptiveRoute.DIFFERENTIABLE

    @property
    def draws(self) -> bool:
        """Only with noise."""
        return self.sigma > 0

    @property
    def votes(self) -> int:
        """How many draws are answered; one without noise, where all would be the same."""
        return self.copies if self.draws else 1

    def transform(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One noisy copy of each picture."""
        if self.sigma == 0:
            return images
        noise = torch.stack([torch.randn(images.shape[1:], generator=one) for one in generators])
        return (images + self.sigma * noise.to(images)).clamp(0, 1)
