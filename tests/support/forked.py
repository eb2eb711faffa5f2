"""The command line in processes forked from this one, which has imported what takes long."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from workplace import Workplace


def warm() -> None:
    """Import what every run needs; no thread is started, so that forking is safe."""
    import torch

    import attacks.noise
    import redteam.cli
    import redteam.runner
    import reports.html
    import targets.compression.random
    import targets.lvlm

    del attacks, redteam, reports, targets
    torch.set_num_threads(1)
    os.environ["REDTEAM_CACHE"] = "off"  # every run makes its images


def start(
    place: Workplace,
    *arguments: str,
    log: Path,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> int:
    """Run a command in a forked process; return its id.

    Args:
        place: where.
        arguments: of the command.
        log: receives what it writes.
        within: around it, in that process.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 98
    try:
        with within():
            done = place.redteam(*arguments)
        log.write_text(done.stdout + done.stderr)
        code = done.returncode
    except BaseException:
        log.write_text(traceback.format_exc())
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Exit code of a process; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
