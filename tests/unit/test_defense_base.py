"""What a defence must declare, and what its final call refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from defenses import (
    UNVERIFIED,
    AdaptiveRoute,
    Defense,
    DefenseError,
    DefenseKind,
    InputDefense,
)


@dataclass(frozen=True, kw_only=True)
class BitDepth(InputDefense):
    """Fewer grey levels: no useful gradient of its own."""

    name: ClassVar[str] = "bit_depth"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.BPDA
    bits: int = 3

    def transform(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        del generators
        top: int = 2**self.bits - 1
        return torch.round(images * top) / top


@dataclass(frozen=True, kw_only=True)
class Jitter(InputDefense):
    """Random brightness per sample."""

    name: ClassVar[str] = "jitter"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.EOT
    stochastic: ClassVar[bool] = True

    def transform(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        scale = torch.stack([torch.rand((), generator=g) for g in generators])
        return images * scale.view(-1, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Broken(InputDefense):
    """Breaks one promise at a time."""

    name: ClassVar[str] = "broken"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.NONE
    how: Literal["shape", "range", "nan"] = "shape"

    def transform(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        del generators
        results = {
            "shape": images[:, :, 1:],
            "range": images + 1,
            "nan": torch.full_like(images, float("nan")),
        }
        return results[self.how]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_defence_without_a_route_is_unverified() -> None:
    assert Broken().badge == UNVERIFIED == "UNVERIFIED (upper bound)"
    assert not Broken().verifiable
    assert BitDepth().badge is None
    assert BitDepth().verifiable


def test_the_base_of_a_kind_sets_it() -> None:
    assert BitDepth.kind is DefenseKind.INPUT
    assert {kind.value for kind in DefenseKind} == {
        "input",
        "selection",
        "decoding",
        "encoder",
        "detector",
        "fallback",
        "stack",
    }


@pytest.mark.parametrize(
    ("base", "body", "says"),
    [
        (InputDefense, {}, "mute: adaptive is None; name one of AdaptiveRoute.DIFFERENTIABLE"),
        (InputDefense, {"adaptive": "bpda"}, "adaptive is 'bpda'"),
        (Defense, {"adaptive": AdaptiveRoute.EOT}, "kind is None; name one of DefenseKind.INPUT"),
        (InputDefense, {"adaptive": AdaptiveRoute.BPDA, "stochastic": True}, "EOT or NONE"),
    ],
)
def test_a_class_that_does_not_declare_itself_cannot_be_defined(
    base: type, body: dict[str, object], says: str
) -> None:
    with pytest.raises(DefenseError, match=says):
        type("Mute", (base,), {"name": "mute", **body})


def test_bpda_is_exact_forward_and_identity_backward(images: Tensor) -> None:
    live = images.clone().requires_grad_()
    defended = BitDepth(bits=2)(live, [1, 2, 3])
    torch.testing.assert_close(defended, (images * 3).round() / 3)
    (gradient,) = torch.autograd.grad(defended.sum(), live)
    assert torch.equal(gradient, torch.ones_like(images))


def test_randomness_belongs_to_the_sample(images: Tensor) -> None:
    together, alone = Jitter()(images, [7, 8, 9]), Jitter()(images[1:2], [8])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(Jitter()(images[1:2], [5]), alone)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("shape", r"\[3, 3, 7, 8\] of \[3, 3, 8, 8\]"),
        ("range", r"values in \[1.*allowed is \[0, 1\]"),
        ("nan", r"values in \[nan, nan\]"),
    ],
)
def test_a_result_that_is_no_image_is_refused(
    images: Tensor, how: Literal["shape", "range", "nan"], says: str
) -> None:
    with pytest.raises(DefenseError, match=says):
        Broken(how=how)(images, [1, 2, 3])


def test_seeds_are_one_per_sample(images: Tensor) -> None:
    with pytest.raises(DefenseError, match="3 images but 1 seeds"):
        BitDepth()(images, [1])


def test_repr_is_provenance() -> None:
    assert repr(BitDepth(bits=4)) == "BitDepth(bits=4)"
