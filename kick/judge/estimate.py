"""What a judge would be asked and what that costs, before it is asked."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kick.errors import RunError
from kick.judge.cache import Cache
from kick.judge.client import most_tokens
from kick.judge.questions import Question
from kick.judge.run import Asked, find_evaluations, unanswered
from kick.judge.spec import JudgeSpec
from kick.settings import DENSE
from kick.suite import Sample
from kick.sweep.plan import Plan, PlannedSuite, judging_of
from kick.sweep.store import JUDGE_CACHE

_REPLY_TOKENS = 200
_CHARACTERS_PER_TOKEN = 4


class Expected(NamedTuple):
    """Questions and tokens, at most: no answer is empty or like another, and all are as long as they may be."""

    questions: int = 0
    prompt_tokens: int = 0

    @property
    def reply_tokens(self) -> int:
        return _REPLY_TOKENS * self.questions

    def usd(self, spec: JudgeSpec) -> float | None:
        return spec.usd(self.prompt_tokens, self.reply_tokens)

    def times(self, n: int) -> "Expected":
        return Expected(n * self.questions, n * self.prompt_tokens)

    def plus(self, other: "Expected") -> "Expected":
        return Expected(self.questions + other.questions, self.prompt_tokens + other.prompt_tokens)


def estimate_cost(root: Path, spec: JudgeSpec) -> dict[str, Any]:
    """What judging the run `root` would ask and cost; prompts at four characters a token, replies at a usual length."""
    evaluations = find_evaluations(root, spec)
    cache = Cache(root / JUDGE_CACHE, spec)
    everything = {asked.key: asked for evaluation in evaluations for asked in evaluation.questions}
    missing = unanswered(everything.values(), cache)
    expected = _of(asked.question for asked in missing)
    return {
        "judge": spec.model,
        "questions": len(everything),
        "settled_by_rule": sum(asked.question.settled is not None for asked in everything.values()),
        "cached": sum(cache.answer(key) is not None for key in everything),
        "to_ask": len(missing),
        "by_suite": _by_suite(missing, [evaluation.planned.name for evaluation in evaluations]),
        "estimated_prompt_tokens": expected.prompt_tokens,
        "estimated_output_tokens": expected.reply_tokens,
        "estimated_usd": expected.usd(spec),
    }


def expected_of(plan: Plan, missing: Mapping[str, Collection[str]], out: Path | None, spec: JudgeSpec) -> Expected:
    """What the judge of `plan` would be asked: about answers that are `missing` (of settings, suites), and about those
    in the run `out` that are there without a judgment.
    """
    total = _not_judged(out, spec) if out is not None else Expected()
    for suite in plan.suites:
        settings = [name for name, suites in missing.items() if suite.name in suites]
        if suite.suite.judged_metrics and settings:
            of_dense = _about_answers(suite, spec, "one of dense ")
            total = total.plus(_about_answers(suite, spec, "another ").times(len(set(settings) - {DENSE})))
            total = total.plus(of_dense.times(settings.count(DENSE)))
    return total


def _not_judged(root: Path, spec: JudgeSpec) -> Expected:
    try:
        evaluations = find_evaluations(root, spec)
    except RunError:  # no suite of it is finished
        return Expected()
    everything = {asked.key: asked for evaluation in evaluations for asked in evaluation.questions}
    return _of(asked.question for asked in unanswered(everything.values(), Cache(root / JUDGE_CACHE, spec)))


def _about_answers(planned: PlannedSuite, spec: JudgeSpec, word: str) -> Expected:
    """About one setting's answers, which are this word again and again; dense says "one of dense"."""
    suite = planned.suite
    judging = judging_of(suite, planned.name, spec)
    length = _CHARACTERS_PER_TOKEN * getattr(suite.params, "max_new_tokens", 256)

    def answers(word: str) -> list[Sample]:
        text = (word * length)[:length]
        return [
            Sample(id=id, group=example.group, prompt="", output=text)
            for example in planned.examples
            for id in suite.sample_ids(example)
        ]

    examples = {id: example for example in planned.examples for id in suite.sample_ids(example)}
    dense = {sample.id: sample for sample in answers("one of dense ")}
    return _of(
        question
        for question in suite.judge_questions(judging, examples, answers(word), dense)
        if question.settled is None
    )


def _of(questions: Iterable[Question]) -> Expected:
    prompts = [most_tokens(question.messages(), {}) for question in questions]
    return Expected(len(prompts), sum(prompts) // _CHARACTERS_PER_TOKEN)


def _by_suite(asked: Sequence[Asked], suites: Sequence[str]) -> dict[str, int]:
    return {suite: sum(own.suite == suite for own in asked) for suite in suites}
