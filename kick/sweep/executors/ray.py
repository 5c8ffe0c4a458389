"""Works as tasks of a Ray cluster, which decides where they run; nodes may join and die.

Parameters: `address` of the cluster (by default a new one on this machine, or RAY_ADDRESS); `num_cpus`, `num_gpus`,
`memory` (bytes) and `resources` that one work takes; `runtime_env` as Ray has it.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import Field

from kick.errors import ConfigError, RunError, on_one_line
from kick.extras import import_extra
from kick.spec import Spec, validated
from kick.sweep.clock import Watch
from kick.sweep.costs import worker_bytes
from kick.sweep.executors.base import Ended, Executor, Job
from kick.sweep.executors.elsewhere import Came, carry_out_here, count, device_elsewhere, leave_mark
from kick.sweep.executors.spec import ExecutorSpec
from kick.sweep.plan import Plan, gpus_each
from kick.sweep.store import Store
from kick.sweep.work import Work

_QUEUED = 1000  # works that Ray is given at once; it decides how many run


class Params(Spec):
    address: str | None = None
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float | None = Field(
        default=None, ge=0, description="by default what an LM spreads over, where the sweep runs on CUDA"
    )
    memory: float | None = Field(
        default=None, gt=0, description="bytes; by default what a work takes at most, where it computes on a CPU"
    )
    resources: dict[str, float] = Field(default_factory=dict)
    runtime_env: dict[str, Any] = Field(default_factory=dict)


class _UnderWay(NamedTuple):
    """left: the suites whose results have not come yet."""

    work: Work
    watch: Watch
    left: list[str]


class Ray(Executor):
    sees_weights = False  # nodes may have disks of their own

    def __init__(self, plan: Plan, store: Store, job: Job, watch: Callable[[], Watch]) -> None:
        super().__init__(plan, store, job, watch)
        self._ray = ray = import_extra("ray", "ray", "the executor 'ray'")
        params = parse(plan.config.executor)
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(
                    address=params.address,
                    runtime_env=params.runtime_env or None,
                    log_to_driver=False,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                )
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                said = on_one_line(error, most=300)
                raise ConfigError(f"no Ray cluster at {params.address}: {said}", "`ray status` there?") from error
        gpus = params.num_gpus
        if gpus is None:
            gpus = float(gpus_each(plan) if plan.device.startswith("cuda") else 0)
        options: dict[str, Any] = {"num_cpus": params.num_cpus, "num_gpus": gpus, "max_retries": 0}
        memory = params.memory or (worker_bytes(plan, plan.training) if plan.device == "cpu" else None)
        if memory:
            options["memory"] = int(memory)
        if params.resources:
            options["resources"] = params.resources
        self._task = ray.remote(**options)(carry_out_here)
        workers = plan.config.executor.workers
        self.slots = workers if workers != "auto" else _QUEUED
        self._mark = leave_mark(store.root)
        self._job = ray.put(job.to_json())  # large, and the same for all
        wanted = {"CPU": params.num_cpus, "GPU": gpus, "memory": memory or 0, **params.resources}
        self._note_what_is_missing(ray.cluster_resources(), wanted)
        self._streams: dict[Any, _UnderWay] = {}  # by what Ray gives their results through

    @classmethod
    def check(cls, spec: ExecutorSpec) -> None:
        parse(spec)

    @classmethod
    def check_here(cls, spec: ExecutorSpec) -> None:
        import_extra("ray", "ray", "the executor 'ray'")

    @classmethod
    def device(cls, spec: ExecutorSpec, asked: str) -> str:
        return device_elsewhere(asked, parse(spec).num_gpus)

    def _note_what_is_missing(self, there: dict[str, float], wanted: dict[str, float]) -> None:
        """Ray waits without a word for nodes that may never join."""
        for name, amount in wanted.items():
            if amount > there.get(name, 0.0):
                self.watch().note(
                    f"Ray has {there.get(name, 0.0):g} {name} now; a work takes {amount:g}. It waits for more."
                )

    def submit(self, work: Work) -> None:
        stream = self._task.remote(self._job, work.to_json(), self._mark)
        self._streams[stream] = _UnderWay(work, self.watch(), [name for name, _ in work.owed])

    def wait(self, seconds: float) -> list[Ended]:
        try:
            heard, _ = self._ray.wait(list(self._streams), timeout=seconds)
        except self._ray.exceptions.RayError as error:
            raise RunError(
                f"the Ray cluster is gone: {on_one_line(error, most=300)}",
                "The same command goes on, once there is one again.",
            ) from error
        return [ended for stream in heard if (ended := self._hear(stream)) is not None]

    def _hear(self, stream: Any) -> Ended | None:
        """Take the next result of a work, or its end."""
        work, watch, left = self._streams[stream]
        try:
            came: Came = self._ray.get(next(stream))
        except StopIteration:
            return self._end(stream)
        except self._ray.exceptions.RayError as error:  # the worker, or its node, is gone
            if left and self.has_weights(work, answered=len(left) < len(work.owed)):
                count(watch, self.plan, work, left[0])
            return self._end(stream, died=on_one_line(error, most=300))
        self.apart = self.apart or bool(came.files)
        if refused := came.take(self.store):
            self._ray.cancel(stream, force=True)
            return self._end(stream, refused=refused)
        if came.suite is not None:
            left.remove(came.suite)
            count(watch, self.plan, work, came.suite)
        return None

    def _end(self, stream: Any, died: str | None = None, refused: str | None = None) -> Ended:
        return Ended(self._streams.pop(stream).work, died, refused)

    def close(self) -> None:
        for stream in self._streams:
            self._ray.cancel(stream, force=True)
        self._streams.clear()
        if self._started:
            self._ray.shutdown()


def parse(spec: ExecutorSpec) -> Params:
    return validated(Params, spec.params, "executor 'ray'")
