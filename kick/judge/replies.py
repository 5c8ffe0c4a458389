"""Reading a judge's reply, strictly: what does not fit the form is no answer.

A reply fits as a JSON object (alone or inside text), or in the notations of published protocols: MT-Bench's `[[7]]` and
`[[A]]` (Zheng et al., arXiv 2306.05685), and two scores a line as LLM-KICK asks for. Where one reply holds several
readings that differ, none of them is taken.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from kick.judge.questions import Answer, Form, PairRatings, Ratings, Winner

_MARK = re.compile(r"\[\[\s*([^\[\]]+?)\s*\]\]")
_NUMBER = r"(\d+(?:\.\d+)?)"
_TWO_NUMBERS = re.compile(rf"^\s*{_NUMBER}\s*[ ,/]\s*{_NUMBER}\s*$")
_OUT_OF_TEN = re.compile(rf"^\s*{_NUMBER}/10 for Assistant 1, {_NUMBER}/10 for Assistant 2\b")
_TWO_LINES = re.compile(rf"^Assistant 1: {_NUMBER}/10\s*\n\s*Assistant 2: {_NUMBER}/10\s*$", re.MULTILINE)


def read_reply(text: str, form: Form) -> Answer | None:
    """The answer in `text`, or None if it holds none that fits `form`, or several that differ.

    >>> read_reply("Correct, but terse. Rating: [[7]]", Ratings(("rating",)))
    {'rating': 7.0}
    >>> read_reply("Rating: [[11]]", Ratings(("rating",))) is None
    True
    """
    answers: list[Answer] = []
    for found in (*_objects(text), *_in_notation(text, form)):
        answer = form.read(found)
        if answer is not None and answer not in answers:
            answers.append(answer)
    return answers[0] if len(answers) == 1 else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object that stands in `text`."""
    decoder = json.JSONDecoder()
    place = text.find("{")
    while place >= 0:
        try:
            found, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            if isinstance(found, dict):
                yield found
        place = text.find("{", end)


def _in_notation(text: str, form: Form) -> Iterator[dict[str, Any]]:
    marks = _MARK.findall(text)
    if isinstance(form, Winner):
        for mark in marks:
            yield {"winner": {"C": "tie"}.get(mark, mark)}
    elif isinstance(form, Ratings) and len(form.names) == 1:
        for mark in marks:
            yield {form.names[0]: _number(mark)}
    elif isinstance(form, PairRatings):
        yield from _pairs(text, form.names)


def _pairs(text: str, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Two numbers a line, a line for each name, before any other text; or, for one name, as judges put it in words."""
    first_lines = text.strip().split("\n")[: len(names)]
    matches = [_TWO_NUMBERS.match(line) for line in first_lines]
    if len(matches) == len(names) and all(matches):
        yield {name: [float(m[1]), float(m[2])] for name, m in zip(names, matches, strict=True) if m}
    if len(names) == 1:
        for match in (_OUT_OF_TEN.match(text), *_TWO_LINES.finditer(text)):
            if match:
                yield {names[0]: [float(match[1]), float(match[2])]}


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(_NUMBER, text) else None
