"""What the doctor finds missing before anything is downloaded or loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from redteam.doctor import Finding
from redteam.doctor_scenario import examine_scenario
from redteam.scenario import load_scenario

HEAD = """\
name: sick
attacks: [{type: noise, epsilons: [8/255]}]
compressions: [{type: fastv, retention: 0.25}]
"""


def findings(folder: Path, rest: str) -> list[Finding]:
    path = folder / "sick.yaml"
    path.write_text(HEAD + rest)
    return examine_scenario(load_scenario(path))


def one(found: list[Finding], word: str) -> Finding:
    matching = [finding for finding in found if word in finding.detail]
    assert len(matching) == 1, [finding.detail for finding in found]
    return matching[0]


SCENES = "dataset: {type: scenes, samples: 2}\n"


def test_what_is_shipped_is_fine(tmp_path: Path) -> None:
    found = findings(tmp_path, SCENES + "targets: [{type: scenes}]\n")
    assert {finding.state for finding in found} == {"ok"}
    assert one(found, "2 samples").what == "dataset scenes"


def test_a_folder_without_weights_or_processor(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llava"}))
    rest = SCENES + "targets: [{type: lvlm, model: ./model}]\n"
    assert one(findings(tmp_path, rest), "safetensors").state == "broken"
    (tmp_path / "model" / "model.safetensors").write_bytes(b"0" * 100)
    found = findings(tmp_path, rest)
    assert one(found, "processor_config.json").state == "broken"
    assert one(found, "family llava").state == "ok"
    (tmp_path / "model" / "processor_config.json").write_text("{}")
    assert "broken" not in {finding.state for finding in findings(tmp_path, rest)}


@pytest.mark.parametrize(
    ("config", "words"), [('{"model_type": "blip"}', "not supported"), ("{", "cannot be read")]
)
def test_a_family_nobody_knows(tmp_path: Path, config: str, words: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(config)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"0")
    found = findings(tmp_path, SCENES + "targets: [{type: lvlm, model: ./model}]\n")
    assert one(found, words).state == "broken"
    assert one(found, words).remedy


def test_a_hub_id_that_is_not_here(tmp_path: Path) -> None:
    found = findings(tmp_path, SCENES + "targets: [{type: lvlm, model: nobody/nothing}]\n")
    assert one(found, "no revision").state == "note"
    missing = one(found, "would be downloaded")
    assert missing.remedy == "fetch it first: hf download nobody/nothing"
    pinned = "targets: [{type: lvlm, model: nobody/nothing, revision: abc}]\n"
    assert "--revision abc" in one(findings(tmp_path, SCENES + pinned), "downloaded").remedy


def test_a_data_set_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    rest = "targets: [{type: scenes}]\ndataset: {type: jsonl, path: bad.jsonl}\n"
    assert findings(tmp_path, rest)[-1].state == "broken"
    rest = "targets: [{type: scenes}]\ndataset: {type: pope}\n"
    hub = findings(tmp_path, rest)
    assert one(hub, "lmms-lab/POPE on the hub has no revision").state == "note"
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pyarrow" else real(name)
    )
    assert one(findings(tmp_path, rest), "pyarrow").remedy == "pip install 'redteam[data]'"


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    rest = SCENES + "targets: [{type: scenes}]\nengine: {device: nonsense}\n"
    assert one(findings(tmp_path, rest), "nonsense").state == "broken"
