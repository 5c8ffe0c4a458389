"""How far a sweep is and how long the rest will take, from the rates measured so far."""

import time
from typing import Protocol

from kick.progress import Progress

COMPRESS = "compress"


class Watch(Protocol):
    """Told by one work what it is at: whatever carries it out, in this process or far away."""

    def start(self, what: str, kind: str, units: int) -> None: ...
    def skip(self, count: int) -> None: ...
    def advance(self, count: int) -> None: ...
    def show(self, *progress: object) -> None: ...
    def stop(self) -> None: ...
    def note(self, message: str) -> None: ...


class Clock:
    """Counts work by kind: the questions of each suite, and the settings to compress.

    units: how much of each kind there is to do. The share done counts questions; the time left counts both. Works that
    go on at the same time have a lane each.
    """

    def __init__(self, progress: Progress, units: dict[str, int]) -> None:
        self.progress = progress
        self.left = dict(units)
        self.total = self._questions()
        self.spent: dict[str, tuple[float, int]] = {}  # kind -> (seconds, units)
        self.busy = 0  # lanes that are under way

    def lane(self) -> "Lane":
        return Lane(self)

    def again(self, kind: str, units: int) -> None:
        """What counted as over has to be done once more."""
        self.left[kind] += units

    def show(self, what: str) -> None:
        self.progress.step(what, self.total - self._questions(), self.total, self.seconds_left())

    def seconds_left(self) -> float | None:
        """None until some questions have been timed; a kind not met yet is taken to be as quick as the others."""
        asked = {kind: spent for kind, spent in self.spent.items() if kind != COMPRESS}
        if not asked:
            return None
        mean = sum(seconds for seconds, _ in asked.values()) / max(1, sum(units for _, units in asked.values()))
        total = 0.0
        for kind, count in self.left.items():
            seconds, units = self.spent.get(kind, (0.0, 0))
            if units:
                total += count * seconds / units
            elif kind != COMPRESS:
                total += count * mean
        return total / max(1, self.busy)

    def _questions(self) -> int:
        return sum(count for kind, count in self.left.items() if kind != COMPRESS)


class Lane:
    """One work's part of a clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.what, self.kind, self.units = "", COMPRESS, 0

    def start(self, what: str, kind: str, units: int) -> None:
        """Begin `units` of a kind; the last call's unfinished ones are given up with `stop`."""
        self.clock.busy += self.units == 0 and units > 0
        self.what, self.kind, self.units = what, kind, units
        self.mark = time.perf_counter()
        self.show()

    def skip(self, count: int) -> None:
        """That many were done before: they say nothing about the rate."""
        self.clock.busy -= self.units > 0 and self.units == count
        self.units -= count
        self.clock.left[self.kind] -= count

    def advance(self, count: int) -> None:
        now = time.perf_counter()
        seconds, units = self.clock.spent.get(self.kind, (0.0, 0))
        self.clock.spent[self.kind] = (seconds + now - self.mark, units + count)
        self.mark = now
        self.skip(count)
        self.show()

    def stop(self) -> None:
        """Nothing more will come of what was started."""
        self.skip(self.units)

    def show(self, *progress: object) -> None:
        """progress: (done, total, what); what comes after a comma there is shown, the loss of a training say."""
        _, _, detail = str(progress[-1] if progress else "").partition(", ")
        self.clock.show(f"{self.what}, {detail}" if detail else self.what)

    def note(self, message: str) -> None:
        self.clock.progress.note(message)
