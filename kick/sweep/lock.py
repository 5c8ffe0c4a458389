"""One writer for a run directory, a process and its workers; who it is, and since when, for the others."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from kick.errors import RunError
from kick.progress import duration

_WORKERS_END_WITHIN = 20.0  # seconds after the process that started them has gone


@contextmanager
def lock(root: Path) -> Iterator[TextIO]:
    """Held by processes, not by a file's existence: a killed run leaves no stale lock. Gives the file it hangs on.

    Where the owner is gone and its workers are just ending, waits for them.
    """
    with open(root / ".lock", "a+", encoding="utf-8") as file:
        give_up = time.monotonic() + _WORKERS_END_WITHIN
        while not _try_lock(file):
            file.seek(0)
            owner = Owner.read(file.read())
            if owner.is_alive is not False or time.monotonic() > give_up:
                raise RunError(f"{root} is being written by {owner}.", owner.advice)
            time.sleep(0.1)
        file.seek(0)
        file.truncate()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(json.dumps(asdict(Owner(os.getpid(), socket.gethostname(), now))))
        file.flush()
        yield file


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise RunError(
            f"{Path(file.name).parent} lies on a file system without file locks ({error.strerror}).",
            "Mount it with them (Lustre: -o flock; NFS: with its lock service), or choose an --out elsewhere.",
        ) from error
    return True


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, from what it wrote into it."""

    process: int | None = None
    host: str = ""
    since: str = ""

    @classmethod
    def read(cls, text: str) -> "Owner":
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):  # just being written
            return cls()

    @property
    def is_alive(self) -> bool | None:
        """None if that cannot be told from here."""
        if self.process is None or self.host != socket.gethostname():
            return None
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # somebody else's
            return True
        return True

    @property
    def advice(self) -> str:
        if self.is_alive is False:
            return (
                f"That process is gone, workers of it are not: find them on {self.host} (`fuser .lock`) and end them."
            )
        return "Wait for it, or choose another --out."

    def __str__(self) -> str:
        if self.process is None:
            return "another process"
        seconds = (datetime.now(UTC) - datetime.fromisoformat(self.since)).total_seconds()
        age = f" ({duration(seconds)})" if seconds >= 0 else ""  # clocks may be set back
        return f"process {self.process} on {self.host} since {self.since}{age}"
