import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from report_data import cell, manifest, swap, tokens, trial

from reports.errors import ReportError
from reports.metrics import measure, row_of, summarise
from reports.records import Diagnosis, GateSpec, Trial
from reports.registry import METRICS

ROOT = Path(__file__).parents[2]


def manifest_for(trials: list[Trial], **changes: object) -> object:
    return manifest(0).model_copy(update={"samples": [t.sample for t in trials], **changes})


def summary_of(trials: list[Trial], **changes: object) -> dict[str, object]:
    return summarise(manifest_for(trials, **changes), trials)


def many(outcomes: dict[str, int], **changes: object) -> list[Trial]:
    return [
        trial(f"{outcome}-{i}", outcome, **changes)
        for outcome, times in outcomes.items()
        for i in range(times)
    ]


def values(trials: list[Trial]) -> dict[str, object]:
    cells = summary_of(trials)["cells"]
    return {name: entry["value"] for name, entry in cells[0]["metrics"].items()}


def test_a_table_worked_by_hand() -> None:
    # c, c_K, c', c'_K: 10 robust, 6 compression-specific, 2 broken on both paths, 1 broken on the
    # full path only, 1 wrong everywhere.
    found = values(many({"1111": 10, "1110": 6, "1100": 2, "1101": 1, "0000": 1}))
    assert found["acc_full_clean"] == found["acc_compressed_clean"] == 0.95
    assert found["acc_full_attacked"] == 0.8
    assert found["acc_compressed_attacked"] == 0.55
    assert found["upr"] == pytest.approx(16 / 19, abs=1e-6)
    assert found["cae"] == pytest.approx(1 - 11 / 19, abs=1e-6)
    assert found["csg"] == pytest.approx(16 / 19 - 11 / 19, abs=1e-6)
    assert found["csfr"] == pytest.approx(6 / 19, abs=1e-6)
    assert found["cbr"] == pytest.approx(6 / 16, abs=1e-6)
    assert found["full_asr"] == pytest.approx(3 / 19, abs=1e-6)
    assert found["compressed_asr"] == pytest.approx(8 / 19, abs=1e-6)
    assert found["clean_drop"] == 0.0
    assert found["amplification"] == pytest.approx((8 - 3) / 20, abs=1e-6)


@pytest.mark.parametrize(
    ("upr", "cae", "csg"),
    [
        (0.9408, 0.5891, 0.5299), (0.8341, 0.7095, 0.5435), (0.9262, 0.4231, 0.3493),
        (0.9433, 0.5532, 0.4965), (0.7738, 0.5485, 0.3223), (0.9705, 0.3282, 0.2987),
        (0.9357, 0.5883, 0.5240), (0.7728, 0.6236, 0.3964), (0.9445, 0.3713, 0.3157),
        (0.9597, 0.4896, 0.4493), (0.8240, 0.5866, 0.4105), (0.8937, 0.4390, 0.3327),
        (0.9158, 0.9255, 0.8413), (0.9398, 0.7124, 0.6522), (0.9344, 0.6548, 0.5892),
        (0.9654, 0.8078, 0.7732), (0.9356, 0.6219, 0.5575), (0.9552, 0.5688, 0.5240),
        (0.9638, 0.7734, 0.7372), (0.9571, 0.6187, 0.5758), (0.8746, 0.5087, 0.3833),
        (0.9823, 0.7086, 0.6909), (0.9707, 0.5587, 0.5294), (0.8648, 0.6405, 0.5053),
    ],
)  # fmt: skip
def test_csg_reproduces_the_published_rows(upr: float, cae: float, csg: float) -> None:
    """10,000 samples all right clean, with the published retentions, give the published gap."""
    n = 10_000
    survive_full, survive_compressed = round(upr * n), round((1 - cae) * n)
    both = min(survive_full, survive_compressed)
    rows = (
        [row_of(trial("a", "1111"))] * both
        + [row_of(trial("b", "1110"))] * (survive_full - both)
        + [row_of(trial("c", "1101"))] * (survive_compressed - both)
        + [row_of(trial("d", "1100"))] * (n - max(survive_full, survive_compressed))
    )
    found = measure(rows, seed=0, names=("upr", "cae", "csg"))
    assert found["csg"].value == pytest.approx(csg, abs=1.01e-4)


def test_an_empty_denominator_is_null_and_never_zero() -> None:
    found = summary_of(many({"0000": 5}))["cells"][0]["metrics"]
    for name in ("upr", "cae", "csg", "csfr", "cbr", "full_asr", "compressed_asr", "recovered"):
        assert found[name] == {"value": None, "low": None, "high": None, "n": 0}, name
    assert found["acc_full_clean"]["value"] == 0.0
    assert found["acc_full_clean"]["n"] == 5


def test_an_empty_cell_is_null_throughout() -> None:
    found = summarise(manifest(3), [])["cells"][0]
    assert (found["n"], found["missing"]) == (0, 3)
    assert all(entry["value"] is None for entry in found["metrics"].values())


def test_errors_are_counted_apart_and_enter_no_metric() -> None:
    without = summary_of(many({"1111": 8, "1110": 2}))["cells"][0]
    found = summary_of(many({"1111": 8, "1110": 2, "error": 4}))["cells"][0]
    assert (found["n"], found["errors"], found["failures"]) == (10, 4, 2)
    assert found["metrics"] == without["metrics"]


def test_diagnoses_add_up_to_the_failures() -> None:
    trials = [
        trial("s0", "1110", swap=swap(Diagnosis.RANKING)),
        trial("s1", "1110", swap=swap(Diagnosis.RANKING)),
        trial("s2", "1110", swap=swap(Diagnosis.RANKING_PARTIAL)),
        trial("s3", "1110", swap=swap(Diagnosis.CONTENT)),
        trial("s4", "1110"),
        trial("s5", "1111"),
    ]
    found = summary_of(trials)["cells"][0]
    assert found["diagnosis"] == {
        "ranking": 2, "ranking_partial": 1, "content": 1, "mixed": 0, "undiagnosed": 1,
    }  # fmt: skip
    assert found["metrics"]["recovered"]["value"] == 0.75
    assert found["metrics"]["reproduced"]["value"] == 0.5
    assert found["metrics"]["recovered"]["n"] == 4


def test_means_leave_out_what_a_compressor_does_not_have() -> None:
    trials = [
        trial("s0", "1111", tokens=tokens(jaccard=0.2)),
        trial("s1", "1111", tokens=tokens(jaccard=0.6, spearman=None, evidence_kept_clean=None)),
        trial("s2", "1111"),
    ]
    found = summary_of(trials)["cells"][0]["metrics"]
    assert found["jaccard"]["value"] == 0.4
    assert found["jaccard"]["n"] == 2
    assert found["spearman"]["n"] == found["evidence_kept_clean"]["n"] == 1


def test_equal_outcomes_do_not_look_like_certainty() -> None:
    found = summary_of(many({"1111": 40}))["cells"][0]["metrics"]["csg"]
    assert found["value"] == 0.0
    assert found["low"] < -0.05
    assert found["high"] > 0.05


def test_order_and_timings_do_not_touch_the_cells() -> None:
    trials = many({"1111": 9, "1110": 4, "1100": 3})
    slow = [t.model_copy(update={"timings": {"attack": 9.9}}) for t in reversed(trials)]
    first = summarise(manifest_for(trials), trials)
    second = summarise(manifest_for(trials), slow)
    assert json.dumps(first["cells"]) == json.dumps(second["cells"])
    assert first["timings"] != second["timings"]


def test_the_last_of_several_trials_of_a_sample_counts() -> None:
    found = summarise(manifest(1), [trial("s0", "error"), trial("s0", "1110")])["cells"][0]
    assert (found["n"], found["errors"], found["failures"]) == (1, 0, 1)


def test_by_kind_splits_the_samples() -> None:
    trials = many({"1111": 6}, kind="colour") + [
        trial(f"k{i}", "1110", kind="count") for i in range(4)
    ]
    found = summary_of(trials)["cells"][0]["by_kind"]
    assert {kind: part["n"] for kind, part in found.items()} == {"colour": 6, "count": 4}
    assert found["colour"]["metrics"]["csfr"]["value"] == 0.0
    assert found["count"]["metrics"]["csfr"]["value"] == 1.0


def test_a_trial_the_manifest_does_not_plan_is_refused() -> None:
    with pytest.raises(ReportError, match="'elsewhere'"):
        summarise(manifest(1), [trial("s0", cell="elsewhere")])


def test_the_summary_says_its_schema_and_is_plain_json() -> None:
    gates = [GateSpec(name="g", metric="csfr", max=0.5)]
    trials = many({"1111": 30})
    summary = summary_of(trials, gates=gates)
    assert summary["schema"] == 1
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert {"cells", "gates", "verdict", "timings"} <= summary.keys()
    entry = summary["cells"][0]
    assert {"id", "target", "compression", "attack", "defense", "epsilon", "n", "errors",
            "metrics", "diagnosis", "by_kind"} <= entry.keys()  # fmt: skip
    assert list(entry["metrics"]) == list(METRICS)


def test_every_metric_is_documented() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    missing = [name for name in METRICS if f"`{name}`" not in page]
    assert not missing
    for metric in METRICS.values():
        assert metric.definition.endswith(".")


def test_reports_work_where_torch_is_not_installed() -> None:
    code = """
import importlib, pkgutil, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "scipy", "redteam", "attacks",
                                  "defenses", "targets"}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import reports
assert not {"numpy", "jinja2", "pydantic"} & sys.modules.keys(), "import reports is not light"
names = [m.name for m in pkgutil.walk_packages(reports.__path__, "reports.")]
assert len(names) > 10
for name in names:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cells_keep_the_order_of_the_manifest() -> None:
    cells = [cell("z"), cell("a"), cell("m")]
    found = summarise(manifest(1, cells=cells), [trial("s0", cell="a"), trial("s0", cell="z")])
    assert [one["id"] for one in found["cells"]] == ["z", "a", "m"]


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_is_left_as_it_was(collects: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ReportError):
            summarise(manifest(1), [trial("unknown")])
        assert gc.isenabled() is collects
        summarise(manifest(1), [trial("s0")])
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()
