"""How a written answer is held against the accepted ones: exact match, containment, token F1.

Normalisation is TriviaQA's official one (Joshi et al., arXiv 1705.03551): lower case, `_` and punctuation to spaces,
the articles a, an, the dropped, spaces squeezed. An answer that normalises to nothing is wrong.
"""

import string
from collections import Counter
from collections.abc import Iterable

_PUNCTUATION = string.punctuation + "‘’´`"
_TO_SPACE = str.maketrans(dict.fromkeys(_PUNCTUATION, " "))
_ARTICLES = {"a", "an", "the"}


def normalize(text: str) -> str:
    """
    >>> normalize("The  Rolling_Stones!")
    'rolling stones'
    """
    return " ".join(word for word in text.lower().translate(_TO_SPACE).split() if word not in _ARTICLES)


def exact_match(output: str, answers: Iterable[str]) -> float:
    """1.0 if the normalised output equals a normalised answer."""
    given = normalize(output)
    return float(bool(given) and any(given == normalize(answer) for answer in answers))


def contains(output: str, answers: Iterable[str]) -> float:
    """1.0 if a normalised answer stands in the normalised output as whole words. A negation around it is not read:
    "not Mark Twain" contains "Mark Twain".
    """
    given = f" {normalize(output)} "
    wanted = (normalize(answer) for answer in answers)
    return float(any(f" {answer} " in given for answer in wanted if answer))


def token_f1(output: str, answers: Iterable[str]) -> float:
    """The best harmonic mean of word precision and recall over the answers, words counted as often as they stand."""
    return max((_f1(normalize(output).split(), normalize(answer).split()) for answer in answers), default=0.0)


def _f1(given: list[str], wanted: list[str]) -> float:
    common = sum((Counter(given) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
