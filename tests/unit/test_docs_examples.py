"""The pages on how to add a compressor, a defence and a family, followed literally."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python file=(\S+)\n(.*?)```", re.DOTALL)


def blocks(page: str) -> dict[str, str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return dict(BLOCK.findall(text))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes a block to a file and imports it under the name it would have."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "conformance"))
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "support"))

    def write(place: str, text: str) -> ModuleType:
        path = tmp_path / Path(place).name
        path.write_text(text, encoding="utf-8")
        name = place.removesuffix(".py").replace("/", ".").removeprefix("tests.conformance.")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    yield write
    for name in set(sys.modules) - before:
        if name.endswith(("centre", "vipllava", "topple", "neighbours")):
            del sys.modules[name]


def test_adding_a_compressor(written: Any) -> None:
    found = blocks("add-a-compressor.md")
    method = written("targets/compression/centre.py", found["targets/compression/centre.py"])
    golden = written("tests/golden/test_centre.py", found["tests/golden/test_centre.py"])
    golden.test_the_nearest_are_kept()

    import tiny

    from targets.compression import compress

    model, one = tiny.build_model(), method.Centre(keep_tokens=tiny.QUARTER)
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    asked = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "pixel_values": tiny.normalised(tiny.pictures(3)),
    }
    with torch.no_grad(), compress(model, one) as session:
        hard = model(**asked).logits[:, -1]
    with torch.no_grad(), compress(model, one, mode="masked"):
        masked = model(**asked).logits[:, -1]
    assert torch.allclose(hard, masked, atol=2e-5)
    assert session.trace.kept is not None
    assert session.trace.kept.sum(1).tolist() == [tiny.QUARTER] * 3
    assert not bool(session.trace.kept[:, 0].any())


def test_adding_an_attack(written: Any) -> None:
    from tests.fakes import make_batch, view_for

    found = blocks("add-an-attack.md")
    written("attacks/topple.py", found["attacks/topple.py"])
    golden = written("tests/golden/test_topple.py", found["tests/golden/test_topple.py"])
    golden.test_the_lead_of_what_is_kept()
    attack = sys.modules["attacks.topple"].Topple(steps=5)
    result = attack(view_for(attack.needs), make_batch(4), 16 / 255, [1, 2, 3, 4])
    assert float(result.linf.max()) <= 16 / 255
    assert all(min(trace) < trace[0] for trace in result.loss)


def test_adding_a_defence(written: Any) -> None:
    found = blocks("add-a-defense.md")
    method = written("defenses/neighbours.py", found["defenses/neighbours.py"])
    golden = written("tests/golden/test_neighbours.py", found["tests/golden/test_neighbours.py"])
    golden.test_the_mean_over_the_neighbourhood()

    import tiny

    from targets.lvlm import LVLM

    target = LVLM(tiny.build_model(), tiny.build_processor())
    images, questions = tiny.pictures(2), tiny.QUESTIONS[:2]
    plain = tiny.COMPRESSORS["fastv"]
    one = method.Neighbours().protect(plain)
    kept = [
        target.answer(images, questions, compressor=c, max_new_tokens=1).kept for c in (plain, one)
    ]
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[1].sum(1).tolist() == [tiny.QUARTER] * 2
    assert not torch.equal(kept[0], kept[1])


def test_its_options_can_be_read_from_the_source(written: Any, tmp_path: Path) -> None:
    """`redteam list` and `validate` never import a method of ours."""
    import ast

    from redteam.signature import argument_help

    found = blocks("add-a-compressor.md")["targets/compression/centre.py"]
    node = next(n for n in ast.parse(found).body if isinstance(n, ast.ClassDef))
    helps = argument_help(ast.get_docstring(node) or "")
    assert set(helps) == {"retention", "keep_tokens", "positions"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_adding_a_family(written: Any, monkeypatch: pytest.MonkeyPatch, attention: str) -> None:
    found = blocks("add-a-family.md")
    place, fixture = "targets/families/vipllava.py", "tests/conformance/families/vipllava.py"
    adapter, built = written(place, found[place]), written(fixture, found[fixture])

    import tiny

    from targets import families
    from targets.compression import FastV, VisionZip, compress
    from targets.lvlm import LVLM

    line = {"vipllava": "targets.families.vipllava:VipLlava"}
    monkeypatch.setattr(families, "SUPPORTED", {**families.SUPPORTED, **line})
    model, processor = built.build_model(attention), built.build_processor()
    assert isinstance(families.family_of(model), adapter.VipLlava)
    for case in ("mixed", "padded"):
        inputs = built.inputs(processor, built.CASES[case])
        with torch.no_grad():
            plain = model(**inputs).logits[:, -1]
        for one in (FastV(keep_tokens=9), VisionZip(keep_tokens=9)):
            with torch.no_grad(), compress(model, one):
                hard = model(**inputs).logits[:, -1]
            with torch.no_grad(), compress(model, one, mode="masked"):
                masked = model(**inputs).logits[:, -1]
            assert torch.allclose(hard, masked, atol=2e-5)
            assert float((hard - plain).abs().amax()) > 1e-3
    target = LVLM(model, processor)
    images = tiny.pictures(3, size=61)
    answered = target.answer(images, tiny.QUESTIONS, compressor=FastV(keep_tokens=9))
    assert answered.left is not None
    assert answered.left.tolist() == [9, 9, 9]
    score = target.option_scores(images, tiny.QUESTIONS, ("yes", "no"))
    assert score.shape == (3, 2)
