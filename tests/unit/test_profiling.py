"""Every second of a profiled run counts to exactly one phase, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch

from redteam import profiling
from redteam.profiling import DECODE, HARNESS, PREFILL, Profile


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(profiling.time, "perf_counter", found)
    return found


def test_time_is_exclusive_and_adds_up(clock: Clock) -> None:
    with Profile() as profile:
        clock.now += 1
        with profile.phase("outer"):
            clock.now += 2
            with profile.phase("inner"):
                clock.now += 4
            clock.now += 8
            with profile.phase("inner"):
                clock.now += 16
        clock.now += 32
    found = profile.as_json()
    seconds = {name: one["seconds"] for name, one in found["phases"].items()}
    assert seconds == {HARNESS: 33, "inner": 20, "outer": 10}
    assert found["wall_seconds"] == 63 == sum(seconds.values())
    assert found["phases"]["inner"]["calls"] == 2
    assert sum(one["share"] for one in found["phases"].values()) == pytest.approx(1, abs=1e-3)


def test_a_phase_that_raises_is_closed(clock: Clock) -> None:
    def fail(profile: Profile) -> None:
        with profile.phase("outer"):
            clock.now += 1
            raise ZeroDivisionError

    with Profile() as profile:
        with pytest.raises(ZeroDivisionError):
            fail(profile)
        with profile.phase("next"):
            clock.now += 2
    seconds = {name: one["seconds"] for name, one in profile.as_json()["phases"].items()}
    assert seconds == {"next": 2, "outer": 1, HARNESS: 0}


def test_loading_is_no_overhead(clock: Clock) -> None:
    with Profile() as profile:
        with profile.phase(profiling.LOAD):
            clock.now += 50
        with profile.phase(profiling.VISION):
            clock.now += 9
        clock.now += 1
    assert profile.as_json()["overhead"] == pytest.approx(0.1)


def test_passes_of_a_module_are_told_apart_and_cut_ones_do_not_shift_the_rest(
    clock: Clock,
) -> None:
    class Text(torch.nn.Module):
        def forward(self, inputs_embeds: torch.Tensor, *, fail: bool = False) -> torch.Tensor:
            clock.now += inputs_embeds.shape[1]
            if fail:
                raise RuntimeError("cut short")
            return inputs_embeds

    with Profile() as profile:
        text = Text()
        profile._hook(text, profiling._text_phase)
        text(inputs_embeds=torch.zeros(1, 7, 2))
        with pytest.raises(RuntimeError, match="cut short"):
            text(inputs_embeds=torch.zeros(1, 5, 2), fail=True)
        text(inputs_embeds=torch.zeros(1, 1, 2))
    assert dict(profile.seconds) == {PREFILL: 12, DECODE: 1}
    text(inputs_embeds=torch.zeros(1, 3, 2))
    assert profile.seconds[PREFILL] == 12, "the clocks are gone"


def test_nothing_stays_patched() -> None:
    from attacks.base import Attack
    from reports.store import RunStore
    from targets.passes import Passes

    def state() -> tuple[object, ...]:
        return (Attack.__call__, torch.autograd.grad, RunStore.append, Passes.__init__)

    before = state()
    with Profile():
        assert all(now is not then for now, then in zip(state(), before, strict=True))
    assert state() == before
