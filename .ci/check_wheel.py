"""Run the installed wheel away from the checkout: quickstart and weights included."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Check that imports come from the wheel and that the packaged quickstart runs."""
    checkout = Path(sys.argv[1]).resolve()
    sys.path = [p for p in sys.path if Path(p or ".").resolve() not in (checkout, checkout / ".ci")]
    import redteam

    found = Path(redteam.__file__).resolve()
    if found.is_relative_to(checkout):
        raise SystemExit(f"the checkout was imported, not the wheel: {found}")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "redteam", "run", "quickstart", "--limit", "4"]
        result = subprocess.run([*command, "--out", "run"], cwd=folder, check=False)  # noqa: S603
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text(encoding="utf-8"))
        if result.returncode not in (0, 1, 4) or not summary["cells"]:
            raise SystemExit(f"the wheel's quickstart failed with exit code {result.returncode}")
    sys.stdout.write(f"the wheel runs: {len(summary['cells'])} cells\n")


if __name__ == "__main__":
    main()
