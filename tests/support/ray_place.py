"""Runs on Ray in processes of their own: a place for them, what they leave, and a cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import stub_place
from workplace import ROOT, Workplace

MARK = "REDTEAM_TEST_MARK"
"""Variable that every process of a run inherits: Ray's are found by it, whatever their titles."""
ENGINE = "{type: ray, workers: 2, batch_size: 2, device: cpu}"
LOCAL = "{type: local, batch_size: 2, device: cpu}"


def build(folder: Path, delay: float, engine: str = ENGINE) -> Workplace:
    """The stub place of tests of faults, with `engine`.

    Args:
        folder: new.
        delay: seconds that an answer takes; a unit has five.
        engine: as in the scenario.
    """
    place = stub_place.build(folder)
    place.edit("{type: stub}", f"{{type: stub, delay: {delay}}}")
    place.edit(LOCAL, engine)
    return place


def start(place: Workplace, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """The command line in a session of its own, as of a terminal; and the mark of its processes."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "redteam", *arguments],
        cwd=place.folder,
        env=environment(place, mark),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, mark


def environment(place: Workplace, mark: str) -> dict[str, str]:
    """Variables for a process that runs in this place."""
    return {
        **os.environ,
        MARK: mark,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(place.folder / "plugins")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def marked(mark: str, word: str = "") -> dict[int, str]:
    """Living processes with a mark, by id, with their command line; zombies are gone.

    Args:
        mark: in their environment.
        word: in their command line.
    """
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes():
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and word in command:
                found[int(folder.name)] = command[:160]
    return found


def seconds_until_gone(mark: str, limit: float) -> float | None:
    """How long processes of a mark live on; None if longer than the limit."""
    started = time.monotonic()
    while marked(mark):
        if time.monotonic() - started > limit:
            return None
        time.sleep(0.1)
    return time.monotonic() - started


def wait_until(condition: Callable[[], object], what: str, limit: float = 180) -> None:
    """Wait for something.

    Raises:
        AssertionError: if it takes longer than the limit, in seconds.
    """
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {limit:.0f} s"
        time.sleep(0.02)


@contextlib.contextmanager
def cluster(place: Workplace, nodes: int = 2) -> Iterator[Cluster]:
    """Nodes of one CPU each on this machine, the first of them the head; ended by their ids."""
    found = Cluster(place)
    try:
        for _ in range(nodes):
            found.add()
        yield found
    finally:
        found.end()


class Cluster:
    """A cluster whose nodes are processes on this machine.

    Attributes:
        address: of the head.
        mark: of all its processes.
        nodes: the `ray start --block` of each.
    """

    def __init__(self, place: Workplace) -> None:
        self._place = place
        self.mark = uuid.uuid4().hex
        self.port = 20_000 + os.getpid() % 10_000
        self.address = f"127.0.0.1:{self.port}"
        self.nodes: list[subprocess.Popen[bytes]] = []

    def add(self) -> None:
        """Start one more node."""
        head = ["--head", f"--port={self.port}", "--include-dashboard=false"]
        where = head if not self.nodes else [f"--address={self.address}"]
        self.nodes.append(
            subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1",
                 "--object-store-memory=100000000", "--disable-usage-stats", *where],
                cwd=self._place.folder,
                env=environment(self._place, self.mark),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )  # fmt: skip
        wanted = len(self.nodes)
        wait_until(lambda: len(self.raylets()) == wanted, f"raylet {wanted}")

    def raylets(self) -> list[int]:
        """Process ids of the nodes' raylets, the oldest first."""
        return sorted(marked(self.mark, "raylet/raylet"))

    def kill_node(self, index: int) -> None:
        """SIGKILL the raylet of a node, and what `ray start` has around it."""
        children = Path(f"/proc/{self.nodes[index].pid}/task/{self.nodes[index].pid}/children")
        mine = {int(pid) for pid in children.read_text().split()}
        for pid in self.raylets():
            if pid in mine:
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """End every process of the cluster."""
        for node in self.nodes:
            node.terminate()
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not marked(self.mark), "the end of the cluster", 20)
        for pid in marked(self.mark):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for node in self.nodes:
            node.wait()
