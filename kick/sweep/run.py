"""Carry out what a run directory does not hold yet. Safe to kill and call again.

The unit of work is a setting with the suites that it owes, so that a model is made and loaded once for all of them.
An executor (kick.sweep.executors) carries works out; what came of them is read from the run directory. A process
that died costs the evaluation that it was at: it is tried again with smaller batches, a bounded number of times. One
that died while it compressed is started again as it was, as often.
"""

import shutil
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from kick import checkpoint as checkpoints
from kick import plugins
from kick.errors import CheckpointError, RunError
from kick.progress import Display
from kick.settings import DENSE, Setting
from kick.sweep.clock import Clock
from kick.sweep.costs import checkpoint_bytes, training_seconds
from kick.sweep.executors import find_executor
from kick.sweep.executors.base import Ended, Executor, Job
from kick.sweep.plan import Plan, PlannedSuite
from kick.sweep.store import Store
from kick.sweep.work import Owed, Work, knows_parity, lms_of, record_failure

_NOTHING_CAME = "it ended without a result"
_LOOK_AGAIN = 0.5  # seconds, while the dense checkpoint is awaited


@dataclass
class Summary:
    """What a call of `run` found and did. failed: evaluation -> reason."""

    evaluations: int
    already: int
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def run(plan: Plan, store: Store, display: Display, debug: bool = False) -> Summary:
    """Compress and evaluate every setting that is not complete. A failing one is recorded and the rest goes on."""
    missing = missing_evaluations(plan, store)
    total = len(plan.settings) * len(plan.suites)
    summary = Summary(evaluations=total, already=total - sum(map(len, missing.values())))
    if missing:
        questions: Counter[str] = Counter()
        for suites in missing.values():
            questions.update({suite.name: len(suite.examples) for suite in suites})
        costs = {name: cost for name, cost in plan.training.items() if name in missing}
        # a GPU is the workers': measuring it from here would hold a part of it
        clock = Clock(display, questions, missing, training_seconds(plan, costs, measured=plan.device == "cpu"))
        spec = plan.config.executor
        config = plan.decided.model_dump(mode="json")
        job = Job(str(store.root.resolve()), config, plugins.files(), plan.identity, spec.timeout, debug)
        kind = find_executor(spec)
        _check_room(plan, store, missing, kind.works_here(plan))
        executor = kind(plan, store, job, clock.lane)
        try:
            _Scheduler(plan, store, executor, clock, summary).run(missing)
        finally:
            executor.close()
    if not plan.config.keep_checkpoints:
        for setting in plan.settings:  # also what a killed run left behind
            store.drop_checkpoint(setting.name)
    elif plan.config.disk_budget_gb is not None:  # it may be smaller than it was
        done = [setting.name for setting in plan.settings if setting.name != DENSE]
        store.trim_checkpoints(1e9 * plan.config.disk_budget_gb, done)
    return summary


def _check_room(plan: Plan, store: Store, missing: Collection[str], workers: int) -> None:
    """Raise RunError where the dense checkpoint and the compressed ones beside it do not fit onto the disk.

    Where works are carried out elsewhere (no workers here) their checkpoints may be, too.
    """
    if plan.given is not None or workers == 0:
        return
    to_make = sum(not store.has_checkpoint(name) for name in missing if name != DENSE)
    needed = (not store.has_checkpoint(DENSE)) * plan.dense_bytes + checkpoint_bytes(plan, to_make, workers)
    free = shutil.disk_usage(store.root).free
    if free < needed:
        raise RunError(
            f"{store.root} has {free / 1e9:.2f} GB of free disk; the checkpoints need {needed / 1e9:.2f} GB.",
            "Free some space, choose an --out on another disk, or keep fewer checkpoints (disk_budget_gb).",
        )


def missing_evaluations(plan: Plan, store: Store) -> dict[str, list[PlannedSuite]]:
    """For each setting the suites that it has not completed; settings with none are left out."""
    missing = {}
    for setting in plan.settings:
        suites = [
            suite
            for suite in plan.suites
            if not store.evaluation(setting.name, suite.name).is_complete(plan.key(setting, suite))
        ]
        if suites:
            missing[setting.name] = suites
    return missing


class _Scheduler:
    """Hands works to an executor, and decides what becomes of those whose process died."""

    def __init__(self, plan: Plan, store: Store, executor: Executor, clock: Clock, summary: Summary) -> None:
        self.plan, self.store, self.executor = plan, store, executor
        self.clock, self.display, self.summary = clock, clock.display, summary
        self.settings = {setting.name: setting for setting in plan.settings}
        self.suites = {suite.name: suite for suite in plan.suites}
        self.deaths: Counter[tuple[str, str]] = Counter()  # (setting, suite) -> tries that ended badly
        self.waiting: deque[Work] = deque()
        self.under_way: list[str] = []  # settings
        self.finished: list[str] = []  # whose checkpoints may go

    def run(self, missing: dict[str, list[PlannedSuite]]) -> None:
        """All works to their end: first the dense model's, whose checkpoint the others start from."""
        for name, suites in missing.items():
            for suite in suites:  # what failed or was damaged counts as not tried
                self.store.evaluation(name, suite.name).forget_result()
        self.finished += [name for name in self.settings if name not in missing and name != DENSE]
        self._drop_damaged_dense()
        self.waiting.extend(self._work(self.settings[name], suites) for name, suites in missing.items())
        if DENSE not in missing and self._needs_dense():
            self.waiting.appendleft(Work(DENSE, ()))
        while self.waiting or self.under_way:
            if self.waiting and len(self.under_way) < self.executor.slots and not self._must_wait_for_dense():
                work = self.waiting.popleft()
                self.under_way.append(work.setting)
                for name, _ in work.owed:  # what an earlier process still wrote
                    self.store.evaluation(work.setting, name).forget_result()
                self.executor.submit(work)
            else:
                for ended in self.executor.wait(_LOOK_AGAIN):
                    self.under_way.remove(ended.work.setting)
                    self._settle(ended)

    def _work(self, setting: Setting, suites: list[PlannedSuite]) -> Work:
        """In the order in which they are answered: an LM is loaded once for all its suites."""
        by_lm = [
            suite
            for spec in lms_of(self.plan, setting, suites)
            for suite in suites
            if self.plan.lm_of(setting, suite) == spec
        ]
        return Work(setting.name, tuple(Owed(suite.name, self.deaths[setting.name, suite.name]) for suite in by_lm))

    # The dense checkpoint

    def _needs_dense(self) -> bool:
        """Whether there is something to be done with the dense model although it has answered everything."""
        if self.plan.given is not None:
            return False
        return not (self.store.has_checkpoint(DENSE) and knows_parity(self.plan, self.store))

    def _must_wait_for_dense(self) -> bool:
        """Whether the dense work is under way, and what it makes for the others is not there yet."""
        return DENSE in self.under_way and not self.store.has_checkpoint(DENSE) and not self.executor.apart

    def _drop_damaged_dense(self) -> None:
        """What lies there is believed while works go on: so it is looked at once before."""
        if self.store.has_checkpoint(DENSE):
            try:
                problems = checkpoints.verify(checkpoints.read(self.store.checkpoint_path(DENSE)))
            except CheckpointError as error:
                problems = [str(error)]
            if problems:
                self.store.drop_checkpoint(DENSE)

    # What became of a work

    def _settle(self, ended: Ended) -> None:
        """Count what a work did; what it did not live to do, or had no memory for, is put in front of the queue."""
        setting = self.settings[ended.work.setting]
        if not ended.work.owed:
            self._settle_checkpoint(ended)
            return
        owed = [self.suites[name] for name, _ in ended.work.owed]
        results = {suite.name: self._result(setting, suite) for suite in owed}
        unanswered = [suite for suite in owed if results[suite.name] is None]
        died = ended.refused or ended.died
        again, at_fault = unanswered[1:], unanswered[:1]  # the first was under way
        made = self.executor.has_weights(ended.work, answered=len(unanswered) < len(owed))
        if unanswered and not made:
            if self.executor.sees_weights:  # nothing was asked yet that smaller batches could help
                again, at_fault = self._after_a_making(ended, setting, unanswered), []
            else:
                again, at_fault = [], unanswered
        at_fault += [suite for suite in owed if (results[suite.name] or {}).get("try_again")]
        for suite in at_fault:
            self.deaths[setting.name, suite.name] += 1
            tries = self.deaths[setting.name, suite.name]
            if tries <= self.plan.config.executor.retries:
                reason = died or (results[suite.name] or {}).get("reason", _NOTHING_CAME)
                self.display.note(f"trying again: {setting.name} on {suite.name}: {reason}")
                again.append(suite)
                self.clock.again(suite.name, len(suite.examples))
            elif results[suite.name] is None:
                record_failure(self.plan, self.store, setting, suite, _in_words(ended, tries))
        self._count(setting, [suite for suite in owed if suite not in again])
        if again:
            self.waiting.appendleft(self._work(setting, [suite for suite in owed if suite in again]))
        elif setting.name == DENSE:
            self._give_up_without_dense(owed)
        else:
            self.finished.append(setting.name)
            self._clear_away(setting)

    def _result(self, setting: Setting, suite: PlannedSuite) -> dict[str, Any] | None:
        """What is known of an evaluation of this plan: a job that outlived another may have left its own."""
        found = self.store.evaluation(setting.name, suite.name).result()
        return found if found is not None and found["key"] == self.plan.key(setting, suite) else None

    def _after_a_making(self, ended: Ended, setting: Setting, suites: list[PlannedSuite]) -> list[PlannedSuite]:
        """It ended while the checkpoint was made: the suites for which that is tried again."""
        self.deaths[setting.name, ""] += 1
        tries = self.deaths[setting.name, ""]
        if tries <= self.plan.config.executor.retries:
            self.display.note(f"trying again: {setting.name}: {ended.refused or ended.died or _NOTHING_CAME}")
            return suites
        for suite in suites:
            record_failure(self.plan, self.store, setting, suite, _in_words(ended, tries))
        return []

    def _settle_checkpoint(self, ended: Ended) -> None:
        """Of the dense model alone. If it is not there, whoever needs it makes it, and records why it cannot."""
        if ended.died is not None:
            self.deaths[DENSE, ""] += 1
            if self.deaths[DENSE, ""] <= self.plan.config.executor.retries:
                self.display.note(f"trying again: the dense model: {ended.died}")
                self.waiting.appendleft(ended.work)

    def _give_up_without_dense(self, owed: list[PlannedSuite]) -> None:
        """Where the dense model could not even be made, neither can anything that starts from it."""
        results = [self._result(self.plan.dense, suite) for suite in owed]
        could_be_made = self.store.has_checkpoint(DENSE) or self.executor.apart or self.plan.given is not None
        if could_be_made or any(result is None or result["status"] != "failed" for result in results):
            return
        reason = f"without the dense model: {(results[0] or {})['reason']}"
        while self.waiting:
            work = self.waiting.popleft()
            setting, suites = self.settings[work.setting], [self.suites[name] for name, _ in work.owed]
            for suite in suites:
                record_failure(self.plan, self.store, setting, suite, reason)
            self._count(setting, suites)

    def _clear_away(self, setting: Setting) -> None:
        config = self.plan.config
        if not config.keep_checkpoints:
            self.store.drop_checkpoint(setting.name)
        elif config.disk_budget_gb is not None:
            self.store.trim_checkpoints(1e9 * config.disk_budget_gb, self.finished)

    def _count(self, setting: Setting, settled: list[PlannedSuite]) -> None:
        for suite in settled:
            result = self._result(setting, suite)
            assert result is not None
            if result["status"] == "complete":
                self.summary.done += 1
            else:
                self.summary.failed[f"{setting.name} on {suite.name}"] = result["reason"]
                self.display.note(f"failed: {setting.name} on {suite.name}: {result['reason']}")


def _in_words(ended: Ended, tries: int) -> str:
    """Why nothing came of a work, in the last of so many tries."""
    times = f" ({tries} times)" if tries > 1 else ""
    if ended.refused is None and ended.died is not None:
        return f"its process died{times}: {ended.died}"
    return f"{ended.refused or _NOTHING_CAME}{times}"
