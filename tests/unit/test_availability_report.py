"""What answers demand: recorded, averaged, shown where it matters, and as long as allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_data import cell, manifest, trial
from typer.testing import CliRunner

from redteam.capabilities import cautions
from redteam.cli import app
from redteam.errors import ScenarioError
from redteam.scenario import load_scenario
from redteam.validation import AnswerOptions
from reports import availability, build_reports
from reports.measure import measure, row_of
from reports.metrics import summarise
from reports.records import Cell, Demand, Demands, Trial
from reports.store import RunStore
from targets.lvlm import LVLM, MAX_NEW_TOKENS
from targets.scenes import build

NAMES = [
    f"{name}_{part}"
    for name in ("tokens", "length_full", "length_compressed")
    for part in ("clean", "attacked", "growth")
]


def demands(tokens: tuple[int, int], full: tuple[int, int], compressed: tuple[int, int]) -> Demands:
    """Clean and attacked of each; all 144 tokens on the full path, seconds by path."""
    return Demands(
        clean_full=Demand(tokens=144, generated=full[0], seconds=0.4),
        clean_compressed=Demand(tokens=tokens[0], generated=compressed[0], seconds=0.1),
        attacked_full=Demand(tokens=144, generated=full[1], seconds=0.6),
        attacked_compressed=Demand(tokens=tokens[1], generated=compressed[1], seconds=0.3),
    )


def trials(*made: Demands | None, cell: str = "c1") -> list[Trial]:
    return [trial(f"s{index}", "1111", cell, demands=one) for index, one in enumerate(made)]


GROWN = trials(demands((20, 30), (2, 8), (2, 2)), demands((40, 20), (4, 4), (1, 4)))


def test_means_and_growth_of_demands() -> None:
    found = measure([row_of(one) for one in GROWN], seed=0, names=NAMES)
    values = {name: found[name].value for name in NAMES}
    assert values == pytest.approx(
        {
            "tokens_clean": 30.0,
            "tokens_attacked": 25.0,
            "tokens_growth": (30 / 20 + 20 / 40) / 2,
            "length_full_clean": 3.0,
            "length_full_attacked": 6.0,
            "length_full_growth": (8 / 2 + 4 / 4) / 2,
            "length_compressed_clean": 1.5,
            "length_compressed_attacked": 3.0,
            "length_compressed_growth": (2 / 2 + 4 / 1) / 2,
        }
    )


def test_demands_that_were_not_recorded_are_not_nought() -> None:
    found = measure([row_of(one) for one in trials(None, None)], seed=0, names=NAMES)
    assert all(one.value is None and one.n == 0 for one in found.values())
    nothing_left = [row_of(one) for one in trials(demands((0, 0), (2, 2), (2, 2)))]
    found = measure(nothing_left, seed=0, names=NAMES)
    assert (found["tokens_clean"].value, found["tokens_growth"].value) == (0.0, None)


def test_seconds_are_means_apart_from_the_cells() -> None:
    twice = [GROWN[0], *GROWN]  # the last of a sample counts
    summary = summarise(manifest(2), twice)
    assert summary["timings"]["answers"]["cells"] == {
        "c1": {
            "clean_full": 0.4,
            "clean_compressed": 0.1,
            "attacked_full": 0.6,
            "attacked_compressed": 0.3,
        }
    }
    assert "seconds" not in json.dumps(summary["cells"])


def test_the_95th_percentile_of_seconds_is_beside_their_mean() -> None:
    slow = demands((20, 20), (2, 2), (2, 2))
    slow = slow.model_copy(
        update={"attacked_compressed": Demand(tokens=144, generated=2, seconds=1.3, fallback=True)}
    )
    made = trials(*[demands((20, 20), (2, 2), (2, 2))] * 3, slow)
    found = summarise(manifest(4), made)["timings"]["answers"]
    assert found["cells"]["c1"]["attacked_compressed"] == pytest.approx((3 * 0.3 + 1.3) / 4)
    # Between the third and the fourth of four, at 0.95 · 3 = 2.85 places behind the first.
    assert found["p95"]["c1"] == {
        "clean_full": 0.4,
        "clean_compressed": 0.1,
        "attacked_full": 0.6,
        "attacked_compressed": pytest.approx(0.3 + 0.85 * 1.0),
    }


def fell(clean: bool, attacked: bool) -> Demands:
    """Of a compressor with 36 tokens that a defence lets go for all 144."""

    def demand(fallback: bool) -> Demand:
        return Demand(tokens=144 if fallback else 36, generated=2, seconds=0.1, fallback=fallback)

    return Demands(
        clean_full=demand(False),
        clean_compressed=demand(clean),
        attacked_full=demand(False),
        attacked_compressed=demand(attacked),
    )


def test_fall_backs_are_counted_and_shown() -> None:
    made = trials(*[fell(False, False)] * 2, fell(False, True), fell(True, True))
    found = measure([row_of(one) for one in made], seed=0)
    assert (found["fallback_clean"].value, found["fallback_attacked"].value) == (0.25, 0.5)
    low, high = found["fallback_attacked"].low, found["fallback_attacked"].high
    assert low is not None and high is not None and 0 <= low < 0.5 < high <= 1  # noqa: PT018
    plan = manifest(4, cells=[kind("caa")])
    table = availability.table(plan, summarise(plan, made))
    assert table is not None, "whatever attack it was"
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["fall-back"].startswith("0.25 → 0.50 [")
    still = summarise(plan, trials(*[fell(False, False)] * 4))
    assert availability.table(plan, still) is None
    plan = manifest(4, cells=[kind("force_fallback")])
    table = availability.table(plan, summarise(plan, trials(*[fell(False, False)] * 4)))
    assert table is not None
    assert "fall-back" not in table.columns


def test_fall_backs_of_older_ledgers_are_none() -> None:
    old = fell(True, True).model_dump()
    for answer in old.values():
        del answer["fallback"]
    found = measure([row_of(one) for one in trials(Demands(**old))], seed=0)
    assert found["fallback_clean"].value == 0


def test_a_ledger_keeps_demands(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path / "run", manifest(2), "") as store:
        store.append(GROWN)
    assert [one.demands for one in RunStore.read(tmp_path / "run").trials()] == [
        one.demands for one in GROWN
    ]


def kind(name: str, id: str = "c1") -> Cell:
    return cell(id, attack=f"my {name}", spec={"attack": {"type": name}})


SAME = trials(demands((36, 36), (2, 2), (2, 2)))
LONGER = trials(demands((36, 36), (2, 9), (2, 9)))


@pytest.mark.parametrize(
    ("attack", "made", "shown"),
    [
        ("caa", SAME, False),
        ("caa", LONGER, False),  # a wrong answer is often longer than the right one
        ("caa", trials(demands((36, 37), (2, 2), (2, 2))), True),
        ("verbose", SAME, True),
        ("token_count", SAME, True),
        ("force_fallback", SAME, True),
        ("token_count", trials(None), False),
    ],
)
def test_the_table_is_shown_where_availability_is_attacked_or_counts_moved(
    tmp_path: Path, attack: str, made: list[Trial], shown: bool
) -> None:
    plan = manifest(1, cells=[kind(attack)])
    assert (availability.table(plan, summarise(plan, made)) is not None) == shown
    with RunStore.create_or_open(tmp_path / "run", plan, "") as store:
        store.append(made)
    built = build_reports(tmp_path / "run")
    for path in (built.markdown, built.report):
        text = path.read_text(encoding="utf-8")
        assert ("Availability" in text) == shown, path


def test_the_table_says_clean_and_attacked_with_the_factor() -> None:
    cells = [kind("token_count"), kind("noise", "c2")]
    made = [*GROWN, *trials(SAME[0].demands, cell="c2")]
    table = availability.table(manifest(2, cells=cells), summarise(manifest(2, cells=cells), made))
    assert table is not None
    assert "target" not in table.columns
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["attack"] for row in rows] == ["my token_count", "my noise"]
    assert rows[0]["visual tokens"].startswith("30.0 → 25.0 (×1.00 [")
    assert rows[0]["answer, compressed"].startswith("1.5 → 3.0 (×2.50 [")
    assert rows[0]["seconds, full"] == "0.400 → 0.600 (×1.50)"
    assert rows[0]["p95, compressed"] == "0.100 → 0.300 (×3.00)"
    assert rows[1]["answer, full"].startswith("2.0 → 2.0 (×1.00")


# How long answers may be -------------------------------------------------------------------------

SCENARIO = """
name: long
targets: [{type: scenes}]
dataset: {type: scenes, samples: 3}
compressions: [{type: prumerge}, {type: fastv, retention: 0.25}]
attacks: [{type: token_count, steps: 1}]
epsilons: [8/255]
checks: {repeat: 0}
"""


def written(folder: Path, more: str = "") -> str:
    path = folder / "scenario.yaml"
    path.write_text(SCENARIO + more, encoding="utf-8")
    return str(path)


def test_the_limit_is_part_of_the_scenario_unless_it_is_the_usual_one(tmp_path: Path) -> None:
    assert AnswerOptions().max_new_tokens == MAX_NEW_TOKENS == 16
    plain = load_scenario(written(tmp_path))
    usual = load_scenario(written(tmp_path, "answers: {max_new_tokens: 16}\n"))
    longer = load_scenario(written(tmp_path), ["answers.max_new_tokens=64"])
    assert plain.hash == usual.hash != longer.hash
    assert longer.resolved()["answers"] == {"max_new_tokens": 64}


@pytest.mark.parametrize("wrong", ["0", "4097", "1.5", "many"])
def test_a_limit_outside_its_range_is_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ScenarioError, match=r"answers.max_new_tokens"):
        load_scenario(written(tmp_path, f"answers: {{max_new_tokens: {wrong}}}\n"))


def test_only_methods_that_find_their_own_budget_may_do_without(tmp_path: Path) -> None:
    for entry, allowed in (
        ("{type: prumerge, retention: 0.5, keep_tokens: 3}", "at most one of retention"),
        ("{type: token_sparse_attention, retention: 0.5, keep_tokens: 3}", "at most one"),
        ("{type: fastv}", "exactly one of retention"),
    ):
        path = tmp_path / "scenario.yaml"
        path.write_text(SCENARIO.replace("{type: prumerge}", entry), encoding="utf-8")
        with pytest.raises(ScenarioError, match=allowed):
            load_scenario(str(path))


def test_answers_are_as_long_as_allowed_and_their_tokens_are_counted() -> None:
    shape = build.Shape(width=32, mlp=32, heads=2, vision_layers=2, text_layers=3)
    target = LVLM(build.build_model(shape, 0).float(), build.build_processor())
    import torch

    images = torch.full((2, 3, 96, 96), 0.5)
    questions = ("what is this ?", "how many ?")
    for limit in (1, 5):
        answered = target.answer(images, questions, max_new_tokens=limit)
        ids = target._passes.generate(images, questions, None, limit)
        real = target._passes.until_end(ids)
        assert answered.generated == tuple(real.sum(1).tolist())
        assert max(answered.generated) <= limit
        view: Any = target.view("white_box", max_new_tokens=limit)  # type: ignore[arg-type]
        assert view.ask(images, questions, path="full") == answered.texts


def test_a_run_records_demands_within_the_limit_and_warns_of_idle_attacks(tmp_path: Path) -> None:
    path = written(tmp_path)
    (idle,) = cautions(load_scenario(path))
    assert "fastv" in idle and "prumerge is" not in idle  # noqa: PT018
    for command in ("validate", "plan"):
        done = CliRunner().invoke(app, [command, path])
        assert done.exit_code == 0, done.output
        assert idle in done.stderr
    out = tmp_path / "out"
    limit = ["--set", "answers.max_new_tokens=1"]
    done = CliRunner().invoke(app, ["run", path, "--out", str(out), *limit])
    assert done.exit_code == 0, done.output
    assert idle in done.output.replace("\n", " ")
    for one in RunStore.read(out).trials():
        assert one.demands is not None
        every = [getattr(one.demands, name) for name in Demands.model_fields]
        assert [answer.generated for answer in every] == [1] * 4
        assert all(answer.seconds > 0 for answer in every)
        assert one.demands.clean_full.tokens == 144
        assert one.tokens is not None
        # PruMerge adds one token for all that it drops.
        more = one.demands.clean_compressed.tokens - len(one.tokens.kept_clean)
        assert more in (0, 1)
    shown = json.loads((out / "summary.json").read_text(encoding="utf-8"))["cells"]
    fixed = next(one for one in shown if one["compression"].startswith("fastv"))
    assert fixed["metrics"]["tokens_growth"]["value"] == 1.0
    assert fixed["metrics"]["tokens_clean"]["value"] == 36.0
