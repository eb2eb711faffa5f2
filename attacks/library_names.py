"""Which attacks of other libraries are offered, what each may know, and why the rest is not.

Importing this module costs nothing: neither torch nor a library is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from attacks.errors import AttackError, suggestion
from targets.base import Knowledge


@dataclass(frozen=True, slots=True)
class Library:
    """A library of attacks.

    Attributes:
        name: first part of a scenario's ``type: torchattacks.MIFGSM``.
        title: what people call it.
        module: imported to get the classes.
        version: the tables were checked against.
        install: command that brings it.
        offered: class name → what that attack needs to know.
        unsuitable: class name → why it is not offered.
    """

    name: str
    title: str
    module: str
    version: str
    install: str
    offered: Mapping[str, Knowledge]
    unsuitable: Mapping[str, str]

    def needs(self, attack: str) -> Knowledge:
        """What one of its attacks needs to know.

        Raises:
            AttackError: the name is unknown, or not offered; then with the reason.
        """
        if attack in self.offered:
            return self.offered[attack]
        if attack in self.unsuitable:
            raise AttackError(f"{self.name}.{attack} is not offered: {self.unsuitable[attack]}")
        raise AttackError(
            f"{self.name} has no attack {attack!r}; allowed: {', '.join(sorted(self.offered))}"
            + suggestion(attack, [*self.offered, *self.unsuitable])
        )


def _each(knowledge: Knowledge, names: str) -> dict[str, Knowledge]:
    return dict.fromkeys(names.split(), knowledge)


def _why(reasons: Mapping[str, str]) -> dict[str, str]:
    """Reason → names, turned round."""
    return {name: reason for reason, names in reasons.items() for name in names.split()}


TORCHATTACKS: Final = Library(
    name="torchattacks",
    title="torchattacks",
    module="torchattacks",
    version="3.5.1",
    install="pip install --no-deps torchattacks==3.5.1",
    offered=MappingProxyType(
        _each(
            Knowledge.WHITE_BOX,
            "FGSM BIM RFGSM FFGSM PGD PGDL2 EOTPGD TPGD UPGD PGDRS PGDRSL2 MIFGSM NIFGSM DIFGSM "
            "TIFGSM SINIFGSM VMIFGSM VNIFGSM PIFGSM PIFGSMPP Jitter APGD APGDT FAB AutoAttack CW "
            "DeepFool SparseFool EADL1 EADEN",
        )
        | _each(Knowledge.SCORES, "Square SPSA OnePixel Pixle")
        | _each(Knowledge.NONE, "GN")
    ),
    unsuitable=MappingProxyType(
        {
            "VANILA": "it returns the clean picture",
            "LGV": "it trains the target's weights",
            "MultiAttack": "it is made of other attacks, which a scenario cannot write; use suite",
            "JSMA": "its memory grows with the square of the number of pixels (3 GB for 96×96)",
        }
    ),
)

_ANOTHER_TASK = "it attacks another kind of model: speech, video, detectors, trees or tables"
_OTHER_FRAMEWORK = "it is written for TensorFlow"

ART: Final = Library(
    name="art",
    title="adversarial-robustness-toolbox",
    module="art.attacks.evasion",
    version="1.20.1",
    install="pip install 'redteam[art]'",
    offered=MappingProxyType(
        _each(
            Knowledge.WHITE_BOX,
            "FastGradientMethod BasicIterativeMethod MomentumIterativeMethod "
            "ProjectedGradientDescent ProjectedGradientDescentNumpy "
            "ProjectedGradientDescentPyTorch AutoProjectedGradientDescent AutoConjugateGradient "
            "RescalingAutoConjugateGradient CarliniL2Method CarliniLInfMethod DeepFool "
            "ElasticNet NewtonFool ShadowAttack",
        )
        | _each(
            Knowledge.SCORES,
            "SquareAttack ZooAttack HopSkipJump BoundaryAttack SignOPTAttack SimBA PixelAttack",
        )
    ),
    unsuitable=MappingProxyType(
        _why(
            {
                "it shows progress that cannot be silenced; use suite or torchattacks.AutoAttack": (
                    "AutoAttack"
                ),
                "its norm is neither linf nor l2": "Wasserstein",
                "it makes one perturbation for many samples, so a sample's picture would depend "
                "on its neighbours; transfer_caa has universal templates": (
                    "UniversalPerturbation TargetedUniversalPerturbation"
                ),
                "it rotates and shifts the picture: what the budget leaves of that is another "
                "attack": "SpatialTransformation",
                "it paints a patch or a beam on the picture, far outside any ball": (
                    "AdversarialPatch AdversarialPatchNumpy AdversarialPatchPyTorch "
                    "AdversarialTexturePyTorch GRAPHITEBlackbox GRAPHITEWhiteboxPyTorch "
                    "LaserAttack PatchFoolPyTorch"
                ),
                "it works pixel by pixel and asks the model for each: hours for one picture": (
                    "SaliencyMapMethod CarliniL0Method VirtualAdversarialMethod"
                ),
                "it searches over one variable for each pixel and needs the package cma": (
                    "ThresholdAttack"
                ),
                "it needs the package numba": "BrendelBethgeAttack",
                "it needs the package kornia": "CompositeAdversarialAttackPyTorch",
                "it raises IndexError on pictures of this shape": "GeoDA",
                "it needs a second picture to imitate and a layer of the model by name": (
                    "FeatureAdversariesNumpy FeatureAdversariesPyTorch"
                ),
                _OTHER_FRAMEWORK: (
                    "AdversarialPatchTensorFlowV2 FeatureAdversariesTensorFlowV2 "
                    "ProjectedGradientDescentTensorFlowV2 MalwareGDTensorFlow ShapeShifter"
                ),
                _ANOTHER_TASK: (
                    "CarliniWagnerASR ImperceptibleASR ImperceptibleASRPyTorch FrameSaliencyAttack "
                    "OverTheAirFlickeringPyTorch DPatch RobustDPatch DecisionTreeAttack "
                    "HighConfidenceLowUncertainty LowProFool OverloadPyTorch SNAL"
                ),
            }
        )
    ),
)

LIBRARIES: Final[Mapping[str, Library]] = MappingProxyType(
    {library.name: library for library in (TORCHATTACKS, ART)}
)

OURS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "model": "it is the scenario's target",
        "estimator": "it is the scenario's target",
        "classifier": "it is the scenario's target",
        "eps": "the budget is the scenario's: epsilons: [8/255]",
        "max_epsilon": "the budget is the scenario's: epsilons: [8/255]",
        "clip_values": "pictures are in [0, 1]",
        "batch_size": "samples that share a batch are set by engine.batch_size",
        "device": "set engine.device",
        "seed": "set the scenario's seed",
        "verbose": "runs are silent",
        "verbose_es": "runs are silent",
        "summary_writer": "runs are silent",
        "n_classes": "it is the number of answer options of each question",
        "nb_classes": "it is the number of answer options of each question",
        "targeted": "these attacks are untargeted; pgd has a target",
    }
)
"""Parameters of library attacks that follow from the scenario, and where it says them."""
