"""Which answer several draws of a random defence agree on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def majority(texts: Sequence[str]) -> int:
    """Index of the first answer that is one of the most frequent.

    Args:
        texts: answers, at least one; case and spacing do not tell them apart. Of equally frequent
            ones the one given first wins.
    """
    plain = [" ".join(text.lower().split()) for text in texts]
    counts = Counter(plain)
    return max(range(len(plain)), key=lambda index: (counts[plain[index]], -index))
