"""Units find workers: each once, neighbours together, nobody idle while there is work."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redteam.engines.dispatch import Dispatch
from redteam.engines.parcel import Parcel
from redteam.engines.ray import threads_each
from redteam.errors import ScenarioError
from redteam.plan import make_plan
from redteam.scenario import load_limited
from reports.records import Calibration

PLAN = make_plan(load_limited("quickstart", ["engine.batch_size=8"], None))


@settings(deadline=None, max_examples=60)
@given(samples=st.integers(0, 60), workers=st.integers(1, 7), seed=st.integers(0, 2**20))
def test_every_unit_is_handed_out_once_even_if_some_come_back(
    samples: int, workers: int, seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311
    units = list(PLAN.units(samples))
    dispatch, finished = Dispatch(units), Counter[str]()
    while True:
        worker = chance.randrange(workers)
        unit = dispatch.next(worker)
        if unit is None:
            assert len(dispatch) == 0, "a worker is idle while there is work"
            break
        if chance.random() < 0.2:
            dispatch.give_back(unit)
        else:
            finished[unit.id] += 1
    assert finished == {unit.id: 1 for unit in units}


def test_a_worker_stays_with_its_block() -> None:
    units = list(PLAN.units(16))
    dispatch = Dispatch(units)
    first, second = dispatch.next(1), dispatch.next(2)
    assert first is not None
    assert second is not None
    assert first.block != second.block
    for _ in range(3):
        one = dispatch.next(1)
        assert one is not None
        assert one.block == first.block


def test_a_worker_without_a_block_of_its_own_helps_where_most_is_left() -> None:
    dispatch = Dispatch(list(PLAN.units(16)))
    for worker in (1, 2):
        dispatch.next(worker)
    for _ in range(4):
        dispatch.next(1)
    helped = dispatch.next(3)
    assert helped is not None
    assert helped.block == 1, "worker 2 has done less of its block"


CALIBRATION = Calibration(
    target="t", compression="c", detector="d", samples=["a"], scores=[0.5], learnt_from=[]
)


def test_a_parcel_is_a_vault() -> None:
    parcel = Parcel([(CALIBRATION, None)])
    name = parcel.save_png(b"image")
    assert parcel.images == {name: b"image"}
    found = parcel.save_calibration(CALIBRATION.model_copy(update={"detector": "e"}), b"state")
    assert found.state is not None
    assert parcel.state(found.state) == b"state"
    assert [one.detector for one in parcel.calibrations()] == ["d", "e"]
    with pytest.raises(KeyError, match="no calibration"):
        parcel.state("0" * 64)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{type: local, workers: 2}", "workers need type: ray"),
        ("{type: ray, workers: 0}", "workers"),
        ("{type: ray, workers: many}", "workers"),
        ("{type: slurm}", "local"),
    ],
)
def test_engine_options_are_checked(value: str, said: str) -> None:
    with pytest.raises(ScenarioError, match=said):
        load_limited("quickstart", [f"engine={value}"], None)


def test_ray_takes_workers_and_an_address() -> None:
    given_ = load_limited("quickstart", ["engine={type: ray, workers: 3, address: auto}"], None)
    assert (given_.engine.workers, given_.engine.address) == (3, "auto")
    assert given_.hash == load_limited("quickstart", [], None).hash, "how is not what"


@pytest.mark.parametrize(
    ("cores", "workers", "each"),
    [
        ([2], 2, 1),
        ([8], 3, 2),
        ([3, 1], 2, 1),  # two each would leave the second worker without a machine
        ([4, 4], 3, 2),
        ([16, 16], 2, 16),
        ([1, 1], 2, 1),
        ([64, 2], 2, 32),
    ],
)
def test_no_worker_needs_more_cores_than_a_machine_has(
    cores: list[int], workers: int, each: int
) -> None:
    assert threads_each(cores, workers) == each
    assert sum(one // each for one in cores) >= workers
