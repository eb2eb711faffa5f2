"""What the recorded command of a run says."""

from __future__ import annotations

import re
import shlex


def scenario_in(command: str) -> str:
    """The scenario file in ``redteam run scenarios/x.yaml …``; "" if it names none.

    Args:
        command: as provenance has it; options and ``KEY=VALUE`` are passed over.
    """
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that is never closed: a manifest that was changed by hand
        return ""
    return next((one for one in words if re.fullmatch(r"[^-=][^=]*\.ya?ml", one)), "")
