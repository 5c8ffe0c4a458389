"""Judge a run: every question about every answer that is on disk, each asked once however often this is called.

judge-cache.jsonl                            one line a question that was asked, by content; appended as replies come
judge.json                                   which judge, what it cost, how far it can be trusted
evaluations/SETTING/SUITE/judgments.jsonl    what was said of that evaluation's samples; its scores.json counts it
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kick.compare import estimate
from kick.config import SuiteSpec, SweepConfig
from kick.errors import ConfigError, RunError, unknown_name
from kick.files import write_json
from kick.jsonl import read_jsonl
from kick.judge import trust
from kick.judge.budget import Budget, BudgetSpent
from kick.judge.cache import Cache
from kick.judge.client import Judge, Verdict, how_to_answer
from kick.judge.questions import Answer, Judgment, Question
from kick.judge.spec import JudgeSpec
from kick.progress import Display
from kick.settings import DENSE, digest
from kick.suite import Sample
from kick.sweep.plan import PlannedSuite, judged_suites, judging_of, plan_suite
from kick.sweep.store import JUDGE, JUDGE_CACHE, EvaluationStore, Store, alone_in, read_run, recorded_settings

NOT_ASKED = "not asked: the budget is spent"
RULE = "kick: by rule"  # the judge of what needs none, such as an empty answer


@dataclass(frozen=True)
class Asked:
    """A question about one evaluation's sample. `key` is its content: equal ones are asked once."""

    setting: str
    suite: str
    question: Question
    key: str


@dataclass
class Judged:
    """An evaluation whose samples can be judged."""

    setting: str
    planned: PlannedSuite
    store: EvaluationStore
    samples: list[Sample]
    questions: list[Asked] = field(default_factory=list)


@dataclass
class Summary:
    """What a call found and did; the record is what judge.json holds."""

    questions: int
    cached: int
    asked: int
    failed: dict[str, int]
    stopped: str | None
    record: dict[str, Any]


def judge_run(root: Path, spec: JudgeSpec, display: Display) -> Summary:
    """Ask what was not asked before, then write judgments, scores and the record. Safe to kill and call again."""
    spec.check()
    verdicts = reference_verdicts(spec)  # read before anything is paid for
    with alone_in(root):
        evaluations = find_evaluations(root, spec)
        cache = Cache(root / JUDGE_CACHE, spec)
        budget = Budget(spec.budget_usd, spec.budget_tokens, spec.price_in, spec.price_out, *cache.spent())
        judge = Judge(spec, budget)
        everything = by_key(evaluations)
        missing = unanswered(everything.values(), cache)
        cached = sum(cache.answer(key) is not None for key in everything)
        done, stopped = 0, None
        with cache.appending():
            try:
                for asked, verdict in ask_all(judge, missing, spec.concurrency):
                    cache.add(asked.key, verdict)
                    done += 1
                    display.step(f"judge: {asked.suite}", done, len(missing), None)
            except BudgetSpent:
                stopped = f"the budget is spent after {done} of {len(missing)} questions"
        _stop_if_nothing_came(root, spec, cache, everything)
        for evaluation in evaluations:
            judgments = [_judgment(asked, cache, spec) for asked in evaluation.questions]
            scores = evaluation.planned.suite.score(evaluation.samples, judgments)
            evaluation.store.keep_judgments(judgments, [estimate(score).as_row() for score in scores])
        now = {
            "asked": done,
            "cached": cached,
            "stopped": stopped,
            "retried_requests": judge.retries,
            "not_understood_by_the_endpoint": sorted(judge.missing),
        }
        record = {**_record(spec, cache, evaluations, verdicts), "last_call": now}
        write_json(root / JUDGE, record)
        return Summary(len(everything), cached, done, record["failed"], stopped, record)


def _stop_if_nothing_came(root: Path, spec: JudgeSpec, cache: Cache, asked: Collection[str]) -> None:
    """Raise RunError where this judge has answered nothing at all: what rules settle alone is no judgment of a run."""
    if any(cache.answer(key) is not None for key in asked):
        return
    reasons = Counter(verdict.failed for key in asked if (verdict := cache.get(key)) is not None and verdict.failed)
    if reasons:
        (reason, _), *_ = reasons.most_common(1)
        raise RunError(
            f"{spec.model} answered none of {len(asked)} questions; no judgment was written or changed.",
            f"Most often: {reason}.",
        )


def find_evaluations(root: Path, spec: JudgeSpec) -> list[Judged]:
    """Every complete evaluation of a suite that can be judged, with its questions. Raises RunError if there is none."""
    run = read_run(root)
    config = SweepConfig(**{key: value for key, value in run["config"].items() if key != "judge"})
    judged = judged_suites(config, spec)
    store, found = Store(root), []
    for suite in judged:
        planned = _plan_again(suite, config.data, run["suites"][suite.name])
        for setting in recorded_settings(run):
            own = store.evaluation(setting.name, suite.name)
            result = own.result()
            if result and result["status"] == "complete" and own.is_complete(result["key"]):
                found.append(Judged(setting.name, planned, own, own.samples()))
    if not found:
        raise RunError(f"{root} holds no finished evaluation of {judged[0].name}.", "Run the sweep first.")
    for evaluation in found:
        evaluation.questions = _questions(evaluation, found, spec)
    _repeat_some(found, spec)
    return found


def by_key(evaluations: Iterable[Judged]) -> dict[str, Asked]:
    """Each question once, by its content."""
    return {asked.key: asked for evaluation in evaluations for asked in evaluation.questions}


def _plan_again(suite: SuiteSpec, data: str, recorded: dict[str, Any]) -> PlannedSuite:
    """The suite with its questions, which must be the ones that were answered."""
    planned = plan_suite(suite, data)
    if planned.identity["data"] != recorded["data"]:
        raise RunError(
            f"the questions of '{suite.name}' are not the ones that this run answered.",
            f"They were read from {recorded['source']}; has it changed?",
        )
    return planned


def _questions(evaluation: Judged, everything: list[Judged], spec: JudgeSpec) -> list[Asked]:
    planned = evaluation.planned
    judging = judging_of(planned.suite, planned.name, spec)
    same = {e.setting: e for e in everything if e.planned.name == planned.name}
    whose = getattr(judging, "baseline", DENSE)
    if whose.endswith(".jsonl"):
        whose = DENSE  # the suite reads the file itself
    elif whose != DENSE and whose not in same:
        raise unknown_name("setting to compare with", whose, same, "A file of answers ends in .jsonl.")
    answers = same[whose].samples if whose in same else []
    usable = {sample.id: sample for sample in answers if sample.left_out is None}
    questions = planned.suite.judge_questions(judging, planned.by_sample(), evaluation.samples, usable)
    return [Asked(evaluation.setting, planned.name, question, _key(question, spec)) for question in questions]


def _repeat_some(evaluations: list[Judged], spec: JudgeSpec) -> None:
    """Add `repeats` questions of each suite, drawn with a fixed seed, a second time."""
    rng = np.random.default_rng(0)
    for suite in dict.fromkeys(evaluation.planned.name for evaluation in evaluations):
        own = [evaluation for evaluation in evaluations if evaluation.planned.name == suite]
        pool = [(e, asked) for e in own for asked in e.questions if asked.question.settled is None]
        for index in sorted(rng.permutation(len(pool))[: spec.repeats]):
            evaluation, asked = pool[index]
            again = replace(asked.question, id=f"{asked.question.id}#1", repeat=1)
            evaluation.questions.append(Asked(asked.setting, suite, again, _key(again, spec)))


def _key(question: Question, spec: JudgeSpec) -> str:
    """The content of a question: the judge, how it is asked, what it is shown, and which repetition this is."""
    asked = [question.messages(), question.form.schema(), how_to_answer(question.form), question.template]
    return digest([spec.identity(), *asked, question.repeat])


def ask_all(judge: Judge, questions: Sequence[Asked], concurrency: int) -> Iterator[tuple[Asked, Verdict]]:
    """Verdicts as they come, at most `concurrency` questions under way.

    Where the budget runs out, or an error or Ctrl-C ends it, the verdicts of all that was under way come first: they
    are paid for.
    """
    waiting = iter(questions)
    ended: BaseException | None = None
    with ThreadPoolExecutor(concurrency) as pool:
        under_way: dict[Future[Verdict], Asked] = {}
        try:
            while True:
                if ended is None:
                    for asked in islice(waiting, concurrency - len(under_way)):
                        under_way[pool.submit(judge.ask, asked.question)] = asked
                if not under_way:
                    break
                try:
                    done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt as interrupt:
                    ended = interrupt
                    judge.stop()
                    continue
                for future in done:
                    asked = under_way.pop(future)
                    error = future.exception()
                    if error is None:
                        yield asked, future.result()
                    else:
                        ended = ended or error
                        if not isinstance(error, BudgetSpent):
                            judge.stop()  # nobody waits for retries
        finally:
            judge.stop()
            pool.shutdown(wait=True, cancel_futures=True)
    if ended is not None:
        raise ended


def unanswered(questions: Iterable[Asked], cache: Cache) -> list[Asked]:
    """Those that no rule settles and no earlier reply answers."""
    return [a for a in questions if a.question.settled is None and cache.answer(a.key) is None]


def _judgment(asked: Asked, cache: Cache, spec: JudgeSpec) -> Judgment:
    question = asked.question
    verdict = cache.get(asked.key) or Verdict(judge=spec.model, failed=NOT_ASKED)
    if question.settled is not None:
        verdict = Verdict(judge=RULE, answer=question.settled)
    return Judgment(
        id=question.id,
        sample=question.sample,
        kind=question.kind,
        order=question.order,
        repeat=question.repeat,
        key=asked.key,
        **asdict(verdict),
    )


def _record(
    spec: JudgeSpec, cache: Cache, evaluations: list[Judged], verdicts: dict[str, dict[str, Answer]]
) -> dict[str, Any]:
    judgments: dict[str, list[Judgment]] = {}
    words: dict[str, dict[str, int]] = {}
    for evaluation in evaluations:
        name = evaluation.planned.name
        judgments.setdefault(name, []).extend(
            replace(each, id=f"{evaluation.setting}/{each.id}", sample=f"{evaluation.setting}/{each.sample}")
            for each in evaluation.store.judgments()
        )
        lengths = {f"{evaluation.setting}/{s.id}": len((s.output or "").split()) for s in evaluation.samples}
        words.setdefault(name, {}).update(lengths)
    everything = [judgment for found in judgments.values() for judgment in found]
    failed = Counter(judgment.failed.partition(": ")[0] for judgment in everything if judgment.failed is not None)
    prompt_tokens, output_tokens = cache.used()
    return {
        "judge": spec.model_dump(mode="json"),
        "identity": spec.identity(),
        "versions": sorted({verdict.judge for verdict in cache.of_this_judge()}),
        "prompts": sorted({asked.question.template for e in evaluations for asked in e.questions}),
        "judgments": len(everything),
        "by_rule": sum(judgment.judge == RULE for judgment in everything),
        "failed": dict(failed),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "usd": spec.usd(prompt_tokens, output_tokens),
        "calibration": {
            name: trust.table(found, words[name], verdicts.get(name, {})) for name, found in judgments.items()
        },
    }


def reference_verdicts(spec: JudgeSpec) -> dict[str, dict[str, Answer]]:
    """suite -> "SETTING/QUESTION" -> answer, from the file of the spec."""
    found: dict[str, dict[str, Answer]] = {}
    if spec.verdicts is not None and not Path(spec.verdicts).is_file():
        raise ConfigError(
            f"no file of verdicts {spec.verdicts}.", "Rows of suite, setting, id, answer; see docs/judge.md."
        )
    if spec.verdicts is not None:
        for number, row in read_jsonl(Path(spec.verdicts)):
            try:
                found.setdefault(row["suite"], {})[f"{row['setting']}/{row['id']}"] = dict(row["answer"])
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"line {number} of {spec.verdicts} is no verdict: {error!r}.",
                    'Expected {"suite": ..., "setting": ..., "id": ..., "answer": {...}}, as in judgments.jsonl.',
                ) from error
    return found
