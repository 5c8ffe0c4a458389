"""Checkpoints on demand: each is found on disk or made, and must be the one that earlier answers are of."""

from pathlib import Path
from typing import Any

from kick import checkpoint as checkpoints
from kick.checkpoint import Checkpoint
from kick.compress import compress
from kick.errors import CheckpointError
from kick.lm import load_lm
from kick.lm.memory import free_unreferenced
from kick.settings import DENSE, Setting
from kick.sweep.clock import Watch
from kick.sweep.plan import Plan, PlannedSuite
from kick.sweep.store import Store


class Workshop:
    """Makes the checkpoints of a run.

    Every compressor starts from the dense checkpoint: the source in the run's precision, read once.
    """

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.checkpoints: dict[str, Checkpoint] = {}
        self.without_dense: Exception | None = None
        self._dense: Any = None

    def checkpoint(self, setting: Setting, watch: Watch) -> Checkpoint:
        """The setting's checkpoint: the one on disk if it is whole, else made anew."""
        if self.without_dense is not None:  # nothing can start from it: do not try again for every setting
            raise self.without_dense
        if setting.name not in self.checkpoints:
            try:
                found = self._given() or self._same_as_dense(setting, watch) or self._on_disk(setting)
                found = found or self._make(setting, watch)
                self._check_same(setting, found)
            except Exception as error:
                if setting.name == DENSE:
                    self.without_dense = error
                raise
            self.checkpoints[setting.name] = found
            self.store.keep_record(setting.name, found.record)
            self.store.keep_training(setting.name, found.path)
        return self.checkpoints[setting.name]

    def begin(self) -> None:
        """A new work: what could not be made for the last one is tried again."""
        self.without_dense = None

    def dense_lm(self, setting: Setting, suite: PlannedSuite, lm: Any, watch: Watch) -> Any:
        """The dense model's LM, for suites that ask it beside `setting`: `lm` itself where that is dense."""
        if setting.name == DENSE:
            return lm
        if self._dense is None:
            spec = self.plan.lm_of(self.plan.dense, suite)
            self._dense = load_lm(spec, self._dense_checkpoint(watch).path, self.plan.dtype, self.plan.device)
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

    def _same_as_dense(self, setting: Setting, watch: Watch) -> Checkpoint | None:
        """A variant of dense is the dense model, asked in another way."""
        if setting.is_dense and setting.name != DENSE:
            return self._dense_checkpoint(watch)
        return None

    def _dense_checkpoint(self, watch: Watch) -> Checkpoint:
        """For another setting: where it is not there yet, whoever comes first makes it and the others wait."""
        if DENSE in self.checkpoints or self.store.has_checkpoint(DENSE):
            return self.checkpoint(self.plan.dense, watch)
        with self.store.alone_with(DENSE):
            return self.checkpoint(self.plan.dense, watch)

    def _on_disk(self, setting: Setting) -> Checkpoint | None:
        if not self.store.has_checkpoint(setting.name):
            return None
        try:
            found = checkpoints.read(self.store.checkpoint_path(setting.name))
        except CheckpointError:  # damaged: it is made again
            return None
        return None if checkpoints.verify(found) else found

    def _make(self, setting: Setting, watch: Watch) -> Checkpoint:
        start: Path | None = None
        if not setting.is_dense:
            start = self._dense_checkpoint(watch).path
        watch.make(setting.name, "load" if setting.is_dense else "compress")
        out = self.store.checkpoint_path(setting.name)
        recipe = self.plan.recipe(setting)
        made = compress(recipe, out, watch.show, start, self.plan.calibration_of(setting))
        free_unreferenced(self.plan.device)
        watch.made()
        return made

    def _check_same(self, setting: Setting, found: Checkpoint) -> None:
        """Answers of one setting must all be of the same weights."""
        before = self.store.record(setting.name)
        if before is not None and before["weights_fingerprint"] != found.fingerprint:
            raise CheckpointError(
                f"{setting.name} came out different from the weights that earlier answers in this folder belong to.",
                "The compressor is not deterministic, or this is another machine or number of threads. Delete "
                f"{self.store.setting_path(setting.name)} to have this setting asked anew.",
            )
