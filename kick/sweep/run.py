"""Carry out what a run directory does not hold yet. Safe to kill and call again.

The unit of work is a setting with the suites that it owes, so that a model is made and loaded once for all of them.
An executor (kick.sweep.executors) carries works out; what came of them is read from the run directory. A process
that died costs the evaluation that it was at: it is tried again with smaller batches, a bounded number of times.
"""

import shutil
from collections import Counter, deque
from dataclasses import dataclass, field

from kick import checkpoint as checkpoints
from kick import plugins
from kick.errors import RunError
from kick.progress import Progress
from kick.settings import DENSE, Setting
from kick.sweep.clock import COMPRESS, Clock
from kick.sweep.executors import find_executor
from kick.sweep.executors.base import Ended, Executor, Job
from kick.sweep.plan import Plan, PlannedSuite, lms
from kick.sweep.store import Store
from kick.sweep.work import Owed, Work, lms_of, record_failure

_LOOK_AGAIN = 0.5  # seconds, while the dense checkpoint is awaited


@dataclass
class Summary:
    """What a call of `run` found and did. failed: evaluation -> reason."""

    evaluations: int
    already: int
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def run(plan: Plan, store: Store, progress: Progress, debug: bool = False) -> Summary:
    """Compress and evaluate every setting that is not complete. A failing one is recorded and the rest goes on."""
    missing = missing_evaluations(plan, store)
    total = len(plan.settings) * len(plan.suites)
    summary = Summary(evaluations=total, already=total - sum(map(len, missing.values())))
    if missing:
        units = Counter({COMPRESS: len(missing)})
        for suites in missing.values():
            units.update({suite.name: len(suite.examples) for suite in suites})
        clock = Clock(progress, units)
        spec = plan.config.executor
        config = plan.config.model_dump(mode="json")
        job = Job(str(store.root.resolve()), config, plugins.files(), plan.identity, spec.timeout, debug)
        _check_room(plan, store)
        executor = find_executor(spec)(plan, store, job, clock.lane)
        try:
            _Scheduler(plan, store, executor, progress, summary).run(missing)
        finally:
            executor.close()
    if not plan.config.keep_checkpoints:
        for setting in plan.settings:  # also what a killed run left behind
            store.drop_checkpoint(setting.name)
    return summary


def _check_room(plan: Plan, store: Store) -> None:
    """Raise RunError where not even the dense checkpoint and one compressed beside it fit onto the disk."""
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[plan.dtype]
    needed = 2 * plan.parameters * width
    free = shutil.disk_usage(store.root).free
    if plan.given is None and free < needed:
        raise RunError(
            f"{store.root} has {free / 1e9:.2f} GB of free disk; two checkpoints take {needed / 1e9:.2f} GB.",
            "Free some space, or choose an --out on another disk.",
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

    def __init__(self, plan: Plan, store: Store, executor: Executor, progress: Progress, summary: Summary) -> None:
        self.plan, self.store, self.executor = plan, store, executor
        self.progress, self.summary = progress, summary
        self.settings = {setting.name: setting for setting in plan.settings}
        self.suites = {suite.name: suite for suite in plan.suites}
        self.deaths: Counter[tuple[str, str]] = Counter()  # (setting, suite) -> tries that ended badly
        self.waiting: deque[Work] = deque()

    def run(self, missing: dict[str, list[PlannedSuite]]) -> None:
        """All works to their end: first the dense model's, whose checkpoint the others start from."""
        for name, suites in missing.items():
            for suite in suites:  # what failed in an earlier call counts as not tried
                self.store.evaluation(name, suite.name).forget_failure()
        works = [self._work(self.settings[name], suites) for name, suites in missing.items()]
        if works[0].setting != DENSE and self._needs_dense():
            works.insert(0, Work(DENSE, ()))
        self.waiting.extend(works)
        dense_under_way = works[0].setting == DENSE
        under_way = 0
        while self.waiting or under_way:
            held_back = dense_under_way and under_way and not self._dense_is_there()
            if self.waiting and under_way < self.executor.slots and not held_back:
                self.executor.submit(self.waiting.popleft())
                under_way += 1
            else:
                for ended in self.executor.wait(_LOOK_AGAIN):
                    under_way -= 1
                    dense_under_way = dense_under_way and ended.work.setting != DENSE
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

    def _needs_dense(self) -> bool:
        """Whether there is something to be done with the dense model although it has answered everything."""
        given = self.plan.given is not None
        return not given and (
            not self._dense_is_there() or (len(lms(self.plan.config)) > 1 and self.store.parity() is None)
        )

    def _dense_is_there(self) -> bool:
        return (self.store.checkpoint_path(DENSE) / checkpoints.RECORD).is_file()

    def _settle(self, ended: Ended) -> None:
        """Count what a work did; what it did not live to do, or had no memory for, is put in front of the queue."""
        setting = self.settings[ended.work.setting]
        again: list[PlannedSuite] = []
        at_fault: list[PlannedSuite] = []
        for name, _ in ended.work.owed:
            suite = self.suites[name]
            result = self.store.evaluation(setting.name, name).result()
            if result is None:
                again.append(suite)
            elif result["status"] == "failed" and result.get("out_of_memory"):
                at_fault.append(suite)
        died = ended.died or "it ended without a result"
        if again:  # the first of them was under way, or all of them wait for a checkpoint that was
            made = (self.store.checkpoint_path(setting.name) / checkpoints.RECORD).is_file()
            at_fault += again[:1] if made else again
        for suite in at_fault:
            self.deaths[setting.name, suite.name] += 1
            tries = self.deaths[setting.name, suite.name]
            own = self.store.evaluation(setting.name, suite.name)
            result = own.result()
            if tries <= self.plan.config.executor.retries:
                if result is not None:
                    own.forget_failure()
                    again.append(suite)
            elif result is None:
                times = f" ({tries} times)" if tries > 1 else ""
                record_failure(self.plan, self.store, setting, suite, f"its process died{times}: {died}")
                again.remove(suite)
        for suite in at_fault if again else []:
            self.progress.note(f"trying again: {setting.name} on {suite.name}: {died}")
        self._count(setting, [self.suites[name] for name, _ in ended.work.owed if self.suites[name] not in again])
        if again:
            self.waiting.appendleft(self._work(setting, again))
        elif not setting.is_dense:
            self._clear_away(setting)

    def _clear_away(self, setting: Setting) -> None:
        config = self.plan.config
        if not config.keep_checkpoints:
            self.store.drop_checkpoint(setting.name)
        elif config.disk_budget_gb is not None:
            self.store.trim_checkpoints(1e9 * config.disk_budget_gb, spare=DENSE)

    def _count(self, setting: Setting, settled: list[PlannedSuite]) -> None:
        for suite in settled:
            result = self.store.evaluation(setting.name, suite.name).result()
            assert result is not None
            if result["status"] == "complete":
                self.summary.done += 1
            else:
                self.summary.failed[f"{setting.name} on {suite.name}"] = result["reason"]
                self.progress.note(f"failed: {setting.name} on {suite.name}: {result['reason']}")
