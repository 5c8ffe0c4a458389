"""Do two LMs say the same about one model? A handful of requests of every kind, asked of both.

Engines round differently, so that scores differ in the last digits; one that shifts a token, adds a beginning-of-text
token or truncates elsewhere is wrong by far more than that.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kick.errors import KickError, NotGivenError
from kick.lm import generate, loglikelihoods, rolling_loglikelihoods

TOLERANCE = {"float32": 0.01, "bfloat16": 0.5, "float16": 0.1}
"""The largest difference of a log-likelihood, in nats, of a continuation of up to eight tokens."""

_QUESTION = "Question: Which planet is known as the red planet?\nAnswer:"
_PAIRS = [
    *((_QUESTION, f" {planet}") for planet in ("Mars", "Venus", "Jupiter", "the fourth planet from the sun")),
    ("The following are questions (with answers).\n\n" + 12 * f"{_QUESTION} Mars\n\n" + _QUESTION, " Mars"),
    ("2 + 2 =", " 4"),
    ("", "The sky is blue"),
    ("A context that ends with spaces  ", "and goes on"),
]
_TEXT = "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there."
_PROMPTS = (_QUESTION, "Once upon a time there was")
_NEW_TOKENS = 16
_CONTINUATIONS, _WHOLE_TEXT, GENERATION = "continuations", "whole text", "greedy generation"
_ALLOWED = {_CONTINUATIONS: 1.0, _WHOLE_TEXT: 4.0, GENERATION: 0.0}  # times the tolerance: a text is longer


@dataclass(frozen=True)
class Parity:
    """What came of one kind of request. `difference`: the largest, in nats a request; of text: the share that differs.

    `reason` says why there is no figure.
    """

    kind: str
    n: int
    difference: float | None
    agrees: bool
    reason: str = ""

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


Answers = dict[str, list[Any] | KickError]
"""What an LM said, by kind of request; or why it said nothing."""


def ask(lm: Any) -> Answers:
    """Every request, asked of one LM."""
    work: dict[str, Callable[[], list[Any]]] = {
        _CONTINUATIONS: lambda: [value for value, _ in loglikelihoods(lm, _PAIRS)],
        _WHOLE_TEXT: lambda: rolling_loglikelihoods(lm, [_TEXT]),
        GENERATION: lambda: generate(lm, _PROMPTS, ["\n"], _NEW_TOKENS),
    }
    answers: Answers = {}
    for kind, asking in work.items():
        try:
            if kind == GENERATION and getattr(lm, "applies_a_template", False):
                raise NotGivenError("it puts a template around prompts: its texts answer others.", "")
            answers[kind] = asking()
        except KickError as error:
            answers[kind] = error
    return answers


def compare(reference: Answers | str, other: Answers | str, dtype: str) -> list[Parity]:
    """Two LMs' answers by kind of request. Likelihoods decide: of two texts one may follow a tie elsewhere.

    Where an LM gives none, two that begin no text alike disagree. What an LM cannot give by its nature is no
    disagreement. A text instead of answers says why an LM gave none at all.
    """
    if isinstance(reference, str) or isinstance(other, str):
        reason = next(each for each in (reference, other) if isinstance(each, str))
        return [Parity(kind, 0, None, False, reason) for kind in _ALLOWED]
    rows = []
    for kind, allowed in _ALLOWED.items():
        a, b = reference[kind], other[kind]
        failed = [each for each in (a, b) if isinstance(each, KickError)]
        if failed:
            natural = all(isinstance(each, NotGivenError) for each in failed)
            rows.append(Parity(kind, 0, None, natural, failed[0].message))
            continue
        assert isinstance(a, list)
        assert isinstance(b, list)
        if kind == GENERATION:
            difference = sum(x != y for x, y in zip(a, b, strict=True)) / len(a)
            measured = any(row.difference is not None for row in rows)
            alike = any(_first_word(x) == _first_word(y) for x, y in zip(a, b, strict=True))
            rows.append(Parity(kind, len(a), difference, measured or alike))
            continue
        differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
        difference = math.inf if any(map(math.isnan, differences)) else max(differences)
        rows.append(Parity(kind, len(a), difference, difference <= allowed * TOLERANCE[dtype]))
    return rows


def _first_word(text: str) -> str:
    return next(iter(text.split()), "")
