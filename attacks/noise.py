"""Random noise: the control every attack is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Interval
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from attacks.transfer import borders
from targets.base import Batch, ImageView, Knowledge


@dataclass(frozen=True, kw_only=True)
class Noise(Attack):
    """Random noise in the ball; knows nothing of the target.

    An attack that does not beat noise at its own budget has found nothing about compression. The
    control for an attack with a pixel mask is that attack with ``steps=0`` and its random start.

    Args:
        distribution: ``uniform`` in [−epsilon, epsilon]; ``sign``, ±epsilon in every pixel, the
            corner of the ball; ``gaussian`` with a standard deviation of `sigma` × epsilon,
            clipped to the ball.
        norm: ``linf``, or ``l2`` (the same draw, scaled to a length of epsilon).
        sigma: standard deviation of ``gaussian`` in units of epsilon, > 0.
        border: only a frame of this width, as a share of the shorter side in (0, 0.5];
            None is the whole image.
        frame: ``inside`` the picture, or ``added`` around it in mid-grey, with the picture shrunk
            into it; the budget is then measured from the framed picture. With a border below 0.5.

    Raises:
        AttackError: for an option outside its range, or an added frame without a border.

    *Differs from the paper in …*: the noise of "Compression-Aware Attack" (arXiv 2601.12042) is
    called Gaussian and clipped to the linf ball without its deviation; 1 × epsilon is our choice,
    and uniform our default.
    """

    name: ClassVar[str] = "noise"
    knowledge: ClassVar[Knowledge] = Knowledge.NONE

    distribution: Literal["uniform", "sign", "gaussian"] = "uniform"
    norm: Literal["linf", "l2"] = "linf"
    sigma: Annotated[float, Gt(0)] = 1.0
    border: Annotated[float, Interval(gt=0, le=0.5)] | None = None
    frame: Literal["inside", "added"] = "inside"

    def __post_init__(self) -> None:
        """Check what an annotation cannot say."""
        super().__post_init__()
        if self.frame == "added" and (self.border is None or self.border == 0.5):
            raise AttackError(
                f"attack {self.name}: frame is 'added' and border {self.border!r}; allowed: a "
                "border in (0, 0.5), the width of the frame"
            )

    def budget(self, epsilon: float) -> Budget:
        """The ball; there are no steps."""
        return Budget(epsilon, self.norm)

    def canvas(self, images: Tensor) -> Tensor:
        """The clean pictures, or these in a grey frame."""
        if self.frame == "inside" or self.border is None:
            return images
        return borders.framed(images, self.border)

    def propose(self, view: ImageView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Clean images plus noise. `view` goes unused: noise knows nothing."""
        del view
        clean = batch.images
        delta = self._draw(rng, tuple(clean.shape[1:]), budget.epsilon)
        mask = None if self.border is None else borders.frame(clean, self.border)
        if mask is not None:
            delta = delta * mask
        if budget.norm == "l2":
            length = delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
            delta = delta * (budget.epsilon / length)
        return Proposal(clean + delta, mask=mask)

    def _draw(self, rng: SeedBank, shape: tuple[int, ...], epsilon: float) -> Tensor:
        if self.distribution == "uniform":
            return rng.uniform(shape, -epsilon, epsilon)
        if self.distribution == "sign":
            return rng.signs(shape) * epsilon
        return rng.normal(shape) * (self.sigma * epsilon)
