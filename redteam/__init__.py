"""redteam: what visual-token compression does to an LVLM's robustness, from scenario to report.

Plugin authors import the extension points from here; they load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from attacks import Attack, AttackError, Budget, Descent, Proposal, SeedBank, descend
    from defenses import AdaptiveRoute, InputDefense, SelectionDefense
    from redteam.datasets.base import Dataset, Sample
    from redteam.scenario import Scenario, load_scenario
    from targets.base import (
        Batch,
        CompressedView,
        EncoderView,
        Knowledge,
        QueryView,
        ScoreView,
        SurrogateView,
        WhiteBoxView,
    )
    from targets.compression import Compressor

__version__ = "0.1.0"

_HOMES: Final = {
    "AdaptiveRoute": "defenses",
    "Attack": "attacks",
    "AttackError": "attacks",
    "Batch": "targets.base",
    "Budget": "attacks",
    "CompressedView": "targets.base",
    "Compressor": "targets.compression",
    "Dataset": "redteam.datasets.base",
    "Descent": "attacks",
    "EncoderView": "targets.base",
    "InputDefense": "defenses",
    "Knowledge": "targets.base",
    "Proposal": "attacks",
    "QueryView": "targets.base",
    "Sample": "redteam.datasets.base",
    "Scenario": "redteam.scenario",
    "ScoreView": "targets.base",
    "SeedBank": "attacks",
    "SelectionDefense": "defenses",
    "SurrogateView": "targets.base",
    "WhiteBoxView": "targets.base",
    "descend": "attacks",
    "load_scenario": "redteam.scenario",
}

__all__ = [
    "AdaptiveRoute",
    "Attack",
    "AttackError",
    "Batch",
    "Budget",
    "CompressedView",
    "Compressor",
    "Dataset",
    "Descent",
    "EncoderView",
    "InputDefense",
    "Knowledge",
    "Proposal",
    "QueryView",
    "Sample",
    "Scenario",
    "ScoreView",
    "SeedBank",
    "SelectionDefense",
    "SurrogateView",
    "WhiteBoxView",
    "__version__",
    "descend",
    "load_scenario",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
