"""The command line in this process, with what it wrote."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[2]


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def redteam(*arguments: str | Path, cwd: Path | None = None) -> Done:
    """Run a command; nothing is imported that it does not import itself."""
    from redteam.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with (
            contextlib.chdir(cwd or Path.cwd()),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", ["redteam", *map(str, arguments)]),
            mock.patch.dict(os.environ, NO_COLOR="1"),
        ):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def imported(tmp_path: Path, *arguments: str, code: int = 0) -> set[str]:
    """Modules a command imports."""
    watch = (
        "import sys, json, atexit\n"
        f"atexit.register(lambda: open({str(tmp_path / 'modules')!r}, 'w')"
        ".write(json.dumps(list(sys.modules))))\n"
        f"sys.argv = ['redteam', *{arguments!r}]\n"
        "from redteam.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", watch], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return set(json.loads((tmp_path / "modules").read_text()))
