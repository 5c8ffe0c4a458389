"""The interface of executors: works are handed in, and it is said which have ended."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from kick import devices
from kick.errors import ConfigError
from kick.settings import DENSE
from kick.sweep.clock import Watch
from kick.sweep.executors.spec import ExecutorSpec
from kick.sweep.plan import Plan
from kick.sweep.store import Store
from kick.sweep.work import Work


class Ended(NamedTuple):
    """A work that is over.

    died: how its process came to an end, where it did not get to the work's. refused: why what it found was not taken.
    """

    work: Work
    died: str | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Job:
    """All that a process has to know to do works of a run. Crosses as JSON.

    plugins: files given by --plugin. identity: of the plan that the process must come to as well.
    """

    root: str
    config: dict[str, Any]
    plugins: list[str]
    identity: dict[str, Any]
    timeout: float | None = None
    debug: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Executor(ABC):
    """Carries works out somewhere."""

    slots: int
    """How many works can be under way at once."""

    sees_weights = True
    """Whether checkpoints of works under way are seen from here, so that it is known what a death interrupted."""

    apart = False
    """Whether works were done where the run directory is not seen: their checkpoints never come here."""

    def __init__(self, plan: Plan, store: Store, job: Job, watch: Callable[[], Watch]) -> None:
        """watch: makes one for a work, to be told what it is at, where that can be seen from here."""
        self.plan, self.store, self.job, self.watch = plan, store, job, watch

    @classmethod
    def check(cls, spec: ExecutorSpec) -> None:
        """Raise ConfigError for parameters that can be seen to be wrong before anything is begun."""
        if spec.params:
            raise ConfigError(f"the executor '{spec.name}' takes no params.", "Those of ray and slurm do.")

    @classmethod
    def check_here(cls, spec: ExecutorSpec) -> None:
        """Raise KickError where this machine cannot begin works; asked before a folder is begun."""
        del spec

    @classmethod
    def device(cls, spec: ExecutorSpec, asked: str) -> str:
        """What works compute on, `auto` decided. Raises ConfigError for a device that cannot be used."""
        del spec
        return devices.choose_device(asked)

    @classmethod
    def works_here(cls, plan: Plan) -> int:
        """How many works of `plan` this machine carries out at once; 0 where they are carried out elsewhere."""
        del plan
        return 0

    def has_weights(self, work: Work, answered: bool) -> bool:
        """Whether a work that died had its checkpoint by then, so that it was answering. answered: something."""
        is_dense = next(setting.is_dense for setting in self.plan.settings if setting.name == work.setting)
        return self.store.has_checkpoint(DENSE if is_dense else work.setting) or (self.apart and answered)

    @abstractmethod
    def submit(self, work: Work) -> None:
        """Begin `work`. Called only while fewer than `slots` works are under way."""

    @abstractmethod
    def wait(self, seconds: float) -> list[Ended]:
        """The works that ended since the last call, as soon as there is one, or none after `seconds`."""

    @abstractmethod
    def close(self) -> None:
        """End what is under way, and give back what was taken."""
