"""One bad sample costs itself only; a full memory costs speed only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from redteam.batching import Batcher, Failure, failure, free_memory
from redteam.provenance import command_line, scrub


class Blaming(Exception):
    def __init__(self, *sample_ids: str) -> None:
        super().__init__("bad samples")
        self.sample_ids = sample_ids


def outcome(results: Sequence[int | Failure]) -> list[int | str]:
    return [one.error.type if isinstance(one, Failure) else one for one in results]


def test_all_is_well() -> None:
    calls: list[int] = []

    def double(batch: Sequence[int]) -> list[int]:
        calls.append(len(batch))
        return [2 * item for item in batch]

    assert Batcher(4).map(range(10), double, "doubling") == [2 * i for i in range(10)]
    assert calls == [4, 4, 2]


@pytest.mark.parametrize("blames", [True, False])
def test_bad_samples_are_set_aside(blames: bool) -> None:
    calls = 0

    def picky(batch: Sequence[int]) -> list[int]:
        nonlocal calls
        calls += 1
        bad = [str(item) for item in batch if item in (2, 5)]
        if bad:
            raise Blaming(*bad) if blames else ValueError("bad")
        return list(batch)

    wrong = "Blaming" if blames else "ValueError"
    results = Batcher(8).map(range(8), picky, "picking")
    assert outcome(results) == [0, 1, wrong, 3, 4, wrong, 6, 7]
    assert calls == (2 if blames else 9), "blamed samples are not tried again"
    bad = results[2]
    assert isinstance(bad, Failure)
    assert bad.error.where == "picking"
    assert "picky" in bad.error.traceback


def test_a_blame_on_everybody_is_tried_one_by_one() -> None:
    def grumpy(batch: Sequence[int]) -> list[int]:
        if len(batch) > 1:
            raise Blaming(*map(str, batch))
        return list(batch)

    assert Batcher(3).map(range(3), grumpy, "x") == [0, 1, 2]


def test_memory_halves_the_batch_for_good_for_work_of_its_kind() -> None:
    warnings: list[str] = []
    sizes: list[int] = []

    def hungry(batch: Sequence[int]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(batch)

    batcher = Batcher(16, warnings.append)
    assert batcher.map(range(10), hungry, "x") == list(range(10))
    assert sizes == [10, 5, 2, 2, 2, 2, 2]
    assert batcher.fitting("x") == 2
    assert len(warnings) == 2
    assert "going on with 2" in warnings[1]
    assert batcher.fitting("y") == batcher.size == 16, "other work may need less"


def test_what_failed_is_let_go_before_less_is_tried() -> None:
    alive: list[int] = []

    class Tensor:
        def __init__(self) -> None:
            alive.append(id(self))

        def __del__(self) -> None:
            alive.remove(id(self))

    def hungry(batch: Sequence[int]) -> list[int]:
        assert not alive, "the first attempt still holds its memory"
        held = Tensor()
        me = {"tensor": held}
        me["myself"] = me  # type: ignore[assignment]
        if len(batch) > 1:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except torch.OutOfMemoryError as error:
                raise RuntimeError("out of memory in the layer") from error
        del held, me["tensor"]
        return list(batch)

    assert Batcher(4).map(range(3), hungry, "x") == [0, 1, 2]


def test_memory_for_not_even_one() -> None:
    def starving(batch: Sequence[int]) -> list[int]:
        raise RuntimeError("DefaultCPUAllocator: out of memory")

    assert outcome(Batcher(2).map(range(2), starving, "x")) == ["RuntimeError"] * 2


def test_too_few_results_are_an_error() -> None:
    assert outcome(Batcher(2).map([1, 2], lambda batch: batch[1:], "x")) == ["RuntimeError"] * 2


def test_interrupts_pass() -> None:
    def stop(batch: Sequence[int]) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Batcher(2).map([1], stop, "x")


def test_no_private_path_is_recorded() -> None:
    home = str(Path.home())
    try:
        raise OSError(f"cannot read {home}/secret.txt")
    except OSError as error:
        found = failure(error, "reading").error
    assert home not in found.message
    assert str(Path(__file__).parents[2]) not in found.traceback
    assert "test_batching.py" in found.traceback
    assert scrub(f"{home}/x") == "~/x"
    line = command_line(["run", "/a/b/c.yaml", "--set", "x=a b"])
    assert line == "redteam run '…/c.yaml' --set 'x=a b'"


def test_the_first_batch_is_what_an_estimate_fits_into_memory() -> None:
    calls: list[int] = []
    said: list[str] = []

    def sizes(batch: Sequence[int]) -> list[int]:
        calls.append(len(batch))
        return list(batch)

    batcher = Batcher(8, said.append, free=lambda: 1000)
    batcher.map(range(8), sizes, "large work", each=200)
    batcher.map(range(8), sizes, "small work", each=1)
    batcher.map(range(8), sizes, "unknown work")
    batcher.map(range(3), sizes, "work for nobody's memory", each=10_000)
    assert calls == [3, 3, 2, 8, 8, 1, 1, 1]
    assert len(said) == 2, "told once for each kind, and not where nothing changes"
    assert "batches of 3 for large work" in said[0]


def test_an_estimate_is_asked_once_and_running_out_counts_more() -> None:
    asked: list[int] = []

    def free() -> int:
        asked.append(1)
        return 10_000

    def needy(batch: Sequence[int]) -> list[int]:
        if len(batch) > 2:
            raise MemoryError
        return list(batch)

    batcher = Batcher(8, free=free)
    for _ in range(2):
        assert batcher.map(range(8), needy, "work", each=1) == list(range(8))
    assert asked == [1]
    assert batcher.fitting("work") == 2


def test_a_number_in_the_scenario_is_begun_with_whatever_memory_there_is() -> None:
    calls: list[int] = []

    def sizes(batch: Sequence[int]) -> list[int]:
        calls.append(len(batch))
        return list(batch)

    Batcher(8).map(range(8), sizes, "work", each=10**18)
    assert calls == [8]


def test_free_memory_is_of_this_machine() -> None:
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
