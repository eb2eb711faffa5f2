"""A cluster that was there before: two nodes of one CPU each, as processes on this machine.

It stays when a run ends, however that ends; a node that dies takes its worker and nothing else.
Starting it takes most of a minute, so this runs when asked for: ``-m exhaustive``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import ray_place
from ray_place import LOCAL, Cluster, marked, start, wait_until
from test_faults import TRIALS, check_images, summary
from test_ray_faults import DELAY, RUN, in_flight
from workplace import Workplace, ledger

pytest.importorskip("ray", reason="needs the extra [ray]")
pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With one uninterrupted run of the local engine, ``whole``."""
    built = ray_place.build(tmp_path_factory.mktemp("cluster") / "place", DELAY, LOCAL)
    assert built.redteam(*RUN, "whole").returncode == 4
    return built


@pytest.fixture(scope="module")
def nodes(place: Workplace) -> Iterator[Cluster]:
    with ray_place.cluster(place) as found:
        yield found


def on(nodes: Cluster, workers: int = 2) -> tuple[str, str]:
    engine = f"type: ray, workers: {workers}, batch_size: 2, device: cpu"
    return "--set", f"engine={{{engine}, address: '{nodes.address}'}}"


def workers_gone(nodes: Cluster) -> None:
    """No worker of a run that ended stays; Ray keeps idle processes of its own for a while."""
    wait_until(lambda: not marked(nodes.mark, "ray::Worker"), "the end of the workers", 60)


def check_whole(place: Workplace, name: str) -> None:
    assert summary(place.folder / name) == summary(place.folder / "whole")
    assert len(ledger(place.folder / name)) == TRIALS
    check_images(place.folder / name)


def test_a_run_uses_both_nodes_and_leaves_the_cluster_running(
    place: Workplace, nodes: Cluster
) -> None:
    before = nodes.raylets()
    process, _ = start(place, *RUN, "run", *on(nodes))
    in_flight(place.folder / "run")
    assert len(marked(nodes.mark, "ray::Worker.execute")) == 2
    _, err = process.communicate(timeout=300)
    assert process.returncode == 4, err
    assert "worker 2: " in err
    check_whole(place, "run")
    assert nodes.raylets() == before
    workers_gone(nodes)


def test_a_driver_that_is_killed_frees_the_cluster(place: Workplace, nodes: Cluster) -> None:
    before = nodes.raylets()
    process, mark = start(place, *RUN, "killed", *on(nodes))
    in_flight(place.folder / "killed")
    process.kill()
    process.communicate()
    assert not marked(mark)
    workers_gone(nodes)
    assert nodes.raylets() == before
    process, _ = start(place, *RUN, "killed", *on(nodes))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 4, err
    check_whole(place, "killed")


def test_a_worker_without_room_is_waited_for_aloud(place: Workplace, nodes: Cluster) -> None:
    """Two runs on a cluster with room for one: the second begins when the first has ended."""
    first, _ = start(place, *RUN, "one", *on(nodes))
    in_flight(place.folder / "one")
    second, _ = start(place, *RUN, "two", *on(nodes))
    for process in (first, second):
        _, err = process.communicate(timeout=400)
        assert process.returncode == 4, err
    check_whole(place, "one")
    check_whole(place, "two")


def test_a_node_that_dies_loses_nothing(place: Workplace, nodes: Cluster) -> None:
    process, _ = start(place, *RUN, "node", *on(nodes))
    in_flight(place.folder / "node")
    there = len(ledger(place.folder / "node"))
    nodes.kill_node(1)
    started = time.monotonic()
    _, err = process.communicate(timeout=400)
    assert process.returncode == 4, err
    assert "died over noise" in err, "the node's worker held a unit"
    assert there < TRIALS
    check_whole(place, "node")
    assert len(nodes.raylets()) == 1, "nobody started it again"
    assert time.monotonic() - started < 150, "Ray takes its time to miss a node, but not all of it"
