"""A cache that grows in place holds what that of transformers holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig

from targets.decoding.cache import GrowingLayer, apart, exchange, growing

CONFIG = LlamaConfig(num_hidden_layers=2)


def columns(number: int, seed: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 3, number, 4, generator=generator),
        torch.randn(rows, 3, number, 4, generator=generator),
    )


def both() -> tuple[DynamicCache, DynamicCache]:
    ours, theirs = growing(CONFIG), DynamicCache(config=CONFIG)
    assert all(isinstance(layer, GrowingLayer) for layer in ours.layers)
    return ours, theirs


def add(number: int, seed: int, rows: int, *caches: DynamicCache) -> None:
    found = [one.update(*columns(number, seed, rows), 1) for one in caches]
    for part in (0, 1):
        assert all(torch.equal(one[part], found[0][part]) for one in found)


@pytest.mark.parametrize("prompt", [1, 5, 200])
def test_columns_join_far_beyond_the_room_behind_a_prompt(prompt: int) -> None:
    caches = both()
    add(prompt, 0, 2, *caches)
    for step in range(150):
        add(1 + step % 2, step + 1, 2, *caches)
    assert caches[0].get_seq_length(1) == caches[1].get_seq_length(1) == prompt + 225


def test_a_token_is_written_behind_the_others_without_moving_them() -> None:
    ours, _ = both()
    ours.update(*columns(5, 0), 1)
    before = ours.layers[1].keys.data_ptr()
    ours.update(*columns(1, 1), 1)
    assert ours.layers[1].keys.data_ptr() == before


def test_the_tensors_that_come_in_are_not_written_to() -> None:
    ours, _ = both()
    keys, values = columns(5, 0)
    kept = keys.clone(), values.clone()
    ours.update(keys, values, 1)
    ours.update(*columns(3, 1), 1)
    exchange(ours, torch.tensor([1, 0]))
    assert torch.equal(keys, kept[0])
    assert torch.equal(values, kept[1])


@pytest.mark.parametrize("rows", [[1, 0], [0], [1, 1, 0, 0, 1]])
def test_rows_are_selected_and_go_on(rows: list[int]) -> None:
    caches = both()
    add(5, 0, 2, *caches)
    add(1, 1, 2, *caches)
    for one in caches:
        one.batch_select_indices(torch.tensor(rows))
    for step in range(3):
        add(1, 2 + step, len(rows), *caches)


def test_columns_cut_off_are_forgotten() -> None:
    caches = both()
    add(5, 0, 2, *caches)
    for one in caches:
        one.layers[1].crop(-2)
    add(2, 1, 2, *caches)


def test_beams_of_a_sample_exchange_what_they_said() -> None:
    """Rows 0 to 2 and 3 to 5 have one prompt each, as beams have."""
    caches = both()
    keys, values = (one.repeat_interleave(3, 0) for one in columns(5, 0))
    for one in caches:
        one.update(keys, values, 1)
    order = torch.tensor([2, 0, 0, 4, 5, 3])
    for step in range(4):
        add(1, 1 + step, 6, *caches)
        exchange(caches[0], order)
        caches[1].batch_select_indices(order)
    add(1, 9, 6, *caches)


def test_what_was_marked_stays_whatever_is_said_later() -> None:
    """Marks at two lengths, and ways on from the first that would write over the second."""
    ours, theirs = both()
    add(5, 0, 2, ours, theirs)
    add(2, 1, 2, ours, theirs)
    first = apart(ours)
    exchange(ours, torch.tensor([1, 0]))
    add(3, 2, 2, ours)
    second = apart(ours)
    wanted = ours.layers[1].keys.clone(), ours.layers[1].values.clone()
    for seed in (3, 4):
        again = apart(first)
        exchange(again, torch.tensor([1, 1]))
        add(6, seed, 2, again)
    exchange(ours, torch.tensor([0, 0]))
    add(1, 5, 2, ours)
    assert torch.equal(second.layers[1].keys, wanted[0])
    assert torch.equal(second.layers[1].values, wanted[1])
    add(1, 6, 2, apart(first), theirs)
