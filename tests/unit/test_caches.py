"""The key-value cache is found under the name of every supported transformers."""

from __future__ import annotations

import inspect

import pytest

from targets.caches import cache_name, cache_of


def test_the_name_is_one_that_the_installed_models_take() -> None:
    from transformers import LlamaModel

    forward = inspect.unwrap(LlamaModel.forward)
    assert cache_name() in inspect.signature(forward).parameters


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_either_name_is_read(name: str) -> None:
    assert cache_of({name: "held"}) == "held"


@pytest.mark.parametrize("kwargs", [{}, {"cache": None}, {"past_key_values": None}])
def test_no_cache_is_none(kwargs: dict[str, None]) -> None:
    assert cache_of(kwargs) is None


def test_an_empty_cache_is_found_though_it_counts_as_false() -> None:
    """Caches have a length; an empty one must not be taken for none."""
    empty: list[int] = []
    assert cache_of({"cache": empty}) is empty
