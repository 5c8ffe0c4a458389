"""Worker processes on this machine, each with its own GPU or its share of the cores.

A worker lives for many works, so libraries are imported and questions read once. It is told works on stdin and says on
stdout what it is at; when this process goes away, so does it. What it prints besides is in logs/ of the run directory.
The lock on the run directory is held by workers too: nobody else writes there until the last of them is gone.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from kick.errors import RunError
from kick.lm.memory import SHARED_BY, free_bytes
from kick.sweep.clock import Watch
from kick.sweep.costs import worker_bytes
from kick.sweep.executors.base import Ended, Executor, Job
from kick.sweep.plan import Plan, gpus_each
from kick.sweep.store import Store
from kick.sweep.work import Work


class Local(Executor):
    def __init__(self, plan: Plan, store: Store, job: Job, watch: Callable[[], Watch]) -> None:
        super().__init__(plan, store, job, watch)
        self.slots = self.works_here(plan)
        # the same for all who ever work on this run: other threads, and rows of another size, round differently
        own = max(1, torch.get_num_threads() // self.slots)
        on_cpu = plan.device == "cpu"
        self._threads = store.as_first("threads", own) if on_cpu else None
        self._sharing = store.as_first("memory_shared_by", self.slots) if on_cpu else 1
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._free = deque(range(self.slots))  # places, whose workers died or never were
        self._selector = selectors.DefaultSelector()

    @classmethod
    def works_here(cls, plan: Plan) -> int:
        """As asked; else one for each GPU, on a CPU as many as cores and free memory allow.

        Small models gain from workers more than from threads; a suite that times its models wants the machine alone.
        """
        asked = plan.config.executor.workers
        if asked != "auto":
            return asked
        if plan.device == "cuda":
            return max(1, torch.cuda.device_count() // gpus_each(plan))
        if plan.device != "cpu" or any(suite.suite.times_itself for suite in plan.suites):
            return 1
        each = worker_bytes(plan, plan.training)
        return max(1, min(_cores(), len(plan.settings), int(free_bytes(torch.device("cpu")) / each)))

    def submit(self, work: Work) -> None:
        for idle in [worker for worker in self._idle if worker.has_ended]:
            self._bury(idle)  # it died with nothing to do
        worker = self._idle.pop() if self._idle else self._start()
        worker.begin(work, self.watch())
        self._busy.append(worker)

    def _start(self) -> "_Worker":
        place = self._free.popleft()
        worker = _Worker(self.job, self.store, place, _environment(self.plan, place, self._threads, self._sharing))
        self._selector.register(worker.answers, selectors.EVENT_READ, worker)
        return worker

    def wait(self, seconds: float) -> list[Ended]:
        until = time.monotonic() + seconds
        ended: list[Ended] = []
        while self._busy and not ended and (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                ended += self._hear(key.data)
        if not ended:  # one whose children hold its pipe open says nothing when it ends
            for worker in [worker for worker in self._busy if worker.has_ended]:
                ended += self._hear(worker)
        return ended

    def _hear(self, worker: "_Worker") -> list[Ended]:
        for message in worker.hear():
            if "fatal" in message:
                raise RunError(*message["fatal"])
            if "ended" in message:
                self._busy.remove(worker)
                self._idle.append(worker)
                return [Ended(worker.finished())]
            worker.tell(message)
        if not (worker.is_gone or worker.has_ended):
            return []
        died = worker.cause_of_death()
        work = worker.finished() if worker in self._busy else None
        self._bury(worker)
        return [Ended(work, died)] if work is not None else []

    def _bury(self, worker: "_Worker") -> None:
        self._selector.unregister(worker.answers)
        self._free.append(worker.place)
        (self._idle if worker in self._idle else self._busy).remove(worker)
        worker.end()

    def close(self) -> None:
        for worker in [*self._idle, *self._busy]:
            worker.end()
        self._selector.close()


class _Worker:
    """One process (kick.sweep.executors.worker), and what it is at."""

    def __init__(self, job: Job, store: Store, place: int, environment: dict[str, str]) -> None:
        self.place = place
        self._timeout = job.timeout
        logs = store.root / "logs"
        logs.mkdir(exist_ok=True)
        self.log: TextIO = open(logs / f"worker-{place}.log", "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._log_start = self.log.seek(0, os.SEEK_END)  # what an earlier one left at this place stays
        lock = store.lock_file
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kick.sweep.executors.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            pass_fds=[lock.fileno()] if lock is not None else [],
            start_new_session=True,  # its children are ended with it; Ctrl-C is ours to pass on
        )
        assert self._process.stdout is not None
        self.answers = self._process.stdout
        os.set_blocking(self.answers.fileno(), False)
        self._unread = b""
        self.is_gone = False
        self._work: Work | None = None
        self._watch: Watch | None = None
        self._send({"job": job.to_json()})

    def begin(self, work: Work, watch: Watch) -> None:
        self._work, self._watch = work, watch
        self._send({"work": work.to_json()})

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone, which its end of the other pipe will tell
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def hear(self) -> list[dict[str, Any]]:
        """What it has said since the last call."""
        try:
            read = os.read(self.answers.fileno(), 1 << 20)
        except BlockingIOError:
            return []
        self.is_gone = not read
        *lines, self._unread = (self._unread + read).split(b"\n")
        return [json.loads(line) for line in lines]

    def tell(self, message: dict[str, Any]) -> None:
        """Pass on what the worker is at."""
        assert self._watch is not None
        getattr(self._watch, message["watch"])(*message["arguments"])

    def finished(self) -> Work:
        work, self._work = self._work, None
        assert work is not None
        assert self._watch is not None
        self._watch.stop()
        return work

    def cause_of_death(self) -> str:
        """In words, from how the process ended and the last line of its log."""
        code = self._process.wait()
        self.log.seek(self._log_start)
        log = self.log.read().strip()
        if self._timeout is not None and "Timeout (" in log:
            return f"it took longer than the timeout of {self._timeout:g} s ({self._logged})"
        if code == -signal.SIGKILL:
            return "it was killed (signal 9), as systems do when memory runs out"
        how = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
        last = log.splitlines()[-1][:200] if log else ""
        return f"{how} ({last or self._logged})"

    @property
    def _logged(self) -> str:
        return f"see logs/{Path(self.log.name).name}"

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self.answers.close()
        self.log.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment(plan: Plan, place: int, threads: int | None, sharing: int) -> dict[str, str]:
    """Which GPUs or how many threads a worker has, and how many share the memory."""
    environment = {**os.environ, SHARED_BY: str(sharing)}
    if plan.device == "cuda":
        seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        seen = seen or [str(number) for number in range(torch.cuda.device_count())]
        own = range(place * (each := gpus_each(plan)), (place + 1) * each)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(seen[number % len(seen)] for number in own)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment
