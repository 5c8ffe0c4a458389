"""What a judge is asked, and what becomes of its reply.

A *form* says which values a reply must hold; a *question* is a prompt with its form; a *judgment* is the record of one
question asked: an answer that fits the form, or the reason why there is none. A failed judgment is never a number.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Kind = Literal["single", "pair"]
Order = Literal["", "ab", "ba"]
Answer = dict[str, Any]

REASONS = "reasons"
"""Every schema asks for reasons first, so that a judge can think under structured output, too. No answer keeps them."""


class Form(ABC):
    """The values that a reply must hold."""

    @abstractmethod
    def schema(self) -> dict[str, Any]:
        """As JSON schema, for endpoints with structured output."""

    @abstractmethod
    def read(self, given: Mapping[str, Any]) -> Answer | None:
        """`given` if it fits the form, else None."""

    @abstractmethod
    def example(self) -> str:
        """A JSON object that fits, to show to the judge."""


@dataclass(frozen=True)
class Ratings(Form):
    """A number from `low` to `high` for each of `names`."""

    names: tuple[str, ...]
    low: float = 1
    high: float = 10

    def schema(self) -> dict[str, Any]:
        number = {"type": "number", "minimum": self.low, "maximum": self.high}
        return _object(dict.fromkeys(self.names, number))

    def read(self, given: Mapping[str, Any]) -> Answer | None:
        values = {name: given.get(name) for name in self.names}
        return values if all(_in_range(value, self.low, self.high) for value in values.values()) else None

    def example(self) -> str:
        return _example(dict.fromkeys(self.names, f"<number from {self.low:g} to {self.high:g}>"))


@dataclass(frozen=True)
class PairRatings(Form):
    """For each of `names` two numbers from `low` to `high`: one for the answer shown first, one for the second."""

    names: tuple[str, ...]
    low: float = 1
    high: float = 10

    def schema(self) -> dict[str, Any]:
        number = {"type": "number", "minimum": self.low, "maximum": self.high}
        pair = {"type": "array", "items": number, "minItems": 2, "maxItems": 2}
        return _object(dict.fromkeys(self.names, pair))

    def read(self, given: Mapping[str, Any]) -> Answer | None:
        values = {name: given.get(name) for name in self.names}
        fits = all(
            isinstance(pair, list) and len(pair) == 2 and all(_in_range(value, self.low, self.high) for value in pair)
            for pair in values.values()
        )
        return values if fits else None

    def example(self) -> str:
        return _example(dict.fromkeys(self.names, "[<number for A>, <number for B>]"))


@dataclass(frozen=True)
class Winner(Form):
    """Which of two answers is better: "A", "B" or "tie"."""

    def schema(self) -> dict[str, Any]:
        return _object({"winner": {"type": "string", "enum": ["A", "B", "tie"]}})

    def read(self, given: Mapping[str, Any]) -> Answer | None:
        return {"winner": given["winner"]} if given.get("winner") in ("A", "B", "tie") else None

    def example(self) -> str:
        return _example({"winner": '"A" or "B" or "tie"'})


@dataclass(frozen=True)
class Question:
    """One thing asked of a judge about the sample `sample`.

    `id` is unique within an evaluation; `template` names the prompt and its version. `order`: for pairs, whether the
    sample's answer stands first ("ab") or second ("ba"). `repeat` > 0: asked again to see whether the judge agrees with
    itself; such judgments enter no score. `settled`: an answer that needs no judge (two equal texts are a tie).
    """

    id: str
    sample: str
    kind: Kind
    system: str
    prompt: str
    form: Form
    template: str
    order: Order = ""
    repeat: int = 0
    settled: Answer | None = None

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Judgment:
    """One line of judgments.jsonl: what the judge said. `answer` fits the question's form, or `failed` says why not."""

    id: str
    sample: str
    kind: Kind
    order: Order
    repeat: int
    answer: Answer | None
    failed: str | None
    reply: str
    judge: str
    key: str
    asks: int
    prompt_tokens: int
    output_tokens: int

    def own_ratings(self) -> dict[str, float]:
        """The ratings of the sample itself: its place in each pair, where another text was rated beside it."""
        place = {"": None, "ab": 0, "ba": 1}[self.order]
        return {name: value if place is None else value[place] for name, value in (self.answer or {}).items()}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Judgment":
        return cls(**{field.name: row[field.name] for field in fields(cls)})


def by_sample(judgments: Iterable[Judgment], kind: Kind) -> dict[str, list[Judgment]]:
    """The judgments that count in scores, by the sample that they are about."""
    found: dict[str, list[Judgment]] = {}
    for judgment in judgments:
        if judgment.kind == kind and judgment.repeat == 0:
            found.setdefault(judgment.sample, []).append(judgment)
    return found


def mean_ratings(judgments: Iterable[Judgment]) -> dict[str, float]:
    """Of each sample that was rated by itself: the mean of its ratings, whatever they are called."""
    found: dict[str, list[float]] = {}
    for judgment in judgments:
        if judgment.kind == "single" and judgment.repeat == 0 and judgment.answer is not None:
            found.setdefault(judgment.sample, []).extend(judgment.own_ratings().values())
    return {sample: sum(values) / len(values) for sample, values in found.items()}


def outcome(judgments: Iterable[Judgment]) -> float | None:
    """Of one pairwise comparison asked in both orders: 1 won, 0 lost, 0.5 a tie; None if an order has no answer.

    A judge whose verdict turns with the order has seen no difference: disagreement is a tie.
    """
    seen: dict[str, float] = {}
    for judgment in judgments:
        if judgment.answer is not None:
            first = {"A": 1.0, "B": 0.0, "tie": 0.5}[judgment.answer["winner"]]
            seen[judgment.order] = first if judgment.order == "ab" else 1.0 - first
    if set(seen) != {"ab", "ba"}:
        return None
    return seen["ab"] if seen["ab"] == seen["ba"] else 0.5


def _in_range(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _object(values: dict[str, Any]) -> dict[str, Any]:
    properties = {REASONS: {"type": "string"}, **values}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _example(values: Mapping[str, str]) -> str:
    shown = {REASONS: '"<a few sentences>"', **values}
    return "{" + ", ".join(f'"{name}": {value}' for name, value in shown.items()) + "}"
