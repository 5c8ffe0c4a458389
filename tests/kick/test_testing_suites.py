"""The conformance kit for suites: every built-in passes, and each planted fault is found by the check meant for it."""

import itertools
from dataclasses import replace
from importlib.metadata import entry_points

import pytest

from kick.lm import generate
from kick.suite import Example, Metric, Sample, Suite
from kick.testing import ConformanceError, check_suite, suite_checks

PARAMS = {
    "mmlu": {"shots": 0},
    "summarization": {"max_new_tokens": 16},
    "mt_bench": {"max_new_tokens": 8},
    "perplexity": {"window_bytes": 128},
    "divergence": {"window_bytes": 128},
    "speed": {"repeats": 2, "batch": 2, "prompt_tokens": 16, "new_tokens": 2},
}
ELSEWHERE = {"lm_eval"}  # it wants a task, and rows that come from outside
BUILT_IN = sorted(
    {entry.name for entry in entry_points(group="kick.suites") if entry.dist.name == "llm-kick"} - ELSEWHERE
)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_passes(name):
    (entry,) = entry_points(group="kick.suites", name=name)
    check_suite(entry.load(), PARAMS.get(name), questions=2)


@pytest.mark.parametrize("form", ["cloze", "generated"])
def test_other_ways_to_ask_pass(form):
    (entry,) = entry_points(group="kick.suites", name="mmlu")
    check_suite(entry.load(), {"shots": 0, "format": form}, questions=2)


class Opposites(Suite):
    name = "opposites"
    metrics = (Metric("accuracy", value="correct"),)

    def examples(self, source):
        return [Example(word, "words", {"word": word, "answer": word[::-1]}) for word in ("hot", "up", "day", "wet")]

    def answer(self, lm, examples):
        outputs = generate(lm, [f"{example.content['word']}:" for example in examples], ["\n"], 4)
        for example, output in zip(examples, outputs, strict=True):
            yield self.sample(example, output)

    def sample(self, example, output):
        correct = float(output.strip() == example.content["answer"])
        return Sample(example.id, example.group, "", output=output, scores={"correct": correct})


class OtherQuestions(Opposites):
    calls = itertools.count()

    def examples(self, source):
        return [Example(f"q{next(self.calls)}", "words", {"word": "hot", "answer": "cold"})]


class TwiceTheSame(Opposites):
    def examples(self, source):
        return super().examples(source)[:1] * 2


class NotJson(Opposites):
    def examples(self, source):
        return [Example("hot", "words", {"word": "hot", "answer": "cold", "more": {1, 2}})]


class OutOfOrder(Opposites):
    def answer(self, lm, examples):
        yield from reversed(list(super().answer(lm, examples)))


class ByLot(Opposites):
    calls = itertools.count()

    def sample(self, example, output):
        return Sample(example.id, example.group, "", scores={"correct": float(next(self.calls))})


class OtherName(Opposites):
    def sample(self, example, output):
        return Sample(example.id, example.group, "", scores={"right": 1.0})


class NotANumber(Opposites):
    def sample(self, example, output):
        return Sample(example.id, example.group, "", scores={"correct": float("nan")})


class Failing(Opposites):
    def answer(self, lm, examples):
        raise RuntimeError("no such attribute")


class NoDivisor(Opposites):
    metrics = (Metric("accuracy", value="correct", per="words"),)


class NoQuestions(Opposites):
    def examples(self, source):
        raise FileNotFoundError("rows.csv")


class NotKept(Opposites):
    def sample(self, example, output):
        return replace(super().sample(example, output), choices=[{"text": {1, 2}}])


class Doubled(Opposites):
    def sample_ids(self, example):
        return [f"{example.id}-1", f"{example.id}-2"]

    def answer(self, lm, examples):
        for sample in super().answer(lm, examples):
            yield from (replace(sample, id=f"{sample.id}-{turn}") for turn in (1, 2))


class EmptyIsRight(Opposites):
    def sample(self, example, output):
        correct = float(example.content["answer"].startswith(output.strip()))
        return Sample(example.id, example.group, "", output=output, scores={"correct": correct})


def test_the_suite_that_the_faults_are_planted_in_passes():
    check_suite(Opposites)


@pytest.mark.parametrize(
    ("kind", "check", "says"),
    [
        (OtherQuestions, "asks the same every time", "other questions"),
        (TwiceTheSame, "asks the same every time", "the id 'hot' stands twice"),
        (NotJson, "has questions that can be kept", "the content of 'hot' is not JSON"),
        (OutOfOrder, "answers every question in order", r"answers are for \['wet', 'day', 'up'\]"),
        (ByLot, "gives the same answers again", "'hot' is answered differently"),
        (OtherName, "scores what its metrics add up", "no sample counts for 'accuracy', which adds up correct"),
        (NotANumber, "scores what its metrics add up", "no finite number"),
        (Failing, "answers every question in order", "RuntimeError: no such attribute"),
        (NoDivisor, "scores what its metrics add up", "KeyError: 'words'"),
        (NoQuestions, "asks the same every time", "FileNotFoundError: rows.csv"),
        (NotKept, "has answers that can be kept", "set is not JSON serializable"),
        (Doubled, "counts samples of one question once", "`accuracy` counts them as independent"),
        (EmptyIsRight, "gives nothing for an empty answer", "an empty answer to 'hot' scores accuracy above 0"),
    ],
)
def test_planted_faults_are_found(kind, check, says):
    checks = {own.name: own for own in suite_checks(kind)}
    with pytest.raises(ConformanceError, match=says):
        checks[check].run()
    with pytest.raises(ConformanceError, match=r"fails \d checks") as found:
        check_suite(kind)
    assert check in found.value.hint
