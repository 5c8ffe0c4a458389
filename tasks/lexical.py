"""What can be said of a text by counting: length, variety, repetition, what it takes from its source.

Pure functions on words or tokens. LLM-KICK (arXiv 2310.01382) counts unique tokens: compressed models repeat
themselves. Distinct-n: Li et al., arXiv 1510.03055. Novel n-grams: See et al., arXiv 1704.04368.
"""

import re
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def words(text: str) -> list[str]:
    """
    >>> words("It's a well-kept secret.")
    ["it's", 'a', 'well-kept', 'secret']
    """
    return _WORD.findall(text.lower())


def ngrams(units: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]


def distinct(units: Sequence[Hashable], n: int) -> float:
    """Distinct n-grams over all n-grams; 0 where there is none.

    >>> distinct("a b a b".split(), 2)  # a b, b a, a b
    0.6666666666666666
    """
    found = ngrams(units, n)
    return len(set(found)) / len(found) if found else 0.0


def repetition(units: Sequence[Hashable], n: int = 4) -> float:
    """Share of n-grams that stood in the text before; 0 where there is none."""
    found = ngrams(units, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def copied(units: Sequence[Hashable], source: Sequence[Hashable], n: int) -> float:
    """Share of the text's n-grams that stand in `source`; 0 where there is none."""
    found, there = ngrams(units, n), set(ngrams(source, n))
    return sum(gram in there for gram in found) / len(found) if found else 0.0
