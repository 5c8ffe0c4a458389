"""Descriptions as frozen models: what a sweep file is made of, and what pydantic found wrong with one, in words."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kick.errors import ConfigError

T = TypeVar("T")
S = TypeVar("S", bound=BaseModel)


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every generator of random numbers takes: numpy's, torch's and those of engines."""


class Spec(BaseModel):
    """A frozen description; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def validated(kind: type[S], given: Mapping[str, Any], where: str) -> S:
    """An instance of `kind`. Raises ConfigError that names `where`, the key, what was given and what may be."""
    try:
        return kind(**given)
    except ValidationError as error:
        known = ", ".join(kind.model_fields) or "none"
        raise ConfigError(f"{where}: {explain(error)}", f"Its parameters: {known}.") from error


def distinct(items: Iterable[T]) -> list[T]:
    """Each once, in order; for what has no hash, as descriptions that hold a dictionary."""
    found: list[T] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def explain(error: ValidationError) -> str:
    """The first thing that pydantic found, in words."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key '{where}'."
    given = f", given {first['input']!r}" if first["type"] != "missing" else ""
    return f"'{where}': {first['msg'][0].lower()}{first['msg'][1:]}{given}."
