"""Every attack there is, on the fake target; a new one without a row here fails the suite."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
import torch
from answered import answered

import attacks
from attacks.base import Attack
from targets.base import Knowledge
from tests.fakes import FakeSurrogates, FakeView, make_batch, view_for

SEEDS = [11, 22, 33, 44]


TRANSFER: dict[str, Any] = {
    **{"steps": 12, "alpha": 4 / 255, "judge_every": 3},
    **{"border": 0.25, "template": None, "query_weight": 0.1},
}


@dataclass(frozen=True)
class Row:
    attack: Attack
    uses_gradient: bool = True
    stochastic: bool = True
    every_sample: bool = True  # off: samples that are broken, or wrong already, are left alone
    package: str = ""
    """Of an optional library; the row is skipped where it is not installed."""


ROWS = [
    Row(attacks.Noise(), uses_gradient=False),
    Row(attacks.Noise(distribution="sign"), uses_gradient=False),
    Row(attacks.Noise(distribution="gaussian", border=0.25), uses_gradient=False),
    Row(attacks.Noise(norm="l2"), uses_gradient=False),
    Row(attacks.PGD(steps=5)),
    Row(attacks.PGD(steps=5, random_start=False), stochastic=False),
    Row(attacks.PGD(steps=5, path="compressed", schedule="cosine")),
    Row(attacks.PGD(steps=5, norm="l2", momentum=0.9)),
    Row(attacks.FGSM(), stochastic=False),
    Row(attacks.FGSM(path="compressed", start="rfgsm")),
    Row(attacks.FGSM(start="fast", norm="l2")),
    Row(attacks.PGD(steps=5, path="both", full_weight=0.5)),
    Row(attacks.PGD(steps=5, path="compressed", preserve_weight=1.0)),
    Row(attacks.PGD(steps=5, target="yes, please")),
    Row(attacks.APGD(steps=6)),
    Row(attacks.APGD(steps=6, path="compressed", loss="margin", restarts=2)),
    Row(attacks.APGD(steps=6, path="both", norm="l2")),
    Row(attacks.APGD(steps=6, targets=2, loss="dlr")),
    Row(attacks.PGD(steps=5, path="compressed", stop_when_broken=True), every_sample=False),
    Row(attacks.APGD(steps=6, restarts=2, path="both", stop_when_broken=True), every_sample=False),
    Row(attacks.Square(queries=40), uses_gradient=False),
    Row(attacks.Square(queries=40, norm="l2"), uses_gradient=False),
    Row(attacks.Query(queries=12), uses_gradient=False),
    Row(attacks.Query(queries=12, norm="l2"), uses_gradient=False),
    Row(attacks.CAA(steps=5)),
    Row(attacks.CAA(steps=5, preset="strict_preserve")),
    Row(attacks.CAA(steps=6, preset="strict_preserve", preserve_every=3)),
    Row(attacks.CAA(steps=5, region="full_image", ranking="score_gap", intra="both")),
    Row(attacks.CAA(steps=5, region="most_important", random_start=False), stochastic=False),
    Row(attacks.CAA(steps=5, group="twice_kept", intra="none")),
    Row(attacks.CAA(steps=5, ranking="absolute", intra="none")),
    Row(attacks.CAA(steps=5, layers=(2, 3), retentions=(0.1, 0.5))),
    Row(attacks.CAA(steps=0), uses_gradient=False),
    Row(attacks.MarginSplit(steps=5), stochastic=False, every_sample=False),
    Row(attacks.MarginSplit(steps=5, random_start=True, refresh=2), every_sample=False),
    Row(attacks.MarginSplit(steps=4, restarts=2, schedule="constant"), every_sample=False),
    Row(attacks.MarginSplit(steps=0, random_start=True), uses_gradient=False, every_sample=False),
    Row(attacks.Noise(border=0.25, frame="added"), uses_gradient=False),
    Row(attacks.TransferCAA(**TRANSFER)),
    Row(attacks.TransferCAA(**{**TRANSFER, "template": 8, "steps": 24})),
    Row(attacks.TransferCAA(**TRANSFER, frame="added", over="kept", expectation="full")),
    Row(attacks.TransferCAA(**TRANSFER, ensemble="cwa", spectra=2, scales=2, nesterov=True)),
    Row(attacks.TransferCAA(**TRANSFER, neighbours=2, smoothing=3, schedule="cosine")),
    Row(attacks.TransferCAA(**{**TRANSFER, "steps": 0}), uses_gradient=False),
    Row(attacks.Suite(steps=3), every_sample=False),
    Row(attacks.Suite(members=("noise", "pgd_full"), goal="full", steps=3), every_sample=False),
    Row(attacks.Minimal(steps=3), every_sample=False),
    Row(attacks.Minimal(attack="suite", goal="compressed", steps=2), every_sample=False),
    Row(attacks.CAGE(steps=5), stochastic=False),
    Row(attacks.CAGE(steps=5, score="norm", alignment="rescaled"), stochastic=False),
    Row(attacks.CAGE(steps=5, rda_weight=0, random_start=True)),
    Row(attacks.FATA(steps=5)),
    Row(attacks.FATA(steps=5, random_start=False, top=3), stochastic=False),
    Row(attacks.AttentionOnly(steps=5)),
    Row(attacks.CIRA(steps=5), stochastic=False),
    Row(attacks.CIRA(steps=5, hep_weight=0, layers=(-1,)), stochastic=False),
    Row(attacks.CIRA(steps=5, hep_over="all", views="translations"), stochastic=False),
    Row(attacks.CIRA(steps=5, gsh_weight=0, hep_over="all", random_start=True)),
    Row(attacks.VEAttack(steps=5)),
    Row(attacks.VAttack(steps=6, target="a ring", judge_every=3)),
    Row(attacks.VAttack(steps=5, source="a cube", target="a ring", crop=1.0, layers=1)),
    Row(attacks.Verbose(steps=6, length=5, refresh=2)),
    Row(attacks.Verbose(steps=6, length=5, refresh=1, path="compressed")),
    Row(attacks.TokenCount(steps=5, preserve_weight=0.01)),
    Row(attacks.TokenCount(steps=5, direction="fewer", preserve="full")),
    Row(attacks.TokenCount(steps=5, preserve="none")),
    Row(attacks.ForceFallback(steps=5)),
    Row(attacks.ForceFallback(steps=5, signal="kendall", restarts=2)),
    Row(attacks.ForceFallback(steps=5, signal="gap")),
    Row(attacks.TorchAttack(attack="MIFGSM"), stochastic=False, package="torchattacks"),
    Row(attacks.TorchAttack(path="compressed"), package="torchattacks"),
    Row(attacks.TorchAttack(attack="OnePixel"), uses_gradient=False, package="torchattacks"),
    Row(attacks.TorchAttack(attack="PGDL2", norm="l2"), package="torchattacks"),
    Row(attacks.ArtAttack(), stochastic=False, package="art"),
    Row(
        attacks.ArtAttack(attack="SquareAttack"),
        **{"uses_gradient": False, "every_sample": False, "package": "art"},
    ),
]


DECLARE_OTHERWISE = (attacks.TorchAttack, attacks.ArtAttack)
"""Their steps take as many gradients as there are draws, or as a library likes."""


def registered() -> dict[str, type[Attack]]:
    """Every concrete attack in the package that a scenario can name.

    `Evade` and `RaiseAlarm` are made when a run has a detector; test_evade.py and
    test_raise_alarm.py have them.
    """
    found: dict[str, type[Attack]] = {}
    for module in pkgutil.iter_modules(attacks.__path__, "attacks."):
        for thing in vars(importlib.import_module(module.name)).values():
            if isinstance(thing, type) and issubclass(thing, Attack) and hasattr(thing, "name"):
                found[thing.name] = thing
    del found["evade"], found["raise_alarm"]
    return found


def test_every_attack_has_a_row() -> None:
    assert {row.attack.name for row in ROWS} == set(registered())


@pytest.mark.parametrize("kind", registered().values(), ids=lambda kind: kind.name)
def test_options_are_frozen_keywords_with_defaults(kind: type[Attack]) -> None:
    assert is_dataclass(kind)
    attack = kind()
    assert all(field.kw_only for field in fields(kind))
    assert attack == kind()
    with pytest.raises(AttributeError):
        attack.name = "other"
    assert "Differs from the paper" in (kind.__doc__ or "")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: repr(row.attack))
@pytest.mark.parametrize("attention", [True, False], ids=["attention", "norm"])
def test_every_attack_on_the_fake_target(row: Row, attention: bool) -> None:
    if row.package:
        pytest.importorskip(row.package, reason="see docs/installation.md: an optional library")
    attack, batch = row.attack, make_batch(4)
    if not row.every_sample:
        batch = answered(8, view=FakeView(attention=attention))
    l2 = getattr(attack, "norm", "linf") == "l2"
    epsilon = 2.0 if l2 else 15.5 / 255
    view: Any = view_for(attack.needs, attention=attention)  # no more than it needs
    seeds = [*SEEDS, *range(len(batch.ids) - len(SEEDS))]
    result = attack(view, batch, epsilon, seeds)

    assert result.images.shape == batch.images.shape
    assert float((result.l2 if l2 else result.linf).max()) <= epsilon
    assert torch.equal((result.images * 255).round() / 255, result.images)
    assert float(result.linf.min() if row.every_sample else result.linf.max()) > 0
    assert (result.backwards > 0) == row.uses_gradient
    budget = attack.budget(epsilon)
    if not isinstance(attack, DECLARE_OTHERWISE):
        models = len(view.surrogates) if isinstance(view, FakeSurrogates) else 1
        declared = attack.gradients(budget) * models
        assert result.backwards <= declared, "no more than the plan says"
    passes = result.forwards + result.queries
    assert (passes == 0) == (attack.needs is Knowledge.NONE)
    if row.uses_gradient and row.every_sample:
        assert all(min(trace) < trace[0] for trace in result.loss)
    again = attack(view, batch, epsilon, [seed + 1 for seed in seeds])
    assert torch.equal(again.images, result.images) != row.stochastic
