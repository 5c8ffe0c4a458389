"""How far a sweep is and how long the rest will take, from the rates measured so far."""

import time

from kick.progress import Progress

COMPRESS = "compress"


class Clock:
    """Counts work by kind: the questions of each suite, and the settings to compress.

    units: how much of each kind there is to do. The share done counts questions; the time left counts both.
    """

    def __init__(self, progress: Progress, units: dict[str, int]) -> None:
        self.progress = progress
        self.left = dict(units)
        self.total = self._questions()
        self.spent: dict[str, tuple[float, int]] = {}  # kind -> (seconds, units)

    def start(self, what: str, kind: str, units: int) -> None:
        """Begin `units` of a kind; the last call's unfinished ones are given up with `stop`."""
        self.what, self.kind, self.units = what, kind, units
        self.mark = time.perf_counter()
        self.show()

    def skip(self, count: int) -> None:
        """That many were done before: they say nothing about the rate."""
        self.units -= count
        self.left[self.kind] -= count

    def advance(self, count: int) -> None:
        now = time.perf_counter()
        seconds, units = self.spent.get(self.kind, (0.0, 0))
        self.spent[self.kind] = (seconds + now - self.mark, units + count)
        self.mark = now
        self.skip(count)
        self.show()

    def stop(self) -> None:
        """Nothing more will come of what was started."""
        self.skip(self.units)

    def show(self, *_: object) -> None:
        self.progress.step(self.what, self.total - self._questions(), self.total, self.seconds_left())

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
        return total

    def _questions(self) -> int:
        return sum(count for kind, count in self.left.items() if kind != COMPRESS)
