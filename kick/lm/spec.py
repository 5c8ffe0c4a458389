"""Which LM answers, and how: the `lm` section of a sweep file."""

from typing import Any

from pydantic import Field

from kick.spec import Spec


class LMSpec(Spec):
    """Which LM answers. `batch_size` is the number of examples asked in one go, and what a crash can lose."""

    name: str = "fast"
    batch_size: int = Field(default=128, ge=1)
    params: dict[str, Any] = Field(default_factory=dict, description="of that LM: `kick list lms --json`")
