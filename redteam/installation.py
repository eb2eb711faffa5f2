"""Whether the packages with generic names on the import path are ours. Standard library only."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from redteam.errors import InstallationError

PACKAGES: Final = ("attacks", "defenses", "targets", "reports")


def check_packages() -> None:
    """Refuse to start where another package shadows one of ours.

    Raises:
        InstallationError: naming the folder.
    """
    root = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):
            spec = None
        if spec is None or spec.origin is None:
            where = (
                f" (only the folder {list(spec.submodule_search_locations or ())})" if spec else ""
            )
            raise InstallationError(
                f"package {name!r} of redteam is missing{where}; reinstall redteam"
            )
        found = Path(spec.origin).resolve()
        if found.parent.parent != root:
            place = found if found.name != "__init__.py" else found.parent
            raise InstallationError(
                f"package {name!r} of redteam is shadowed by {place}; start redteam from another "
                "folder, rename that one, or install redteam into an environment of its own"
            )
