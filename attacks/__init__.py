"""Attacks on large vision-language models under visual-token compression: one attack, one file.

To add one, write a file with a frozen dataclass that extends `Attack` and implements `propose`.
Names load on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attacks.apgd import APGD
    from attacks.art_library import ArtAttack
    from attacks.attention_only import AttentionOnly
    from attacks.base import Attack, AttackResult, Proposal
    from attacks.budget import Budget
    from attacks.caa import CAA
    from attacks.cage import CAGE
    from attacks.cira import CIRA
    from attacks.descent import Descent, descend
    from attacks.errors import AttackError
    from attacks.fata import FATA
    from attacks.fgsm import FGSM
    from attacks.force_fallback import ForceFallback
    from attacks.margin_split import MarginSplit
    from attacks.minimal import Minimal
    from attacks.noise import Noise
    from attacks.pgd import PGD
    from attacks.query import Query
    from attacks.seeds import SeedBank
    from attacks.square import Square
    from attacks.suite import Suite
    from attacks.token_count import TokenCount
    from attacks.torchattacks_library import TorchAttack
    from attacks.transfer_caa import TransferCAA
    from attacks.v_attack import VAttack
    from attacks.veattack import VEAttack
    from attacks.verbose import Verbose

__all__ = [
    "APGD",
    "CAA",
    "CAGE",
    "CIRA",
    "FATA",
    "FGSM",
    "PGD",
    "ArtAttack",
    "Attack",
    "AttackError",
    "AttackResult",
    "AttentionOnly",
    "Budget",
    "Descent",
    "ForceFallback",
    "MarginSplit",
    "Minimal",
    "Noise",
    "Proposal",
    "Query",
    "SeedBank",
    "Square",
    "Suite",
    "TokenCount",
    "TorchAttack",
    "TransferCAA",
    "VAttack",
    "VEAttack",
    "Verbose",
    "descend",
]

_HOME = {
    "APGD": "apgd",
    "ArtAttack": "art_library",
    "Attack": "base",
    "AttackError": "errors",
    "AttackResult": "base",
    "AttentionOnly": "attention_only",
    "Budget": "budget",
    "CAA": "caa",
    "CAGE": "cage",
    "CIRA": "cira",
    "Descent": "descent",
    "FATA": "fata",
    "FGSM": "fgsm",
    "ForceFallback": "force_fallback",
    "MarginSplit": "margin_split",
    "Minimal": "minimal",
    "Noise": "noise",
    "PGD": "pgd",
    "Proposal": "base",
    "Query": "query",
    "SeedBank": "seeds",
    "Square": "square",
    "Suite": "suite",
    "TokenCount": "token_count",
    "TorchAttack": "torchattacks_library",
    "TransferCAA": "transfer_caa",
    "VAttack": "v_attack",
    "VEAttack": "veattack",
    "Verbose": "verbose",
    "descend": "descent",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        found: object = getattr(import_module(f"attacks.{_HOME[name]}"), name)
        return found
    raise AttributeError(f"module 'attacks' has no attribute {name!r}")
