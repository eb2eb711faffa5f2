"""What a decoding method is: further looks at the question, and a rule for the next token's logits.

A method sees, for each answer token, the logits of the forward pass that would have decided alone,
and whatever it asks for beside: forwards with another question, another image or none (`View`),
hidden states of some depth, and attention that it changes itself (`AttentionRule`). The same rule
runs one token at a time when the model answers, and on all positions of a given answer at once, in
the graph, when an answer is scored: an adaptive attack's loss goes through what is deployed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from targets.decoding.attention import AttentionRule
    from targets.decoding.search import Ends, Walk
    from targets.families.base import Family
    from targets.passes import Passes

Disturb = Callable[[Tensor, Sequence[int]], Tensor]
"""Pixels as the vision tower takes them ``[B, …]``, and a seed for each sample → ``[B, …]``."""


@dataclass(frozen=True, slots=True)
class View:
    """A further forward pass over the same answer tokens, through the same compressor.

    Attributes:
        question: what is asked instead; None asks the same.
        image: False leaves the image tokens out of the prompt, and then nothing is compressed.
        disturb: changes the normalised pixels; None leaves them.
        attention: makes a rule for this pass's attention; None leaves it.
    """

    question: Callable[[str], str] | None = None
    image: bool = True
    disturb: Disturb | None = None
    attention: Callable[[], AttentionRule] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """R answer positions of B rows: 1 position when answering, all of them when scoring; live.

    Attributes:
        logits: ``[B, R, vocabulary]`` of the main pass, at least float32.
        views: the same of each further pass, in the order of `Decoding.views`.
        first: place of the first of the R tokens in the answer, from 0.
        hidden: by depth, ``[B, R, D]``; 0 is what enters the language model, d what its d-th layer
            gives.
        early: logits of these, as `head` makes them.
        entered: ``[B, n, D]`` the prompt as it entered the language model, compressed.
        visual: bool ``[B, n]``, which columns of `entered` are visual tokens.
        head: from hidden states to logits, at least float32, as the model makes them.
        seeds: one for each row, for methods that draw.
    """

    logits: Tensor
    views: tuple[Tensor, ...]
    first: int
    hidden: dict[int, Tensor]
    early: dict[int, Tensor]
    entered: Tensor | None
    visual: Tensor | None
    head: Callable[[Tensor], Tensor]
    seeds: tuple[int, ...]


class Decoding(ABC):
    """How answer tokens are chosen.

    Attributes:
        name: the technique.
        beams: width of the search, ≥ 1; 1 is greedy.
        length_penalty: exponent of the length that a finished beam's log-probability is divided by.
    """

    name: ClassVar[str]
    beams: int = 1
    length_penalty: float = 1.0

    def views(self) -> tuple[View, ...]:
        """Further forwards wanted, each a pass for every token."""
        return ()

    def depths(self, layers: int) -> tuple[int, ...]:
        """Depths whose hidden states are wanted, 0 … layers.

        Args:
            layers: of the language model.
        """
        del layers
        return ()

    @property
    def looks_at_entry(self) -> bool:
        """Whether `Step.entered` is wanted."""
        return False

    def attention(self) -> AttentionRule | None:
        """A fresh rule for the attention of the main pass; None leaves it as it is."""
        return None

    def refuses(self, family: Family) -> str | None:
        """Why it cannot work on a model, in plain words; None if it can."""
        del family
        return None

    def foresee(self, passes: Passes) -> Decoding:
        """Itself, ready for a model: what does not depend on the question may be worked out here.

        Called for every batch, before its branches are made.

        Args:
            passes: of the model.
        """
        del passes
        return self

    def search(self, walk: Walk, ends: Ends) -> Tensor | None:
        """A search of its own over continuations; None leaves it to greedy or beam search.

        Args:
            walk: the branches, in front of their prompts.
            ends: where answers end.

        Returns:
            Answers as ids ``[B, ≤ most]``, padded at the right.
        """
        del walk, ends
        return None

    @abstractmethod
    def logits(self, step: Step) -> Tensor:
        """Logits ``[B, R, vocabulary]`` the answer is chosen by.

        Rows and positions do not depend on each other. Finite everywhere: what is ruled out lies
        far below the rest, so that losses and gradients stay finite.
        """
