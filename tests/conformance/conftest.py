"""Offline, quiet, and one tiny model per attention implementation."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tiny
import transformers

transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny LLaVA under each attention implementation that runs on a CPU."""
    return tiny.build_model(request.param)


@pytest.fixture(scope="session")
def sdpa() -> Any:
    """A tiny LLaVA under sdpa."""
    return tiny.build_model("sdpa")


@pytest.fixture(scope="session")
def processor() -> Any:
    """Its processor, with a chat template."""
    return tiny.build_processor()


@pytest.fixture(params=sorted(tiny.COMPRESSORS))
def compressor(request: pytest.FixtureRequest) -> Any:
    """Every compressor, in every position mode and place it has."""
    return tiny.COMPRESSORS[request.param]
