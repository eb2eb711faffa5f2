"""The hash of a pipeline says what was used, on both sides alike."""

from __future__ import annotations

from defenses.base import Defense
from defenses.fingerprint import deployed, fingerprint, pipeline
from defenses.guard import Guard
from defenses.hybrid import Hybrid
from defenses.random_floor import RandomFloor
from defenses.resize_pad import ResizePad
from defenses.stack import Stack
from defenses.vcd import VCD
from targets.compression import FastV, VisionZip
from targets.compression.base import Compressor

FASTV = FastV(layer=2, retention=0.25)


def both(defense: Defense, compressor: Compressor = FASTV, salt: int = 5) -> tuple[str, str]:
    """Of an attack's graph, and of a deployment that draws with another salt."""
    guard = Guard.of(defense)
    return pipeline(compressor, guard), deployed(guard.protect(compressor, salt), guard)


def test_two_sides_of_one_pipeline_agree() -> None:
    stack = Stack(members=(ResizePad(), Hybrid(), RandomFloor(), VCD()))
    found = [both(one) for one in (Hybrid(), RandomFloor(), ResizePad(), VCD(), stack)]
    assert all(attacked == used for attacked, used in found)
    assert len({attacked for attacked, _ in found}) == 5
    assert both(RandomFloor(), salt=6) == both(RandomFloor(), salt=7)


def test_any_difference_shows() -> None:
    whole = both(Stack(members=(Hybrid(), RandomFloor())))[1]
    others = [
        both(Stack(members=(RandomFloor(), Hybrid())))[0],  # they act in this order
        both(Stack(members=(Hybrid(), RandomFloor(rho=0.3))))[0],
        both(Stack(members=(Hybrid(), RandomFloor())), VisionZip(retention=0.25))[0],
        both(Stack(members=(Hybrid(), RandomFloor())), FastV(layer=3, retention=0.25))[0],
        both(Hybrid())[0],
        pipeline(None, Guard.of(Stack(members=(Hybrid(), RandomFloor())))),
        pipeline(FASTV, Guard()),
    ]
    assert whole not in others
    assert len(set(others)) == len(others)


def test_what_is_not_in_the_compressor_is_not_deployed() -> None:
    guard = Guard.of(Hybrid())
    assert deployed(FASTV, guard) == pipeline(FASTV, Guard()) != pipeline(FASTV, guard)


def test_a_part_and_the_whole_that_is_this_part_are_one() -> None:
    (part,) = Hybrid().parts()
    assert fingerprint(part) == fingerprint(Hybrid()) != fingerprint(Hybrid(diverse=0.25))
    assert len(fingerprint(part)) == 12
