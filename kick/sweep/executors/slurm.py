"""Works as Slurm jobs, through submitit. The run directory is on a file system that the nodes share.

Parameters are submitit's: `timeout_min`, `mem_gb`, `cpus_per_task`, `gpus_per_node`, `slurm_partition`,
`slurm_account`, `slurm_additional_parameters` and so on; `cluster: local` runs the same jobs on this machine. Job
scripts and their output are in slurm/ of the run directory.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from shutil import which
from typing import Any

from kick.errors import ConfigError, RunError, on_one_line
from kick.extras import import_extra
from kick.sweep.clock import Watch
from kick.sweep.executors.base import Ended, Executor, Job
from kick.sweep.executors.elsewhere import carry_out_whole, count, device_elsewhere, leave_mark
from kick.sweep.executors.spec import ExecutorSpec
from kick.sweep.plan import Plan, gpus_each
from kick.sweep.store import Store
from kick.sweep.work import Work

_LOOK_EVERY = 0.2  # seconds; submitit itself asks Slurm less often
_CLUSTER = "slurm"
_QUEUED = 64  # jobs that Slurm is given at once; sites limit how many may wait
_DEFAULTS = {"timeout_min": 24 * 60}
_PAUSES = (1.0, 5.0, 25.0)  # seconds, before a job that was not taken is handed in again


def _gpus(params: Mapping[str, Any]) -> Any:
    """What is said of GPUs, in any of the ways in which Slurm takes it; None where nothing is."""
    given = {key.removeprefix("slurm_").replace("-", "_"): value for key, value in params.items()}
    more = given.get("additional_parameters") or {}
    given |= {key.replace("-", "_"): value for key, value in more.items()}
    said = [given[key] for key in ("gpus", "num_gpus", "gpus_per_node", "gpus_per_task") if given.get(key) is not None]
    resources = given.get("gres")
    if resources is not None:
        said.append("gpu" in str(resources))
    return next(iter(said), None)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What submitit says of parameters, which it asserts in part and warns of in part, as a ConfigError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*deprecated", category=UserWarning)
            yield
    except (AssertionError, RuntimeError, ValueError, NameError, TypeError, UserWarning) as error:
        raise ConfigError(
            f"executor 'slurm': {on_one_line(error)}", "Parameters are submitit's; see docs/clusters.md."
        ) from error


class Slurm(Executor):
    def __init__(self, plan: Plan, store: Store, job: Job, watch: Callable[[], Watch]) -> None:
        super().__init__(plan, store, job, watch)
        submitit = import_extra("submitit", "slurm", "the executor 'slurm'")
        spec = plan.config.executor
        params = {**_DEFAULTS, **spec.params}
        if plan.device.startswith("cuda") and _gpus(params) is None:
            params["gpus_per_node"] = gpus_each(plan)
        self.slots = spec.workers if spec.workers != "auto" else _QUEUED
        with _clear_errors():
            cluster = params.pop("cluster", _CLUSTER)
            self._executor = submitit.AutoExecutor(folder=store.root / "slurm" / "%j", cluster=cluster)
            self._executor.update_parameters(**params)
        self._mark = leave_mark(store.root)
        self._jobs: list[tuple[Any, Work, Watch]] = []
        self._waiting: deque[Work] = deque()  # what Slurm did not take yet

    @classmethod
    def check(cls, spec: ExecutorSpec) -> None:
        """By submitit, where it is installed: a plan may be made on a machine that never submits."""
        if find_spec("submitit") is None:
            return
        import submitit

        params = dict(spec.params)
        cluster = params.pop("cluster", _CLUSTER)
        with _clear_errors():
            if cluster not in (known := submitit.core.plugins.get_executors()):
                raise ValueError(f"cluster: {cluster!r} is none of {', '.join(known)}")
            # takes the parameters of all clusters, and starts nothing
            submitit.AutoExecutor(folder="never-made", cluster="debug").update_parameters(**params)

    @classmethod
    def check_here(cls, spec: ExecutorSpec) -> None:
        import_extra("submitit", "slurm", "the executor 'slurm'")
        if spec.params.get("cluster", _CLUSTER) == _CLUSTER and which("sbatch") is None:
            raise ConfigError(
                "executor 'slurm': there is no sbatch on this machine.",
                "Run it where jobs are submitted from, or try the jobs here with params: {cluster: local}.",
            )

    @classmethod
    def device(cls, spec: ExecutorSpec, asked: str) -> str:
        return device_elsewhere(asked, _gpus(spec.params))

    def submit(self, work: Work) -> None:
        """Raises RunError where Slurm takes no job at all; while others are under way, what it does not take waits."""
        self._waiting.append(work)
        if len(self._waiting) == 1:  # else it takes none now
            self._hand_in()

    def _hand_in(self) -> None:
        """Give Slurm what waits, as long as it takes it: a site may limit how many jobs there are at a time."""
        pauses = iter(_PAUSES)
        while self._waiting:
            work = self._waiting[0]
            try:
                job = self._executor.submit(carry_out_whole, self.job.to_json(), work.to_json(), self._mark)
            except (RuntimeError, OSError) as error:
                if self._jobs:  # tried again once one of these has ended
                    return
                pause = next(pauses, None)
                if pause is None:
                    said = on_one_line(error, most=300)
                    raise RunError(f"Slurm takes no job: {said}", "Try the same with sbatch.") from error
                time.sleep(pause)
            else:
                self._jobs.append((job, self._waiting.popleft(), self.watch()))

    def wait(self, seconds: float) -> list[Ended]:
        until = time.monotonic() + seconds
        while True:
            done = [entry for entry in self._jobs if entry[0].done()]
            if done or time.monotonic() > until:
                break
            time.sleep(_LOOK_EVERY)
        self._jobs = [entry for entry in self._jobs if entry not in done]
        if done:
            self._hand_in()
        return [self._end(*entry) for entry in done]

    def _end(self, job: Any, work: Work, watch: Watch) -> Ended:
        for name, _ in work.owed:
            count(watch, self.plan, work, name)
        if error := job.exception():  # the job was killed, or its node is gone
            return Ended(work, f"job {job.job_id} {job.state}: {on_one_line(error, most=300)}")
        refusals = [came.take(self.store) for came in job.result()]
        return Ended(work, refused=next(filter(None, refusals), None))

    def close(self) -> None:
        for job, _, _ in self._jobs:
            with suppress(Exception):  # it may have ended by itself
                job.cancel()
        self._jobs.clear()
