"""What a judge would be asked and what that costs, before it is asked."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kick.errors import ConfigError, RunError
from kick.judge.cache import Cache
from kick.judge.client import most_tokens
from kick.judge.questions import Question
from kick.judge.run import by_key, find_evaluations, unanswered
from kick.judge.spec import JudgeSpec
from kick.settings import DENSE
from kick.suite import CHARACTERS_PER_TOKEN, Sample
from kick.sweep.plan import Plan, PlannedSuite, judging_of
from kick.sweep.store import JUDGE_CACHE, read_run

_REPLY_TOKENS = 200
_DENSE_SAYS = "one of dense "


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
    everything = by_key(evaluations)
    missing = unanswered(everything.values(), cache)
    expected = _of(asked.question for asked in missing)
    return {
        "judge": spec.model,
        "questions": len(everything),
        "settled_by_rule": sum(asked.question.settled is not None for asked in everything.values()),
        "cached": sum(cache.answer(key) is not None for key in everything),
        "to_ask": len(missing),
        "by_suite": {
            evaluation.planned.name: sum(asked.suite == evaluation.planned.name for asked in missing)
            for evaluation in evaluations
        },
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
        if suite.suite.judged_metrics:
            for word, count in ((_DENSE_SAYS, settings.count(DENSE)), ("another ", len(set(settings) - {DENSE}))):
                if count:
                    total = total.plus(_about_answers(suite, spec, word).times(count))
    return total


def _not_judged(root: Path, spec: JudgeSpec) -> Expected:
    known = {name: own for name, own in spec.suites.items() if name in read_run(root)["suites"]}
    spec = spec.model_copy(update={"suites": known})
    try:
        evaluations = find_evaluations(root, spec)
    except (RunError, ConfigError):  # no suite of it is finished, or judged ones are only now being added
        return Expected()
    missing = unanswered(by_key(evaluations).values(), Cache(root / JUDGE_CACHE, spec))
    return _of(asked.question for asked in missing)


def _about_answers(planned: PlannedSuite, spec: JudgeSpec, word: str) -> Expected:
    """About one setting's answers, which are this word again and again."""
    suite = planned.suite
    judging = judging_of(suite, planned.name, spec)
    length = CHARACTERS_PER_TOKEN * getattr(suite.params, "max_new_tokens", 256)
    examples = planned.by_sample()

    def answers(word: str) -> dict[str, Sample]:
        text = (word * length)[:length]
        return {id: Sample(id=id, group=own.group, prompt="", output=text) for id, own in examples.items()}

    questions = suite.judge_questions(judging, examples, list(answers(word).values()), answers(_DENSE_SAYS))
    return _of(question for question in questions if question.settled is None)


def _of(questions: Iterable[Question]) -> Expected:
    prompts = [most_tokens(question.messages(), {}) for question in questions]
    return Expected(len(prompts), sum(prompts) // CHARACTERS_PER_TOKEN)
