"""Make docs/results/transfer.md: ``python benchmarks/results_transfer.py [--samples 100]``.

Runs (or resumes) `scenarios/transfer.yaml` with more samples and one budget, and writes the matrix
of surrogates and targets from the run folder alone; nothing in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from reports.markdown import transfer_section

SCENARIO: Final = Path("scenarios/transfer.yaml")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--epsilon", default="16/255")
    parser.add_argument("--run", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/transfer.md"))
    parser.add_argument("--only-page", action="store_true", help="do not run; use the run folder")
    arguments = parser.parse_args()
    if not arguments.only_page:
        command = [sys.executable, "-m", "redteam", "run", str(SCENARIO)]
        command += ["--set", f"dataset.samples={arguments.samples}"]
        command += ["--set", f"epsilons=[{arguments.epsilon}]", "--out", str(arguments.run)]
        result = subprocess.run(command, check=False)  # noqa: S603
        if result.returncode not in (0, 1, 4):
            raise SystemExit(result.returncode)
    read = {name: _read(arguments.run, name) for name in ("summary", "manifest")}
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(page(read["summary"], read["manifest"]), encoding="utf-8")
    print(f"written: {arguments.page}")


def _read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def page(summary: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """The whole page, from a run's summary.json and manifest.json."""
    data, progress = manifest["scenario"]["dataset"], summary["progress"]
    identity = manifest["provenance"].get("identity", {})
    options = "\n".join(
        f"- {one['name']}: `{json.dumps({k: v for k, v in one.items() if k != 'name'})}`"
        for one in manifest["scenario"]["attacks"]
    )
    return f"""# Transfer between the scenes LVLMs

Made by `python benchmarks/results_transfer.py`, which runs `{SCENARIO}`; do not edit.

{len(manifest["samples"])} samples of the {data.get("split", "")} split, one question a picture;
seed {manifest["seed"]}; device {identity.get("device", "unknown")}; {manifest["created"]}.
{progress["errors"]} trials ended in an error, {progress["missing"]} did not run. Three checkpoints
of one drawn world, of different widths, depths and heads, trained apart; each is attacked from the
other two. The attacker sees neither the target nor its compression and asks it nothing. Options
were chosen on the validation split; the method is a reconstruction, see
[attacks.md](../attacks.md).

{transfer_section(summary.get("transfer"))}

## Settings

{options}
"""


if __name__ == "__main__":
    main()
