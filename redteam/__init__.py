"""redteam: what visual-token compression does to an LVLM's robustness, from scenario to report.

Plugin authors import the extension points from here; they load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from attacks import Attack, Budget, Descent, Proposal, SeedBank, descend
    from defenses import AdaptiveRoute, InputDefense, SelectionDefense
    from redteam.datasets.base import Dataset, Sample
    from redteam.scenario import Scenario, load_scenario
    from targets.base import Batch, Knowledge
    from targets.compression import Compressor

__version__ = "0.1.0"

_HOMES: Final = {
    "AdaptiveRoute": "defenses",
    "Attack": "attacks",
    "Batch": "targets.base",
    "Budget": "attacks",
    "Compressor": "targets.compression",
    "Dataset": "redteam.datasets.base",
    "Descent": "attacks",
    "InputDefense": "defenses",
    "Knowledge": "targets.base",
    "Proposal": "attacks",
    "Sample": "redteam.datasets.base",
    "Scenario": "redteam.scenario",
    "SeedBank": "attacks",
    "SelectionDefense": "defenses",
    "descend": "attacks",
    "load_scenario": "redteam.scenario",
}

__all__ = [
    "AdaptiveRoute",
    "Attack",
    "Batch",
    "Budget",
    "Compressor",
    "Dataset",
    "Descent",
    "InputDefense",
    "Knowledge",
    "Proposal",
    "Sample",
    "Scenario",
    "SeedBank",
    "SelectionDefense",
    "__version__",
    "descend",
    "load_scenario",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
