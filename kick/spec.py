"""Descriptions as frozen models: what a sweep file is made of, and what pydantic found wrong with one, in words."""

from pydantic import BaseModel, ConfigDict, ValidationError


class Spec(BaseModel):
    """A frozen description; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def explain(error: ValidationError) -> str:
    """The first thing that pydantic found, in words."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key '{where}'."
    given = f", given {first['input']!r}" if first["type"] != "missing" else ""
    return f"'{where}': {first['msg'][0].lower()}{first['msg'][1:]}{given}."
