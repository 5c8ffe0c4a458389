"""The errors that a user meets: what was given, what was expected, what to do next."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

INCOMPLETE = "The checkpoint is incomplete or damaged: download or copy it again."
"""A hint for files that somebody else wrote."""


class KickError(Exception):
    """Something the user can mend.

    `message` says what was given and what is wrong with it; `hint` says what was expected and what to do.
    The command line prints both without a traceback and exits with 2.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        if not self.hint:
            return self.message
        return self.message + "\n" + "\n".join("  " + line for line in self.hint.splitlines())


@contextmanager
def about(what: str) -> Iterator[None]:
    """Errors of kick say first what they are about."""
    try:
        yield
    except KickError as error:
        raise type(error)(f"{what}: {error.message}", error.hint) from error


class ConfigError(KickError):
    """A sweep file or an option that says something impossible."""


class LevelError(KickError):
    """A compression level that does not exist, or not for this compressor or this layer."""


class UnknownNameError(KickError):
    """A name that is in no registry."""


class ModelError(KickError):
    """A model source that cannot be found or loaded."""


class DataError(KickError):
    """Rows that are missing or malformed."""


class EngineError(KickError):
    """An engine that answered an LM's requests and has ended: it has to be started anew."""


class NotGivenError(KickError):
    """What an LM does not give by its nature: whole distributions, likelihoods of a prompt."""


class RunError(KickError):
    """A run folder that cannot be used as asked."""


class DiskFullError(RunError):
    """Nothing more can be written."""


class CheckpointError(KickError):
    """A checkpoint that is incomplete or not what its record says."""


class TrackerError(KickError):
    """An experiment tracker that did not take what it was given."""


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
    """An error for `name` that lists what is known, the nearest first in the message."""
    known = sorted(known)
    message = f"no {kind} named '{name}'.{did_you_mean(name, known)}"
    listing = f"Known: {', '.join(known)}." if known else f"No {kind} is installed."
    return UnknownNameError(message, f"{listing} {hint}".rstrip())


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A question after a full stop, or nothing where nothing known is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean '{near[0]}'?" if near else ""


def on_one_line(error: BaseException, most: int | None = None) -> str:
    """All that an error says, or the end of it: what was wrong stands last in the messages of clusters."""
    text = " ".join(str(error).split())
    return text if most is None else text[-most:]


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind, where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
