"""Attacks of other libraries on an LVLM, by name, through one classifier of the answer options.

What a library takes for a classifier is `attacks.option_logits.OptionLogits`. It stands on the
metered view, so a library sees no more than the attack has declared, and every pass is counted
where it happens. Randomness of the libraries is global: it is seeded here and restored afterwards.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import math
import random
import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial, reduce
from operator import or_
from typing import Annotated, Any, ClassVar, Final, Literal, Self

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget, norms, quantise
from attacks.errors import AttackError, suggestion
from attacks.library_names import LIBRARIES, OURS, Library
from attacks.option_logits import OptionLogits, option_count
from attacks.options import complaint
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge
from targets.errors import KnowledgeError, TargetError

_STEP_SIZES: Final = ("alpha", "eps_step")
_RADII: Final = ("eps", "max_epsilon")
_STEPS: Final = ("steps", "num_iter_set", "nb_iter", "max_iter", "max_iterations", "nb_steps")
_RESTARTS: Final = ("n_restarts", "num_random_init", "nb_random_init", "binary_search_steps")
_REAL: Final = frozenset({"c", "kappa", "lam", "scale"})
"""Parameters that are real numbers although their default is written as a whole one."""
_AT_LEAST: Final = {("EADL1", "max_iterations"): 10, ("EADEN", "max_iterations"): 10}
"""Below, these divide by zero."""
_SPHERES: Final = frozenset({"PGDL2", "PGDRSL2"})
"""Their radius is an l2 length, and there is no parameter to change that."""
_OWN_BALL: Final = frozenset({"Wasserstein"})
"""Their radius is of a norm that a scenario does not know; it stays the library's."""
_LEAST_OPTIONS: Final = {
    ("torchattacks", "APGDT"): 4,
    ("torchattacks", "AutoAttack"): 4,
    ("art", "AutoAttack"): 3,
}
_RATIO_LOSSES: Final = ("dlr", "difference_logits_ratio")
_QUERIES: Final[Mapping[str, tuple[str | int, ...]]] = {
    "Square": ("n_queries", "n_restarts"),
    "SPSA": (2, "nb_sample", "nb_iter"),
    "OnePixel": ("popsize", "steps"),
    "Pixle": (2, "restarts", "max_iterations"),
    "SquareAttack": ("max_iter", "nb_restarts"),
    "ZooAttack": (2, "nb_parallel", "max_iter", "binary_search_steps"),
    "HopSkipJump": ("max_eval", "max_iter"),
    "BoundaryAttack": (2, "num_trial", "max_iter"),
    "SignOPTAttack": ("k", "max_iter"),
    "SimBA": (2, "max_iter"),
    "PixelAttack": (400, "max_iter"),
}
"""Roughly how often an attack asks: a product of its parameters."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a library's attack that a scenario may set.

    Attributes:
        name: as the library calls it.
        annotation: plain types.
        default: the library's own; None for a step size, which follows epsilon.
        help: from the library's documentation.
    """

    name: str
    annotation: Any
    default: Any
    help: str


def load_class(library: Library, attack: str) -> Any:  # noqa: ANN401 - a class of the library
    """The class of an attack.

    Raises:
        AttackError: the attack is not offered, the library is not installed, or its version has no
            such class.
    """
    library.needs(attack)
    try:
        module = importlib.import_module(library.module)
    except ImportError as error:
        raise AttackError(
            f"{library.name}.{attack} needs the package {library.title}, which cannot be imported "
            f"({error}); {library.install}"
        ) from error
    if not hasattr(module, attack):
        raise AttackError(
            f"the installed {library.title} has no {attack}; version {library.version} has: "
            f"{library.install}"
        )
    return getattr(module, attack)


@lru_cache(maxsize=256)
def parameters(library: str, attack: str) -> Mapping[str, Parameter]:
    """What can be set of an attack, read from its constructor.

    Args:
        library: ``torchattacks`` or ``art``.
        attack: name of its class.

    Raises:
        AttackError: see `load_class`.
    """
    found = {}
    cls = load_class(LIBRARIES[library], attack)
    helps = _helps(f"{inspect.getdoc(cls)}\n{inspect.getdoc(cls.__init__)}")
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name in ("self", "norm", *OURS) or name.startswith("_"):
            continue
        annotation, default = _plain(attack, parameter), parameter.default
        if name in _STEP_SIZES:
            annotation, default = Annotated[float, Ge(0)] | None, None
        if annotation is not None:
            found[name] = Parameter(name, annotation, default, helps.get(name, ""))
    return found


def _plain(attack: str, parameter: inspect.Parameter) -> Any:  # noqa: ANN401 - an annotation
    """The parameter's type in plain words; None for what a scenario cannot write."""
    words = {"int": int, "float": float, "bool": bool, "str": str}
    if isinstance(parameter.annotation, str):  # ART annotates, under postponed evaluation
        names = [n.id for n in ast.walk(ast.parse(parameter.annotation)) if isinstance(n, ast.Name)]
        kinds = [words[name] for name in dict.fromkeys(names) if name in words]
        if not kinds or "tuple" in names or "list" in names:
            return None
        kinds = [kind for kind in kinds if not (kind is int and float in kinds)]
        found = reduce(or_, kinds)
        return found | None if parameter.default is None else found
    default = parameter.default
    if isinstance(default, tuple | list):
        return tuple[int | float, ...]
    kind = float if parameter.name in _REAL else type(default)
    if kind not in words.values():
        return None
    least = _AT_LEAST.get((attack, parameter.name))
    return kind if least is None else Annotated[kind, Ge(least)]


def _helps(docs: str) -> dict[str, str]:
    """What a docstring says of parameters, in either library's style."""
    found: dict[str, str] = {}
    for line in docs.splitlines():
        match = re.match(r"\s*(?::param (\w+):|(\w+) \([^()]*\)\s*:)\s*(.+)", line)
        if match:
            found.setdefault(match[1] or match[2], match[3].strip())
    return found


@dataclass(frozen=True, kw_only=True)
class LibraryAttack(Attack):
    """An attack of another library, by the name of its class.

    Args:
        attack: name of the library's class.
        path: of attacks that use gradients: ``full`` attacks the model with all visual tokens and
            does not know the compressor; ``compressed`` attacks through it, with a straight-through
            gradient of the selection. Attacks that ask the deployed target have no choice.
        norm: norm of the ball, and of the attack where it has that choice.
        params: parameters of the library's constructor, (name, value); a step size that is not
            given keeps the library's own ratio to epsilon.

    Raises:
        AttackError: on construction, for an attack that is not offered, with the reason, or a
            parameter that it does not have or that follows from the scenario.
    """

    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX

    attack: str
    path: Literal["full", "compressed"] = "full"
    norm: Literal["linf", "l2"] = "linf"
    params: tuple[tuple[str, int | float | bool | str | tuple[int | float, ...] | None], ...] = ()

    def __post_init__(self) -> None:
        """Check the name, the path and every parameter."""
        super().__post_init__()
        self.library.needs(self.attack)
        if self.path == "compressed" and self.needs is not Knowledge.WHITE_BOX:
            raise AttackError(
                f"{self._label} has no path: it uses no gradients and asks the deployed, "
                "compressed target; leave the option out"
            )
        for name, value in self.params:
            self._check(name, value)

    @classmethod
    def named(cls, attack: str) -> Callable[..., Self]:
        """A constructor for one attack, which takes its parameters as keywords."""
        return partial(cls._of, attack)

    @classmethod
    def _of(cls, attack: str, /, **options: Any) -> Self:  # noqa: ANN401 - plain values
        own = {one.name for one in fields(cls)} - {"params"}
        mine = {name: value for name, value in options.items() if name in own}
        rest = tuple((name, value) for name, value in options.items() if name not in own)
        return cls(attack=attack, params=rest, **mine)

    @property
    def library(self) -> Library:
        """Where the attack comes from."""
        return LIBRARIES[self.name]

    @property
    def _label(self) -> str:
        return f"{self.name}.{self.attack}"

    @property
    def needs(self) -> Knowledge:
        """Weights, option scores of the deployed target, or nothing: as the attack's name says."""
        return self.library.needs(self.attack)

    @property
    def knows_compression(self) -> bool:
        """On the compressed path, and where the deployed target is asked."""
        return self.path == "compressed" or self.needs is Knowledge.SCORES

    def budget(self, epsilon: float) -> Budget:
        """Radius and norm; steps, restarts and queries as far as the parameters tell them.

        Raises:
            AttackError: the library's attack has another norm, or the library is not installed.
        """
        self._check_norm()
        setting = {name: one.default for name, one in self._known().items()} | dict(self.params)
        restarts = next((setting[name] for name in _RESTARTS if name in setting), 1)
        steps = next((setting[name] for name in _STEPS if name in setting), 1)
        gradients = self.needs is Knowledge.WHITE_BOX
        return Budget(
            epsilon,
            self.norm,
            steps=steps if gradients else 0,
            restarts=max(restarts, 1) if gradients else 1,
            queries=0 if gradients else self._queries(setting),
        )

    def propose(
        self,
        view: Any,  # noqa: ANN401 - as `needs` says
        batch: Batch,
        budget: Budget,
        rng: SeedBank,
    ) -> Proposal:
        """Run the library's attack, one group of samples after the other."""
        images = batch.images.clone()
        watched = self.needs is not Knowledge.NONE
        if not watched:  # it knows no question; the library wants a class for each picture
            nothing = ("",) * len(images)
            batch = replace(batch, questions=nothing, answers=nothing, options=None, judges=None)
        loss = torch.zeros(2, len(images), device=images.device)
        slopes = torch.full((1, len(images)), math.nan, device=images.device)
        seeds = rng.child(self._label).seeds
        for rows in self._groups(batch):
            part = batch.rows(rows)
            model = OptionLogits(
                view, part, path=self.path, deployed=self.needs is Knowledge.SCORES
            )
            found = self._run(model, part, budget, seeds[rows[0]])
            images[rows] = found
            if watched:
                before, led = model.judge(part.images)
                after, _ = model.judge(quantise(part.images, found, budget))
                # Where the answer is wrong to begin with, standing still is no failure.
                idle = ~led & (after >= before)
                loss[:, rows] = torch.stack([before, after]).masked_fill(idle, math.nan)
                if model.first_slope is not None:
                    slopes[0, rows] = model.first_slope.masked_fill(~led, math.nan)
        return Proposal(
            images,
            loss=loss if watched else None,
            gradient=slopes if self.needs is Knowledge.WHITE_BOX else None,
            notes=self._notes(batch.images, images, budget),
        )

    @abstractmethod
    def generate(self, model: OptionLogits, images: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Hand pictures to the library.

        Args:
            model: the classifier; its labels are the right answers.
            images: ``[B, 3, H, W]`` in [0, 1].
            settings: for the constructor of the library's class, apart from the model.

        Returns:
            ``[B, 3, H, W]`` wherever the library has left them.
        """

    @property
    @abstractmethod
    def _fixed(self) -> Mapping[str, Any]:
        """Values the library has for norms and the like, by the name of its parameter."""

    def _together(self) -> bool:
        """Whether samples of a batch cannot influence each other, randomness included."""
        return False

    def _groups(self, batch: Batch) -> list[list[int]]:
        """Samples that are handed over together: alone, or all with as many options."""
        count = len(batch.ids)
        if not self._together():
            return [[row] for row in range(count)]
        sizes = [option_count(batch, row) for row in range(count)]
        return [[row for row in range(count) if sizes[row] == size] for size in sorted(set(sizes))]

    def _run(self, model: OptionLogits, part: Batch, budget: Budget, seed: int) -> Tensor:
        self._check_options(model, part)
        settings = self._settings(model.classes, budget, seed)
        with isolated(seed, part.images.device):
            try:
                found = self.generate(model, part.images.clone(), settings)
            except (AttackError, KnowledgeError, TargetError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                # Whatever a library raises is about its own parameters, or this picture.
                raise AttackError(
                    f"{self._label} failed on {', '.join(part.ids)}: "
                    f"{type(error).__name__}: {error}",
                    sample_ids=part.ids,
                ) from error
        return found.detach().to(part.images)

    def _settings(self, classes: int, budget: Budget, seed: int) -> dict[str, Any]:
        """The library's constructor arguments: the user's, and those that follow from ours."""
        names = self._constructor()
        given = dict(self.params)
        ours = {**self._fixed, "seed": seed, "verbose": False}
        ours |= dict.fromkeys(("n_classes", "nb_classes"), classes)
        if self.attack not in _OWN_BALL:
            ours |= dict.fromkeys(_RADII, budget.epsilon)
            ours |= {name: self._step(name, budget.epsilon) for name in _STEP_SIZES}
        given = {name: value for name, value in given.items() if value is not None}
        return {name: value for name, value in ours.items() if name in names} | given

    def _step(self, name: str, epsilon: float) -> float | None:
        """A step size at the library's own ratio to the radius."""
        names = self._constructor()
        radius = next((names[one].default for one in _RADII if one in names), None)
        step = names[name].default if name in names else None
        if not isinstance(radius, int | float) or not isinstance(step, int | float):
            return step
        return epsilon * step / radius

    def _known(self) -> Mapping[str, Parameter]:
        return parameters(self.name, self.attack)

    def _constructor(self) -> Mapping[str, inspect.Parameter]:
        cls = load_class(self.library, self.attack)
        return inspect.signature(cls.__init__).parameters

    def _check(self, name: str, value: object) -> None:
        if name in OURS:
            raise AttackError(f"{self._label}: {name} is not yours to set: {OURS[name]}")
        known = self._known()
        if name not in known:
            raise AttackError(
                f"{self._label} has no parameter {name!r}; allowed: {', '.join(known) or 'none'}"
                + suggestion(name, known)
            )
        wrong = complaint(known[name].annotation, value)
        if wrong is not None:
            raise AttackError(f"{self._label}: {name} is {value!r}; allowed: {wrong}")

    def _check_norm(self) -> None:
        names = self._constructor()
        radius = any(name in names for name in _RADII)
        if "norm" in names or not radius or self.attack in _OWN_BALL:
            return
        own = "l2" if self.attack in _SPHERES else "linf"
        if self.norm != own:
            raise AttackError(
                f"{self._label} works in {own} only, and norm is {self.norm!r}; write norm: {own}"
                + ("; epsilons are then Euclidean lengths" if own == "l2" else "")
            )

    def _check_options(self, model: OptionLogits, part: Batch) -> None:
        least = _LEAST_OPTIONS.get((self.name, self.attack), 2)
        if any(value in _RATIO_LOSSES for _, value in self.params):
            least = max(least, 3)
        if model.classes < least:
            raise AttackError(
                f"{self._label} compares the {least} likeliest answers, and the question of "
                f"{', '.join(part.ids)} has {model.classes}; use an attack without that loss",
                sample_ids=part.ids,
            )

    def _queries(self, setting: Mapping[str, Any]) -> int:
        factors = [
            setting.get(one, 1) if isinstance(one, str) else one
            for one in _QUERIES.get(self.attack, (0,))
        ]
        return math.prod(int(factor) for factor in factors)

    def _notes(self, clean: Tensor, images: Tensor, budget: Budget) -> tuple[str, ...]:
        linf, l2 = norms(images - clean)
        length = float((linf if budget.norm == "linf" else l2).max())
        if length <= budget.epsilon * (1 + 1e-4) + 1e-6 or not math.isfinite(length):
            return ()
        return (f"{self._label} left the ball ({length:.3g} > {budget.epsilon:.3g}); projected",)


@contextlib.contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Global random numbers seeded inside and restored after; warnings of libraries kept quiet."""
    devices = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    arrays, python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            with _seeded_generators():
                yield
        finally:
            np.random.set_state(arrays)
            random.setstate(python)


class _Drawn(np.random.RandomState):
    """A generator made without a seed takes one from the global numbers, not from the system."""

    def __init__(self, seed: Any = None) -> None:  # noqa: ANN401 - numpy's
        super().__init__(np.random.randint(2**32, dtype=np.uint32) if seed is None else seed)


@contextlib.contextmanager
def _seeded_generators() -> Iterator[None]:
    """Some attacks (HopSkipJump, BoundaryAttack) make generators of their own, without a seed."""
    original = np.random.RandomState
    np.random.RandomState = _Drawn  # type: ignore[misc]
    try:
        yield
    finally:
        np.random.RandomState = original  # type: ignore[misc]
