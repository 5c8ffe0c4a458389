"""What a process away from kick's own knows of a run: the plan, made again from the job, and where to write."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from kick import devices, plugins, sweep_file
from kick.errors import RunError
from kick.settings import DENSE
from kick.sweep.clock import Watch
from kick.sweep.executors.base import Job
from kick.sweep.plan import Plan, make_plan
from kick.sweep.store import Store, differences
from kick.sweep.work import Rules, Work, carry_out
from kick.sweep.workshop import Workshop


@dataclass
class Site:
    """A run as seen from a process that does works of it."""

    plan: Plan
    store: Store
    workshop: Workshop
    rules: Rules

    @classmethod
    def of(cls, job: Job, log: TextIO | None = None) -> "Site":
        """Raises RunError where this process comes to another plan: other versions, other data, another device."""
        for path in job.plugins:
            plugins.load_file(Path(path))
        plan = make_plan(sweep_file.parse(job.config, "the job"), check_overlap=False)
        devices.check_device(plan.device)
        if shown := differences(job.identity, plan.identity):
            raise RunError(
                f"a worker would do something else than this sweep: {shown}.",
                "Install the same versions there, and make models and data readable under the same paths.",
            )
        store = Store(Path(job.root))
        return cls(plan, store, Workshop(plan, store), Rules(job.timeout, job.debug, log))

    def forget(self, setting: str) -> None:
        """Let go of a setting's checkpoint, but of dense, which others start from."""
        if setting != DENSE:
            self.workshop.checkpoints.pop(setting, None)
            self.store.drop_checkpoint(setting)

    def carry_out(self, work: Work, watch: Watch) -> Iterator[str]:
        """Do `work`, and name each suite once its evaluation has ended."""
        return carry_out(self.workshop, work, watch, self.rules)
