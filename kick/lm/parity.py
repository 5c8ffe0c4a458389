"""Do two LMs say the same about one model? A handful of requests of every kind, asked of both.

Engines round differently, so that scores differ in the last digits; one that shifts a token, adds a beginning-of-text
token or truncates elsewhere is wrong by far more than that.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kick.errors import KickError
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


def compare(reference: Any, other: Any, dtype: str) -> list[Parity]:
    """Both LMs asked the same, by kind of request. Texts are compared, but only likelihoods decide: ties may fall."""
    tolerance = TOLERANCE[dtype]
    n_tokens = len(reference.tok_encode(_TEXT)) / 8

    def likelihoods() -> tuple[int, float, float]:
        pairs = zip(loglikelihoods(reference, _PAIRS), loglikelihoods(other, _PAIRS), strict=True)
        return len(_PAIRS), max(abs(a - b) for (a, _), (b, _) in pairs), tolerance

    def rolling() -> tuple[int, float, float]:
        (a,), (b,) = rolling_loglikelihoods(reference, [_TEXT]), rolling_loglikelihoods(other, [_TEXT])
        return 1, abs(a - b), tolerance * n_tokens

    def texts() -> tuple[int, float, float]:
        a, b = (generate(lm, _PROMPTS, ["\n"], _NEW_TOKENS) for lm in (reference, other))
        return len(a), sum(x != y for x, y in zip(a, b, strict=True)) / len(a), 1.0

    return [
        _outcome("continuations", likelihoods),
        _outcome("whole text", rolling),
        _outcome("greedy generation", texts),
    ]


def _outcome(kind: str, work: Callable[[], tuple[int, float, float]]) -> Parity:
    try:
        n, difference, allowed = work()
    except KickError as error:
        return Parity(kind, 0, None, True, error.message)
    return Parity(kind, n, difference, difference <= allowed)
