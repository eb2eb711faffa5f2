"""A folder with a scenario on a tiny LVLM, and the command line to run it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).parents[2]
SAMPLES = 6
SCENARIO = """\
name: tiny
description: a random model
seed: 3
targets: [{type: lvlm, model: model, name: tiny}]
dataset: {type: jsonl, path: data.jsonl}
compressions:
  - {type: fastv, layer: 2, retention: 0.25}
  - {type: visionzip, retention: 0.25}
attacks:
  - {type: noise}
  - {type: pgd, steps: 3, epsilons: [32/255]}
  - {type: caa, steps: 4}
epsilons: [32/255]
gates: [{metric: csfr, max: 0.5, where: {attack: noise}}]
engine: {type: local, batch_size: 4, device: cpu}
"""


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Workplace:
    """A folder with scenario.yaml, data.jsonl and the model, and the command line."""

    folder: Path

    @staticmethod
    def build(folder: Path, model_folder: Path, data_folder: Path) -> Workplace:
        (folder / "model").symlink_to(model_folder)
        shutil.copytree(data_folder / "images", folder / "images")
        shutil.copy(data_folder / "data.jsonl", folder)
        (folder / "scenario.yaml").write_text(SCENARIO)
        return Workplace(folder)

    @property
    def scenario(self) -> Path:
        return self.folder / "scenario.yaml"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The command line in a process of its own, to be killed or interrupted."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(self.folder / "plugins")]),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # other threads, other rounding
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "redteam", *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def redteam(self, *arguments: str) -> Done:
        """The command line in this process: importing torch anew would take most of the time."""
        from redteam.cli import main

        out, err, code = io.StringIO(), io.StringIO(), 0
        plugins = str(self.folder / "plugins")
        sys.path.insert(0, plugins)
        try:
            with (
                contextlib.chdir(self.folder),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                mock.patch.object(sys, "argv", ["redteam", *arguments]),
                mock.patch.dict(os.environ, NO_COLOR="1"),
            ):
                main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.path.remove(plugins)
        return Done(code, out.getvalue(), err.getvalue())

    def edit(self, old: str, new: str) -> None:
        text = self.scenario.read_text()
        assert old in text
        self.scenario.write_text(text.replace(old, new))

    def plugin(
        self, module: str, source: str, *, folder: Path | None = None, **points: str
    ) -> None:
        """Install a module with entry points, as another distribution would."""
        plugins = self.folder / "plugins" if folder is None else folder
        info = plugins / f"{module}-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=folder is not None)
        (plugins / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        groups = "".join(f"[redteam.{group}]\n{point}\n" for group, point in points.items())
        (info / "entry_points.txt").write_text(groups)


def ledger(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line)["trial"] for line in lines]


def cells(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "summary.json").read_text())["cells"]
    return found
