"""Carry out what a run directory does not hold yet. Safe to kill and call again."""

import gc
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kick import checkpoint as checkpoints
from kick.checkpoint import Checkpoint
from kick.compress import compress
from kick.errors import CheckpointError, KickError
from kick.lm import load_lm
from kick.lm.parity import Answers, ask, compare
from kick.lm.spec import LMSpec
from kick.progress import Progress
from kick.settings import DENSE, Setting
from kick.spec import distinct
from kick.sweep.clock import COMPRESS, Clock
from kick.sweep.evaluate import evaluate
from kick.sweep.plan import Plan, PlannedSuite, lms
from kick.sweep.store import Store


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
    units = Counter({COMPRESS: len(missing)})
    for suites in missing.values():
        units.update({suite.name: len(suite.examples) for suite in suites})
    total = len(plan.settings) * len(plan.suites)
    summary = Summary(evaluations=total, already=total - sum(map(len, missing.values())))
    clock = Clock(progress, units)
    workshop = Workshop(plan, store, clock)

    def failed(setting: Setting, suite: PlannedSuite, error: Exception) -> None:
        reason = str(error) if isinstance(error, KickError) else f"{type(error).__name__}: {error}"
        summary.failed[f"{setting.name} on {suite.name}"] = reason
        progress.note(f"failed: {setting.name} on {suite.name}: {reason}")
        if debug:
            progress.note("".join(traceback.format_exception(error)))
        result = {"key": plan.key(setting, suite), "status": "failed", "reason": reason}
        store.evaluation(setting.name, suite.name).finish(result)

    if missing:
        check_parity(plan, store, workshop)
    for setting in plan.settings:
        suites = missing.get(setting.name, [])
        for spec in lms_of(plan, setting, suites):
            own = [suite for suite in suites if plan.lm_of(setting, suite) == spec]
            try:
                path = workshop.checkpoint(setting).path
                lm = load_lm(spec, path, plan.dtype_of(setting), plan.device, setting.name)
            except Exception as error:  # whatever a compressor does wrong costs its own setting only
                for suite in own:
                    failed(setting, suite, error)
                continue
            for suite in own:
                clock.start(f"{setting.name}: {suite.name}", suite.name, len(suite.examples))
                try:
                    evaluation = store.evaluation(setting.name, suite.name)
                    evaluate(
                        lm,
                        workshop.dense_lm(setting, suite, lm) if suite.suite.needs_dense else None,
                        suite,
                        evaluation,
                        plan.key(setting, suite),
                        spec.batch_size,
                        clock,
                    )
                    summary.done += 1
                except Exception as error:  # likewise for a suite
                    failed(setting, suite, error)
                clock.stop()
            workshop.forget_dense()
            lm.close()
            del lm
            gc.collect()
        if suites:
            workshop.finished_with(setting)
    workshop.close()
    return summary


def check_parity(plan: Plan, store: Store, workshop: "Workshop") -> None:
    """Where several LMs answer, whether they say the same of the dense model; once a run, kept in run.json."""
    first, *others = distinct(spec.model_copy(update={"batch_size": 1}) for spec in lms(plan.config))
    if not others or store.parity() is not None:
        return
    asked: list[tuple[LMSpec, Answers | str]] = []
    for spec in (first, *others):  # one after the other: each may want all of a GPU
        try:
            lm = load_lm(spec, workshop.checkpoint(plan.settings[0]).path, plan.dtype, plan.device)
            asked.append((spec, ask(lm)))
            lm.close()
        except KickError as error:  # its evaluations will fail with the same reason, the others need not
            asked.append((spec, error.message))
    rows = []
    for spec, answers in asked[1:]:
        for row in compare(asked[0][1], answers, plan.dtype):
            rows.append({"reference": first.name, "lm": spec.name, "params": spec.params, **row.as_row()})
            if not row.agrees:
                what = row.reason or f"by {row.difference:.3g}"
                workshop.clock.progress.note(f"lm '{spec.name}' disagrees with '{first.name}' on {row.kind}: {what}")
    store.keep_parity(rows)


def lms_of(plan: Plan, setting: Setting, suites: Iterable[PlannedSuite]) -> list[LMSpec]:
    """The LMs that answer `suites` for `setting`: each is loaded once."""
    return distinct(plan.lm_of(setting, suite) for suite in suites)


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


class Workshop:
    """Makes checkpoints when they are needed and clears them away when they are not.

    Every compressor starts from the dense checkpoint: the source in the run's precision, read once.
    """

    def __init__(self, plan: Plan, store: Store, clock: Clock) -> None:
        self.plan, self.store, self.clock = plan, store, clock
        self.checkpoints: dict[str, Checkpoint] = {}
        self.without_dense: Exception | None = None
        self._dense: Any = None

    def checkpoint(self, setting: Setting) -> Checkpoint:
        """The setting's checkpoint: the one on disk if it is whole, else made anew."""
        if self.without_dense is not None:  # nothing can start from it: do not try again for every setting
            raise self.without_dense
        if setting.name not in self.checkpoints:
            try:
                found = self._given() or self._same_as_dense(setting) or self._on_disk(setting) or self._make(setting)
                self._check_same(setting, found)
            except Exception as error:
                self.without_dense = error if setting.name == DENSE else None
                raise
            self.checkpoints[setting.name] = found
            self.store.keep_record(setting.name, found.record)
        return self.checkpoints[setting.name]

    def dense_lm(self, setting: Setting, suite: PlannedSuite, lm: Any) -> Any:
        """The dense model's LM, for suites that ask it beside `setting`: `lm` itself where that is dense."""
        if setting.name == DENSE:
            return lm
        if self._dense is None:
            dense = self.plan.settings[0]  # always first
            spec = self.plan.lm_of(dense, suite)
            self._dense = load_lm(spec, self.checkpoint(dense).path, self.plan.dtype, self.plan.device)
        return self._dense

    def forget_dense(self) -> None:
        """Two models are in memory only while both are asked."""
        if self._dense is not None:
            self._dense.close()
        self._dense = None

    def _given(self) -> Checkpoint | None:
        given = self.plan.given
        if given is not None and (problems := checkpoints.verify(given)):
            raise CheckpointError(f"{given.path} is not what its record says: {problems[0]}.", "Compress again.")
        return given

    def _same_as_dense(self, setting: Setting) -> Checkpoint | None:
        """A variant of dense is the dense model, asked in another way."""
        return self.checkpoint(self.plan.settings[0]) if setting.is_dense and setting.name != DENSE else None

    def _on_disk(self, setting: Setting) -> Checkpoint | None:
        path = self.store.checkpoint_path(setting.name)
        if not (path / checkpoints.RECORD).is_file():
            return None
        try:
            found = checkpoints.read(path)
        except CheckpointError:  # damaged: it is made again
            return None
        return None if checkpoints.verify(found) else found

    def _make(self, setting: Setting) -> Checkpoint:
        start: Path | None = None
        if not setting.is_dense:
            start = self.checkpoint(self.plan.settings[0]).path  # dense is always first
        self.clock.start(f"{setting.name}: {'load' if setting.is_dense else 'compress'}", COMPRESS, 1)
        out = self.store.checkpoint_path(setting.name)
        recipe = self.plan.recipe(setting)
        made = compress(recipe, out, self.clock.show, start, self.plan.calibration)
        self.clock.advance(1)
        return made

    def _check_same(self, setting: Setting, found: Checkpoint) -> None:
        """Answers of one setting must all be of the same weights."""
        before = self.store.record(setting.name)
        if before is not None and before["weights_fingerprint"] != found.fingerprint:
            raise CheckpointError(
                f"{setting.name} came out different from the weights that earlier answers in this folder belong to.",
                "The compressor is not deterministic, or this is another machine. --fresh starts the folder again.",
            )

    def finished_with(self, setting: Setting) -> None:
        if not self.plan.config.keep_checkpoints and not setting.is_dense:
            self.store.drop_checkpoint(setting.name)

    def close(self) -> None:
        """Also what a killed run left behind."""
        if not self.plan.config.keep_checkpoints:
            for setting in self.plan.settings:
                self.store.drop_checkpoint(setting.name)
