"""What a control group grants of the machine's memory: the limit of a container or of a Slurm job.

Beyond it the kernel kills; no error is raised that could be caught. Limits of version 2 and version 1, of the process's
own group and of all that it lies in.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MOUNT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60  # version 1 writes a number near 2^63


class Grant(NamedTuple):
    """Bytes. used: without pages of files, which the kernel takes back when memory is short."""

    limit: int
    used: int


def grants(mount: Path = _MOUNT, own: Path = _OWN) -> list[Grant]:
    """Of all control groups that limit this process; none where there are none, or on other systems than Linux."""
    try:
        lines = own.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += list(_along(mount, path, "memory.max", "memory.current", ("inactive_file", "active_file")))
        elif "memory" in controllers.split(","):
            files = "total_inactive_file", "total_active_file"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
            found += list(_along(mount / "memory", path, *names, files))
    return found


def _along(root: Path, path: str, limit: str, usage: str, reclaimable: tuple[str, str]) -> Iterator[Grant]:
    """From the group `path` up to `root`. In a container the path may name what is not seen: the root counts."""
    group = root / path.strip("/")
    while True:
        asked = _number(group / limit)
        if asked is not None and asked < _UNLIMITED:
            yield Grant(asked, max(0, (_number(group / usage) or 0) - _statistic(group / "memory.stat", reclaimable)))
        if group == root or root not in group.parents:
            return
        group = group.parent


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # else `max`


def _statistic(file: Path, names: tuple[str, str]) -> int:
    """The sum of what these rows say."""
    try:
        rows = dict(line.split() for line in file.read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    return sum(int(rows.get(name, 0)) for name in names)
