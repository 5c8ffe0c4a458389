"""Where a sweep's evaluations run, and how hard it tries: the `executor` section of a sweep file."""

from typing import Annotated, Any, Literal

from pydantic import Field

from kick.spec import Spec


class ExecutorSpec(Spec):
    """`local`: worker processes on this machine. `ray`, `slurm`: a cluster. `inline`: in kick's own process."""

    name: Literal["local", "ray", "slurm", "inline"] = "local"
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="works at once; auto: one a GPU, on a CPU what cores and memory allow; clusters queue",
    )
    retries: int = Field(default=2, ge=0, description="of an evaluation that its process did not survive")
    timeout: float | None = Field(
        default=None, gt=0, description="seconds for one evaluation; for a compression, without any progress"
    )
    params: dict[str, Any] = Field(default_factory=dict, description="of ray and slurm: see docs/clusters.md")
