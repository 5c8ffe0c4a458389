"""What a person sees while a sweep runs, on stderr: a bar with the time left on a terminal, plain lines in a log."""

import sys
import time
from typing import Protocol, TextIO


class Display(Protocol):
    """Told what is going on and how much of it is done.

    left: seconds, None while unknown. detail: what changes all the time, such as the loss of a training.
    """

    def step(self, what: str, done: int, total: int, left: float | None, detail: str = "") -> None: ...
    def note(self, message: str) -> None: ...
    def close(self) -> None: ...


def display(stream: TextIO | None = None) -> Display:
    """A bar if `stream` (by default stderr) is a terminal, else lines."""
    stream = stream or sys.stderr
    return Bar() if stream.isatty() else Lines(stream)


class Silent:
    """For those who only want the result."""

    def step(self, what: str, done: int, total: int, left: float | None, detail: str = "") -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """A line when something new begins, and while it lasts at most one every ten seconds."""

    EVERY = 10.0

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._what = ""
        self._last = 0.0

    def step(self, what: str, done: int, total: int, left: float | None, detail: str = "") -> None:
        now = time.monotonic()
        if what == self._what and now - self._last < self.EVERY:
            return
        self._what, self._last = what, now
        remaining = f"{duration(left)} left" if left is not None else ""
        self.note(f"{100 * done // max(1, total):3d} %  {', '.join(filter(None, (what, detail, remaining)))}")

    def note(self, message: str) -> None:
        print(message, file=self.stream, flush=True)

    def close(self) -> None:
        pass


class Bar:
    """A bar on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=None, left="")

    def step(self, what: str, done: int, total: int, left: float | None, detail: str = "") -> None:
        remaining = f"{duration(left)} left" if left is not None else ""
        shown = f"{what}, {detail}" if detail else what
        self._bar.update(self._task, description=shown, completed=done, total=total, left=remaining)

    def note(self, message: str) -> None:
        self._bar.console.print(message, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """
    >>> duration(42), duration(125), duration(7300)
    ('42 s', '2 min', '2.0 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
