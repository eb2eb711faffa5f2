"""What exists by name: one line for each target, compressor, attack, defence and data set.

Other packages add their own through entry points of the groups ``redteam.targets``,
``redteam.compressors``, ``redteam.attacks``, ``redteam.defenses`` and ``redteam.datasets``.
Nothing is imported before it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Literal, get_args

from redteam.errors import CatalogError, nearest

Kind = Literal["targets", "compressors", "attacks", "defenses", "datasets"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

BUILTIN: Final[Mapping[Kind, Mapping[str, str]]] = {
    "targets": {
        "scenes": "redteam.loaders:ScenesTarget",
        "lvlm": "redteam.loaders:CheckpointTarget",
    },
    "compressors": {
        "fastv": "targets.compression.fastv:FastV",
        "pyramiddrop": "targets.compression.pyramiddrop:PyramidDrop",
        "sparsevlm": "targets.compression.sparsevlm:SparseVLM",
        "transprune": "targets.compression.transprune:TransPrune",
        "visiondrop": "targets.compression.visiondrop:VisionDrop",
        "catp": "targets.compression.catp:CATP",
        "vasparse": "targets.compression.vasparse:VASparse",
        "token_sparse_attention": (
            "targets.compression.token_sparse_attention:TokenSparseAttention"
        ),
        "visionzip": "targets.compression.visionzip:VisionZip",
        "divprune": "targets.compression.divprune:DivPrune",
        "random": "targets.compression.random:Random",
        "uniform": "targets.compression.uniform:Uniform",
        "fastervlm": "targets.compression.fastervlm:FasterVLM",
        "vispruner": "targets.compression.vispruner:VisPruner",
        "prumerge": "targets.compression.prumerge:PruMerge",
        "hired": "targets.compression.hired:HiRED",
        "hiprune": "targets.compression.hiprune:HiPrune",
        "cdpruner": "targets.compression.cdpruner:CDPruner",
        "zoo_prune": "targets.compression.zoo_prune:ZooPrune",
        "pool": "targets.compression.pool:Pool",
        "grid": "targets.compression.grid:Grid",
        "downsample": "targets.compression.downsample:Downsample",
        "information_horizon": "targets.compression.information_horizon:InformationHorizon",
        "drop_all": "targets.compression.drop_all:DropAll",
        "explainability": "targets.compression.explainability:Explainability",
        "quecc": "targets.compression.quecc:QueCC",
        "tokenflex": "targets.compression.tokenflex:TokenFLEX",
        "tome": "targets.compression.tome:ToMe",
        "attentive_removal": "targets.compression.attentive_removal:AttentiveRemoval",
        "sparsifiner": "targets.compression.sparsifiner:Sparsifiner",
        "pipeline": "redteam.loaders:Composition",
    },
    "attacks": {
        "noise": "attacks.noise:Noise",
        "pgd": "attacks.pgd:PGD",
        "query": "attacks.query:Query",
        "square": "attacks.square:Square",
        "apgd": "attacks.apgd:APGD",
        "fgsm": "attacks.fgsm:FGSM",
        "caa": "attacks.caa:CAA",
        "margin_split": "attacks.margin_split:MarginSplit",
        "transfer_caa": "attacks.transfer_caa:TransferCAA",
        "cage": "attacks.cage:CAGE",
        "fata": "attacks.fata:FATA",
        "attention_only": "attacks.attention_only:AttentionOnly",
        "cira": "attacks.cira:CIRA",
        "veattack": "attacks.veattack:VEAttack",
        "suite": "attacks.suite:Suite",
        "minimal": "attacks.minimal:Minimal",
        "v_attack": "attacks.v_attack:VAttack",
        "verbose": "attacks.verbose:Verbose",
        "token_count": "attacks.token_count:TokenCount",
        "force_fallback": "attacks.force_fallback:ForceFallback",
    },
    "defenses": {
        "none": "redteam.loaders:Undefended",
        "stack": "redteam.loaders:Stacked",
        "translation_consensus": "defenses.translation_consensus:TranslationConsensus",
        "score_smoothing": "defenses.score_smoothing:ScoreSmoothing",
        "rank_fusion": "defenses.rank_fusion:RankFusion",
        "hybrid": "defenses.hybrid:Hybrid",
        "random_floor": "defenses.random_floor:RandomFloor",
        "oracle": "defenses.oracle:Oracle",
        "robust_encoder": "defenses.robust_encoder:RobustEncoder",
        "beam": "defenses.beam:BeamSearch",
        "vasparse": "defenses.vasparse:VASparse",
        "vcd": "defenses.vcd:VCD",
        "icd": "defenses.icd:ICD",
        "sid": "defenses.sid:SID",
        "dola": "defenses.dola:DoLa",
        "pai": "defenses.pai:PAI",
        "opera": "defenses.opera:OPERA",
        "sap": "defenses.sap:SAP",
        "m3id": "defenses.m3id:M3ID",
        "resize_pad": "defenses.resize_pad:ResizePad",
        "gaussian_vote": "defenses.gaussian_vote:GaussianVote",
        "rank_margin": "defenses.rank_margin:RankMargin",
        "disagreement_monitor": "defenses.disagreement_monitor:DisagreementMonitor",
        "rank_volatility": "defenses.rank_volatility:RankVolatility",
        "feature_squeezing": "defenses.feature_squeezing:FeatureSqueezing",
        "mahalanobis": "defenses.mahalanobis:Mahalanobis",
        "activation_trajectory": "defenses.activation_trajectory:ActivationTrajectory",
        "art.JpegCompression": "defenses.art_preprocessors:JpegCompression",
        "art.FeatureSqueezing": "defenses.art_preprocessors:FeatureSqueezing",
        "art.SpatialSmoothing": "defenses.art_preprocessors:SpatialSmoothing",
        "art.TotalVarMin": "defenses.art_preprocessors:TotalVarMin",
        "art.GaussianAugmentation": "defenses.art_preprocessors:GaussianAugmentation",
    },
    "datasets": {
        "scenes": "redteam.datasets.scenes:Scenes",
        "jsonl": "redteam.datasets.jsonl:Jsonl",
        "csv": "redteam.datasets.csv:Csv",
        "parquet": "redteam.datasets.parquet:Parquet",
        "pope": "redteam.datasets.pope:Pope",
        "textvqa": "redteam.datasets.textvqa:TextVqa",
        "vqav2": "redteam.datasets.vqav2:VqaV2",
        "mme": "redteam.datasets.mme:Mme",
        "scienceqa": "redteam.datasets.scienceqa:ScienceQa",
        "gqa": "redteam.datasets.gqa:Gqa",
    },
}

FAMILIES: Final[Mapping[Kind, Mapping[str, str]]] = {
    "attacks": {
        "torchattacks": "attacks.torchattacks_library:TorchAttack",
        "art": "attacks.art_library:ArtAttack",
    },
}
"""Methods of other libraries, written ``torchattacks.MIFGSM``: what stands before the dot."""

_ONE: Final[Mapping[Kind, str]] = {
    "targets": "target",
    "compressors": "compressor",
    "attacks": "attack",
    "defenses": "defence",
    "datasets": "data set",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the catalogue.

    Attributes:
        kind: what it is.
        name: as scenarios write it.
        value: ``module:Class``.
        package: distribution it comes from; "" for our own.
        part: of a library's method, its name in the library; else "".
    """

    kind: Kind
    name: str
    value: str
    package: str = ""
    part: str = ""

    @property
    def module(self) -> str:
        """Module of the class."""
        return self.value.partition(":")[0]

    @property
    def attribute(self) -> str:
        """Name of the class."""
        return self.value.partition(":")[2]


def one(kind: Kind) -> str:
    """Singular of a kind, for messages."""
    return _ONE[kind]


def entries(kind: Kind) -> dict[str, Entry]:
    """Everything of a kind by name: ours first, then that of other packages.

    Raises:
        CatalogError: if two packages claim one name.
    """
    return dict(_entries(kind, entry_points, tuple(sys.path)))


@lru_cache(maxsize=64)
def _entries(
    kind: Kind, installed: Callable[..., Iterable[EntryPoint]], places: tuple[str, ...]
) -> dict[str, Entry]:
    """The same, read once for a search path: looking through all packages takes a millisecond."""
    del places
    found = {name: Entry(kind, name, value) for name, value in BUILTIN[kind].items()}
    for point in sorted(installed(group=f"redteam.{kind}"), key=lambda point: point.name):
        if point.name in found:
            raise CatalogError(
                f"{one(kind)} {point.name!r} is claimed by {point.value} of package "
                f"{_package(point)!r} and by {found[point.name].value}; uninstall one of them"
            )
        found[point.name] = Entry(kind, point.name, point.value, _package(point))
    return found


def foreign() -> set[str]:
    """Names of all kinds that other packages added."""
    return {
        entry.name
        for kind in KINDS
        for entry in entries(kind).values()
        if entry.name not in BUILTIN[kind]
    }


def names(kind: Kind) -> list[str]:
    """What a scenario can write as a type, the methods of each library as one."""
    return [*entries(kind), *(f"{family}.*" for family in FAMILIES.get(kind, {}))]


def find(kind: Kind, name: str) -> Entry:
    """The entry of a name.

    Raises:
        CatalogError: for an unknown name, listing what exists and the nearest; for a method of a
            library that is not offered, saying why.
    """
    known = entries(kind)
    if name in known:
        return known[name]
    found = of_library(kind, name)
    if found is not None:
        return found
    hint = nearest(name, names(kind))
    raise CatalogError(
        f"there is no {one(kind)} {name!r}; known: {', '.join(names(kind))}"
        + (f"; {hint}" if hint else "")
    )


def of_library(kind: Kind, name: str) -> Entry | None:
    """The entry of a library's method; None if the name is of none. Loads no library.

    Raises:
        CatalogError: the library has no such method, or it is not offered.
    """
    family, _, part = name.partition(".")
    value = FAMILIES.get(kind, {}).get(family)
    if value is None:
        return None
    from attacks.errors import AttackError
    from attacks.library_names import LIBRARIES

    try:
        LIBRARIES[family].needs(part)
    except AttackError as error:
        raise CatalogError(str(error)) from error
    return Entry(kind, name, value, part=part)


def load(entry: Entry) -> Any:  # noqa: ANN401 - a class of any method
    """Import the class of an entry; of a library's method, what makes it from its options.

    Raises:
        CatalogError: if it cannot be imported or is not there.
    """
    try:
        found = getattr(import_module(entry.module), entry.attribute)
    except (ImportError, AttributeError) as error:
        origin = f" of package {entry.package!r}" if entry.package else ""
        raise CatalogError(
            f"{one(entry.kind)} {entry.name!r}{origin} cannot be loaded from {entry.value}: {error}"
        ) from error
    return found.named(entry.part) if entry.part else found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "unknown"
