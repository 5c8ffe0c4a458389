"""One work of a sweep: a setting is compressed and asked the suites that it owes. The same code wherever it runs.

What comes of it is on disk: scores.json of each evaluation, complete or failed with its reason. A process that dies in
the middle leaves the evaluations before it complete; the one under way is the first without a scores.json.
"""

import faulthandler
import gc
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TextIO

import torch

from kick.checkpoint import Checkpoint
from kick.errors import EngineError, KickError
from kick.files import stop_if_full
from kick.lm import load_lm
from kick.lm.memory import is_out_of_memory
from kick.lm.parity import Answers, ask, compare, lead_of, no_answers
from kick.lm.spec import LMSpec
from kick.settings import DENSE, Setting
from kick.spec import distinct
from kick.sweep.clock import Watch
from kick.sweep.evaluate import evaluate
from kick.sweep.plan import Plan, PlannedSuite, lms
from kick.sweep.store import Store
from kick.sweep.workshop import Workshop


class Owed(NamedTuple):
    """A suite to be answered. halvings: how often its batches are halved, because larger ones did not go well."""

    suite: str
    halvings: int = 0


@dataclass(frozen=True)
class Work:
    """What one setting owes, in the order in which it is answered. Without suites only its checkpoint is made."""

    setting: str
    owed: tuple[Owed, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Work":
        return cls(row["setting"], tuple(Owed(*owed) for owed in row["owed"]))


@dataclass(frozen=True)
class Rules:
    """How evaluations are carried out. timeout: seconds, after which the process ends itself (into `log`)."""

    timeout: float | None = None
    debug: bool = False
    log: TextIO | None = None

    @property
    def limited(self) -> bool:
        return self.timeout is not None and self.log is not None


def carry_out(workshop: Workshop, work: Work, watch: Watch, rules: Rules) -> Iterator[str]:
    """Do `work`, and name each suite once its evaluation has ended.

    What fails is recorded and the rest goes on, unless nothing can be recorded: then RunError.
    """
    workshop.begin()
    with workshop.store.alone_with(work.setting):
        yield from _AtWork(workshop, work, watch, rules).suites()


class _AtWork:
    """A work that is being done: what all its suites have in common."""

    def __init__(self, workshop: Workshop, work: Work, watch: Watch, rules: Rules) -> None:
        self.workshop, self.watch, self.rules = workshop, watch, rules
        self.plan, self.store = workshop.plan, workshop.store
        self.setting = next(setting for setting in self.plan.settings if setting.name == work.setting)
        self.halvings = dict(work.owed)

    def suites(self) -> Iterator[str]:
        by_name = {suite.name: suite for suite in self.plan.suites}
        suites = [by_name[name] for name in self.halvings]
        if self.setting.name == DENSE:
            check_parity(self.workshop, self.watch, self.rules)
        with _limited(self.rules):
            if not suites:
                try:
                    self._checkpoint()
                except Exception as error:  # told again by each evaluation that needs it
                    stop_if_full(error)
        for spec in lms_of(self.plan, self.setting, suites):
            left = deque(suite for suite in suites if self.plan.lm_of(self.setting, suite) == spec)
            while left:  # once, unless an engine ends under a suite
                yield from self._ask(spec, left)

    def _ask(self, spec: LMSpec, left: deque[PlannedSuite]) -> Iterator[str]:
        """Ask one LM the suites that are `left`, as long as it lives."""
        try:
            with _limited(self.rules):
                path = self._checkpoint().path
                lm = load_lm(spec, path, self.plan.dtype_of(self.setting), self.plan.device, self.setting.name)
        except Exception as error:  # whatever a compressor does wrong costs its own setting only
            while left:
                suite = left.popleft()
                self.watch.ask(self.setting.name, suite.name, len(suite.examples))
                self._failed(suite, error)
                self.watch.stop()
                yield suite.name
            return
        with closing(lm):
            lives = True
            while left and lives:
                suite = left.popleft()
                try:
                    with _limited(self.rules):
                        self._evaluate(lm, spec, suite)
                except Exception as error:  # likewise for a suite
                    self._failed(suite, error)
                    lives = not isinstance(error, EngineError)
                self.watch.stop()
                yield suite.name
        self.workshop.forget_dense()
        del lm
        gc.collect()

    def _checkpoint(self) -> Checkpoint:
        return self.workshop.checkpoint(self.setting, _Moving(self.watch, self.rules))

    def _evaluate(self, lm: Any, spec: LMSpec, suite: PlannedSuite) -> None:
        dense = self.workshop.dense_lm(self.setting, suite, lm, self.watch) if suite.suite.needs_dense else None
        self.watch.ask(self.setting.name, suite.name, len(suite.examples))
        evaluate(
            lm,
            dense,
            suite,
            self.store.evaluation(self.setting.name, suite.name),
            self.plan.key(self.setting, suite),
            max(1, suite.suite.at_once(spec.batch_size) >> self.halvings[suite.name]),
            self.watch,
        )

    def _failed(self, suite: PlannedSuite, error: Exception) -> None:
        """Record why an evaluation could not be done; where nothing more can be done in this process, end it."""
        stop_if_full(error)
        if not isinstance(error, KickError) and not _still_computes(self.plan.device):
            raise error
        reason = str(error) if isinstance(error, KickError) else f"{type(error).__name__}: {error}"
        if self.rules.debug:
            self.watch.note("".join(traceback.format_exception(error)))
        may_go = is_out_of_memory(error) or isinstance(error, EngineError)
        record_failure(self.plan, self.store, self.setting, suite, reason, may_go)


@contextmanager
def _limited(rules: Rules) -> Iterator[None]:
    """What takes longer than the timeout ends the process, whatever it hangs in, and leaves where that was in the log.

    A process that has nobody to start it again has no log to leave that in, and is not ended.
    """
    if not rules.limited:
        yield
        return
    _start_timeout(rules)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _start_timeout(rules: Rules) -> None:
    """From now on; the one before counts no more."""
    if rules.limited:
        assert rules.timeout is not None
        assert rules.log is not None
        faulthandler.dump_traceback_later(rules.timeout, exit=True, file=rules.log)


class _Moving:
    """A watch of what may take hours, as training does: whenever something is shown, the timeout starts again."""

    def __init__(self, watch: Watch, rules: Rules) -> None:
        self._watch, self._rules = watch, rules
        self.make, self.made, self.ask = watch.make, watch.made, watch.ask
        self.skip, self.advance, self.stop, self.note = watch.skip, watch.advance, watch.stop, watch.note

    def show(self, done: int, total: int, what: str, detail: str = "") -> None:
        _start_timeout(self._rules)
        self._watch.show(done, total, what, detail)


def _still_computes(device: str) -> bool:
    """Some errors, such as an illegal access, leave a GPU of no use to the process that met them."""
    if not device.startswith("cuda"):
        return True
    try:
        return torch.zeros(1, device=device).add(1).item() == 1
    except Exception as error:  # a broken context makes every later call fail, whatever the error
        return is_out_of_memory(error)  # that another process has the memory breaks nothing


def record_failure(
    plan: Plan, store: Store, setting: Setting, suite: PlannedSuite, reason: str, may_go: bool = False
) -> None:
    """may_go: with smaller batches, or a new engine."""
    result: dict[str, Any] = {"key": plan.key(setting, suite), "status": "failed", "reason": reason}
    if may_go:
        result["try_again"] = True
    try:
        store.evaluation(setting.name, suite.name).finish(result)
    except OSError as error:
        stop_if_full(error)
        raise


def check_parity(workshop: Workshop, watch: Watch, rules: Rules) -> None:
    """Where several LMs answer, whether they say the same of the dense model; once a run, kept in run.json.

    Each may take as long as an evaluation.
    """
    plan, store = workshop.plan, workshop.store
    if knows_parity(plan, store):
        return
    first, *others = _compared(plan)
    asked: list[Answers] = []
    leads: list[float | None] = [None] * len(others)
    for spec in (*others, first):  # one after the other: each may want all of a GPU
        try:
            with _limited(rules):
                path = workshop.checkpoint(plan.dense, _Moving(watch, rules)).path
                lm = load_lm(spec, path, plan.dtype, plan.device)
                with closing(lm):
                    answers = ask(lm)
                    if spec is first:
                        leads = [lead_of(lm, answers, theirs) for theirs in asked]
                    asked.append(answers)
                del lm
        except Exception as error:  # its evaluations will fail with the same reason, the others need not
            stop_if_full(error)
            told = error if isinstance(error, KickError) else KickError(f"{type(error).__name__}: {error}")
            asked.append(no_answers(told))
    rows = []
    for spec, answers, by in zip(others, asked[:-1], leads, strict=True):
        for row in compare(asked[-1], answers, plan.dtype, by):
            rows.append({"reference": first.name, "lm": spec.name, "params": spec.params, **row.as_row()})
            if not row.agrees:
                what = row.reason or f"by {row.difference:.3g}"
                watch.note(f"lm '{spec.name}' disagrees with '{first.name}' on {row.kind}: {what}")
    store.keep_parity(rows)


def knows_parity(plan: Plan, store: Store) -> bool:
    """Whether there is nothing to compare any more: a run that is extended may bring another LM."""
    rows = store.parity() or []
    return all(any((row["lm"], row["params"]) == (own.name, own.params) for row in rows) for own in _compared(plan)[1:])


def _compared(plan: Plan) -> list[LMSpec]:
    return distinct(spec.model_copy(update={"batch_size": 1}) for spec in lms(plan.config))


def lms_of(plan: Plan, setting: Setting, suites: Iterable[PlannedSuite]) -> list[LMSpec]:
    """The LMs that answer `suites` for `setting`: each is loaded once."""
    return distinct(plan.lm_of(setting, suite) for suite in suites)
