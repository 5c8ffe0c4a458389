"""How a written answer is held against the accepted ones: exact match, containment, token F1.

Normalisation is TriviaQA's official one (Joshi et al., arXiv 1705.03551): lower case, `_` and punctuation to spaces,
the articles a, an, the dropped, spaces squeezed; or SQuAD's (Rajpurkar et al., arXiv 1606.05250), which is used for
Natural Questions and drops punctuation instead, so that "10.5%" becomes one word. An answer that normalises to nothing
is wrong.
"""

import string
from collections import Counter
from collections.abc import Iterable
from typing import Literal

Rule = Literal["triviaqa", "squad"]

_PUNCTUATION = string.punctuation + "‘’´`"
_TO_NOTHING = str.maketrans(dict.fromkeys(string.punctuation, ""))
_TO_SPACE = str.maketrans(dict.fromkeys(_PUNCTUATION, " "))
_ARTICLES = {"a", "an", "the"}


def normalize(text: str, rule: Rule = "triviaqa") -> str:
    """
    >>> normalize("The  Rolling_Stones!"), normalize("10.5%"), normalize("10.5%", "squad")
    ('rolling stones', '10 5', '105')
    """
    plain = text.lower().translate(_TO_SPACE if rule == "triviaqa" else _TO_NOTHING)
    return " ".join(word for word in plain.split() if word not in _ARTICLES)


def exact_match(output: str, answers: Iterable[str], rule: Rule = "triviaqa") -> float:
    """1.0 if the normalised output equals a normalised answer."""
    given = normalize(output, rule)
    return float(bool(given) and any(given == normalize(answer, rule) for answer in answers))


def contains(output: str, answers: Iterable[str], rule: Rule = "triviaqa") -> float:
    """1.0 if a normalised answer stands in the normalised output as whole words. A negation around it is not read:
    "not Mark Twain" contains "Mark Twain".
    """
    given = f" {normalize(output, rule)} "
    wanted = (normalize(answer, rule) for answer in answers)
    return float(any(f" {answer} " in given for answer in wanted if answer))


def token_f1(output: str, answers: Iterable[str], rule: Rule = "triviaqa") -> float:
    """The best harmonic mean of word precision and recall over the answers, words counted as often as they stand."""
    given = normalize(output, rule).split()
    return max((_f1(given, normalize(answer, rule).split()) for answer in answers), default=0.0)


def _f1(given: list[str], wanted: list[str]) -> float:
    common = sum((Counter(given) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
