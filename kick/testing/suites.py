"""Is a suite fit to stand beside the others? Its checks, on some of its questions and a tiny random model."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from kick.errors import KickError
from kick.lm.fast import FastLM
from kick.suite import OVERALL, DataSource, Example, Sample, Suite, repeated_id
from kick.testing.check import Check, ConformanceError, run_all
from kick.testing.tiny import tiny_model, tiny_tokenizer


def check_suite(
    kind: type[Suite], params: dict[str, Any] | None = None, data: str = "embedded", questions: int = 4
) -> None:
    """Run every check on `kind`. Raises ConformanceError listing all that fail.

    data: as in a sweep file. questions: how many of them are asked.
    """
    run_all(kind.__name__, suite_checks(kind, params, data, questions))


def suite_checks(
    kind: type[Suite], params: dict[str, Any] | None = None, data: str = "embedded", questions: int = 4
) -> list[Check]:
    """The checks that `check_suite` runs, each to be run alone."""
    subject = _Subject(kind, params or {}, DataSource.parse(data), questions)
    checks: dict[str, Callable[[], None]] = {
        "asks the same every time": partial(_asks_the_same, subject),
        "has questions that can be kept": partial(_questions_are_json, subject),
        "answers every question in order": partial(_answers_in_order, subject),
        "gives the same answers again": partial(_is_deterministic, subject),
        "scores what its metrics add up": partial(_scores, subject),
        "counts samples of one question once": partial(_clusters, subject),
        "has answers that can be kept": partial(_round_trip, subject),
        "gives nothing for an empty answer": partial(_nothing_for_nothing, subject),
    }
    return [Check(name, run) for name, run in checks.items()]


@dataclass(frozen=True)
class _Subject:
    """A suite with its parameters, and where its questions come from."""

    kind: type[Suite]
    params: dict[str, Any]
    source: DataSource
    questions: int

    def new(self) -> Suite:
        return self.kind(self.kind.Params(**self.params))

    @cached_property
    def examples(self) -> list[Example]:
        found = self.attempt(self.new().examples, self.source)
        if not found:
            raise ConformanceError(f"there is no question in {self.source}.")
        return found[: self.questions]

    def answer(self, lm: Any) -> list[Sample]:
        suite, examples = self.new(), self.examples
        if suite.needs_dense:
            return self.attempt(lambda: list(suite.answer_beside(lm, lm, examples)))
        return self.attempt(lambda: list(suite.answer(lm, examples)))

    @cached_property
    def samples(self) -> list[Sample]:
        return self.answer(tiny_lm())

    def attempt(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work` gives; whatever it raises is a fault of the suite."""
        try:
            return work(*arguments)
        except KickError as error:
            raise ConformanceError(f"{type(error).__name__}: {error}") from error
        except Exception as error:
            raise ConformanceError(f"it raised {type(error).__name__}: {error}") from error


def tiny_lm() -> FastLM:
    return FastLM(tiny_model(), tiny_tokenizer())


class Silent(FastLM):
    """Says nothing, whatever it is asked; `was_asked` to say something."""

    was_asked = False

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.was_asked = True
        return [""] * len(requests)


def _asks_the_same(subject: _Subject) -> None:
    first, second = (subject.attempt(subject.new().examples, subject.source) for _ in range(2))
    if first != second:
        raise ConformanceError("`examples` gives other questions, or another order, the second time.")
    if twice := repeated_id(first):
        raise ConformanceError(f"the id '{twice}' stands twice; models are compared by id.")


def _questions_are_json(subject: _Subject) -> None:
    for example in subject.examples:
        try:
            again = json.loads(json.dumps(example.content))
        except (TypeError, ValueError) as error:
            raise ConformanceError(f"the content of '{example.id}' is not JSON: {error}.") from error
        if again != _as_json(example.content):
            raise ConformanceError(f"the content of '{example.id}' comes back different from JSON.")


def _as_json(value: Any) -> Any:
    """With tuples as lists, which JSON has."""
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def _answers_in_order(subject: _Subject) -> None:
    suite = subject.new()
    expected = [id for example in subject.examples for id in suite.sample_ids(example)]
    found = [sample.id for sample in subject.samples]
    if found != expected:
        raise ConformanceError(f"answers are for {found[:3]}..., asked was {expected[:3]}....")


def _is_deterministic(subject: _Subject) -> None:
    if subject.new().times_itself:
        return
    for first, second in zip(subject.samples, subject.answer(tiny_lm()), strict=True):
        if _comparable(first) != _comparable(second):
            raise ConformanceError(f"'{first.id}' is answered differently by the same model.")


def _comparable(sample: Sample) -> str:
    return json.dumps(sample.to_json(), sort_keys=True, default=str)


def _scores(subject: _Subject) -> None:
    suite = subject.new()
    primary = suite.metrics[0]
    scored = [sample for sample in subject.samples if sample.error is None]
    if not scored:
        raise ConformanceError(f"no question could be scored: {subject.samples[0].error}.")
    scores = subject.attempt(suite.score, subject.samples)
    found = [own for own in scores if (own.metric.name, own.group) == (primary.name, OVERALL)]
    if not any(own.n for own in found):
        names = " and ".join(name for name in (primary.value, primary.per) if name)
        raise ConformanceError(f"no sample counts for '{primary.name}', which adds up {names}.")
    for sample in scored:
        for name, value in sample.scores.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConformanceError(f"'{sample.id}' has {name} = {value!r}: no finite number; say `error` instead.")


def _clusters(subject: _Subject) -> None:
    """Samples of one question are not independent: counted as if they were, intervals are too narrow."""
    suite = subject.new()
    if not subject.samples or all(len(suite.sample_ids(example)) == 1 for example in subject.examples):
        return
    for score in subject.attempt(suite.score, subject.samples):
        if score.n and not score.clusters:
            raise ConformanceError(
                f"`sample_ids` gives a question several samples, and `{score.metric.name}` counts them as independent: "
                "let `score` say in `clusters` which belong together."
            )


def _round_trip(subject: _Subject) -> None:
    for sample in subject.samples:
        again = subject.attempt(lambda own: Sample.from_json(json.loads(json.dumps(own.to_json()))), sample)
        if _comparable(again) != _comparable(sample):
            raise ConformanceError(f"'{sample.id}' comes back different from JSON.")


def _nothing_for_nothing(subject: _Subject) -> None:
    """Where models write, and more is better."""
    suite, lm = subject.new(), Silent(tiny_model(), tiny_tokenizer())
    primary = suite.metrics[0]
    if primary.descriptive or not primary.higher_is_better:
        return
    samples = subject.answer(lm)
    if not lm.was_asked:
        return
    right = [sample.id for sample in samples if sample.scores.get(primary.value, 0.0) > 0]
    if right:
        raise ConformanceError(f"an empty answer to '{right[0]}' scores {primary.name} above 0.")
