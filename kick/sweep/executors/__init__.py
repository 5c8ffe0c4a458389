"""Where works run: in this process, in worker processes here, on a Ray cluster, or as Slurm jobs.

An executor is handed works and says which have ended. It starts nothing by itself and judges nothing: what is done is
read from the run directory, and what to do about a process that died is the scheduler's business (kick.sweep.run).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from kick.sweep.executors.spec import ExecutorSpec

if TYPE_CHECKING:
    from kick.sweep.executors.base import Executor

_EXECUTORS = {
    "inline": "kick.sweep.executors.inline:Inline",
    "local": "kick.sweep.executors.local:Local",
    "ray": "kick.sweep.executors.ray:Ray",
    "slurm": "kick.sweep.executors.slurm:Slurm",
}


def find_executor(spec: ExecutorSpec) -> "type[Executor]":
    module, _, attribute = _EXECUTORS[spec.name].partition(":")
    return getattr(import_module(module), attribute)
