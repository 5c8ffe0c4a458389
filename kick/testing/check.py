"""A check: one thing that must hold of a plugin."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kick.errors import KickError


class ConformanceError(KickError):
    """A plugin that does not keep the contract."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold. `run` raises ConformanceError if it does not."""

    name: str
    run: Callable[[], None]


def run_all(name: str, checks: Iterable[Check]) -> None:
    """Raise ConformanceError that lists all `checks` that the plugin called `name` fails."""
    failed = []
    for check in checks:
        try:
            check.run()
        except ConformanceError as error:
            failed.append(f"{check.name}: {error.message}")
    if failed:
        raise ConformanceError(f"{name} fails {len(failed)} checks.", "\n".join(failed))
