"""Attacks on large vision-language models under visual-token compression: one attack, one file.

To add one, write a file with a frozen dataclass that extends `Attack` and implements `propose`.
Names load on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attacks.base import Attack, AttackResult, Proposal
    from attacks.budget import Budget
    from attacks.caa import CAA
    from attacks.descent import Descent, descend
    from attacks.errors import AttackError
    from attacks.fgsm import FGSM
    from attacks.noise import Noise
    from attacks.pgd import PGD
    from attacks.seeds import SeedBank

__all__ = [
    "CAA",
    "FGSM",
    "PGD",
    "Attack",
    "AttackError",
    "AttackResult",
    "Budget",
    "Descent",
    "Noise",
    "Proposal",
    "SeedBank",
    "descend",
]

_HOME = {
    "Attack": "base",
    "AttackError": "errors",
    "AttackResult": "base",
    "Budget": "budget",
    "CAA": "caa",
    "Descent": "descent",
    "FGSM": "fgsm",
    "Noise": "noise",
    "PGD": "pgd",
    "Proposal": "base",
    "SeedBank": "seeds",
    "descend": "descent",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        found: object = getattr(import_module(f"attacks.{_HOME[name]}"), name)
        return found
    raise AttributeError(f"module 'attacks' has no attribute {name!r}")
