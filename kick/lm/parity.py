"""Do two LMs say the same about one model? A handful of requests of every kind, asked of both.

Engines round differently, so that scores differ in the last digits; one that shifts a token, adds a beginning-of-text
token or truncates elsewhere is wrong by far more than that.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kick.errors import KickError, NotGivenError
from kick.lm import generate, loglikelihoods, rolling_loglikelihoods
from kick.lm.packing import common_length

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
_STOP = "\n"
_CONTINUATIONS, _WHOLE_TEXT, GENERATION = "continuations", "whole text", "greedy generation"
_ALLOWED = {_CONTINUATIONS: 1.0, _WHOLE_TEXT: 4.0, GENERATION: 0.0}  # times the tolerance: a text is longer


@dataclass(frozen=True)
class Parity:
    """What came of one kind of request. `difference`: the largest, in nats a request; of text: the share that differs.

    `reason` says why there is no figure, or what is wrong with texts.
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
        GENERATION: lambda: generate(lm, _PROMPTS, [_STOP], _NEW_TOKENS),
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


def no_answers(error: KickError) -> Answers:
    """What an LM said that could not be asked at all."""
    return dict.fromkeys(_ALLOWED, error)


def lead_of(lm: Any, own: Answers, other: Answers) -> float | None:
    """By how much `lm` prefers what it said itself: in nats, of the one token at which a text of `other` parts from it.

    The largest over all prompts, 0 where all texts are alike. A text that goes on after the stop string is wrong by
    any measure. None if there are no texts, or no likelihoods to tell by.
    """
    mine, theirs = own[GENERATION], other[GENERATION]
    if isinstance(mine, KickError) or isinstance(theirs, KickError):
        return None
    try:
        return max(_lead_of(lm, *texts) for texts in zip(_PROMPTS, mine, theirs, strict=True))
    except NotGivenError:
        return None


def _lead_of(lm: Any, prompt: str, mine: str, theirs: str) -> float:
    if _STOP in theirs:
        return math.inf
    if mine == theirs:
        return 0.0
    texts = [lm.tok_encode(prompt + text) for text in (mine, theirs)]
    shared = common_length(*texts)
    ends = [token for token in (lm.eot_token_id, *lm.tok_encode(_STOP)[-1:]) if token is not None]
    return _likeliest(lm, texts[0][:shared], texts[0][shared : shared + 1] or ends) - _likeliest(
        lm, texts[1][:shared], texts[1][shared : shared + 1] or ends
    )


def _likeliest(lm: Any, context: list[int], tokens: Sequence[int]) -> float:
    """The log-likelihood of the likeliest of `tokens` after `context`."""
    asked = [(("", ""), context, [token]) for token in tokens]
    return max((value for value, _ in lm._loglikelihood_tokens(asked)), default=-math.inf)


def compare(reference: Answers, other: Answers, dtype: str, lead: float | None = None) -> list[Parity]:
    """Two LMs' answers by kind of request. lead: by how much the reference prefers its own texts.

    Two texts may part at a tie; without a lead likelihoods decide alone, and where an LM gives none, two that begin no
    text alike disagree. What an LM cannot give by its nature is no disagreement.
    """
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
            if lead is not None:
                agrees = lead <= TOLERANCE[dtype]
                reason = "" if agrees else f"a text parts where the reference prefers its own token by {lead:.2g} nats"
                rows.append(Parity(kind, len(a), difference, agrees, reason))
                continue
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
