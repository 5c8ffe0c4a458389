"""How far a sweep is and how long the rest will take, from the rates measured so far and what training should take."""

import time
from collections.abc import Iterable, Mapping
from typing import Protocol

from kick.progress import Display


class Watch(Protocol):
    """Told by one work what it is at: whatever carries it out, in this process or far away."""

    def make(self, setting: str, how: str) -> None:
        """The checkpoint of `setting` is begun; `how`, in a word."""

    def show(self, done: int, total: int, what: str, detail: str = "") -> None:
        """How far that is, or its present stage."""

    def made(self) -> None:
        """The checkpoint is there."""

    def ask(self, setting: str, suite: str, questions: int) -> None:
        """So many questions of `suite` are begun."""

    def skip(self, count: int) -> None:
        """That many of them were answered before: they say nothing about the rate."""

    def advance(self, count: int) -> None:
        """That many were answered since the last call."""

    def stop(self) -> None:
        """Nothing more will come of what was begun."""

    def note(self, message: str) -> None:
        """Something that a person should read."""


class Clock:
    """Counts the questions of each suite, and the settings to make.

    The share done counts questions, the time left both. questions: by suite. trainings: the seconds that training is
    expected to take, by setting; what does not train is taken to be made as quickly as those before. Works that go on
    at the same time have a lane each.
    """

    def __init__(
        self,
        display: Display,
        questions: Mapping[str, int],
        settings: Iterable[str] = (),
        trainings: Mapping[str, float] | None = None,
    ) -> None:
        self.display = display
        self.questions = dict(questions)
        self.total = sum(questions.values())
        self.trainings = trainings or {}
        self.to_make = set(settings)
        self.being_made: dict[str, float] = {}  # setting -> seconds that are left of it
        self.busy = 0  # lanes that are under way
        self._spent: dict[str, tuple[float, int]] = {}  # suite -> (seconds, questions)
        self._makings: list[float] = []  # seconds, of settings that do not train

    def lane(self) -> "Lane":
        return Lane(self)

    def again(self, suite: str, questions: int) -> None:
        """What counted as over has to be done once more."""
        self.questions[suite] += questions

    def show(self, what: str, detail: str = "") -> None:
        self.display.step(what, self.total - sum(self.questions.values()), self.total, self.seconds_left(), detail)

    def seconds_left(self) -> float | None:
        """None until some questions have been timed; a suite not met yet is taken to be as quick as the others."""
        if not self._spent:
            return None
        seconds, asked = (sum(column) for column in zip(*self._spent.values(), strict=True))
        total = 0.0
        for suite, count in self.questions.items():
            own_seconds, own_asked = self._spent.get(suite, (seconds, asked))
            total += count * own_seconds / own_asked
        usual = sum(self._makings) / max(1, len(self._makings))
        for setting in self.to_make:
            total += self.being_made.get(setting, self.trainings.get(setting, usual))
        return total / max(1, self.busy)

    def count_answers(self, suite: str, seconds: float, count: int) -> None:
        before, asked = self._spent.get(suite, (0.0, 0))
        self._spent[suite] = (before + seconds, asked + count)

    def count_making(self, setting: str, seconds: float | None) -> None:
        """A setting that is over, or need not be made at all; seconds: None where it did not come to its end."""
        self.to_make.discard(setting)
        self.being_made.pop(setting, None)
        if seconds is not None and setting not in self.trainings:
            self._makings.append(seconds)


class Lane:
    """One work's part of a clock: a Watch. Under way until it is stopped, also while a model is loaded in between."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.what, self.suite, self.questions = "", "", 0
        self.setting: str | None = None  # that is being made
        self.at_work = False
        self.mark = self.since = self.stage = 0.0  # when what is under way began, and the making, and its stage
        self.done = 0

    def make(self, setting: str, how: str) -> None:
        self._begin(f"{setting}: {how}")
        self.clock.to_make.add(setting)  # it may be made again
        self.setting, self.since = setting, self.mark
        self.stage, self.done = self.mark, 0
        self.clock.show(self.what)

    def show(self, done: int, total: int, what: str, detail: str = "") -> None:
        if self.setting is not None:
            now = time.perf_counter()
            if done <= self.done:  # another stage
                self.stage = now
            self.done = done
            by_pace = (now - self.stage) * (total - done) / done if done else 0.0
            expected = self.clock.trainings.get(self.setting, 0.0) - (now - self.since)
            self.clock.being_made[self.setting] = max(by_pace, expected)
        self.clock.show(self.what, detail)

    def made(self) -> None:
        assert self.setting is not None
        self.clock.count_making(self.setting, time.perf_counter() - self.since)
        self.setting = None

    def ask(self, setting: str, suite: str, questions: int) -> None:
        self.clock.count_making(setting, None)  # it was there already, if it was not made here
        self._begin(f"{setting}: {suite}")
        self.suite, self.questions = suite, questions
        self.clock.show(self.what)

    def skip(self, count: int) -> None:
        self.questions -= count
        self.clock.questions[self.suite] -= count

    def advance(self, count: int) -> None:
        now = time.perf_counter()
        self.clock.count_answers(self.suite, now - self.mark, count)
        self.mark = now
        self.skip(count)
        self.clock.show(self.what)

    def stop(self) -> None:
        if self.setting is not None:
            self.clock.count_making(self.setting, None)
            self.setting = None
        if self.questions:
            self.skip(self.questions)
        self._end()

    def note(self, message: str) -> None:
        self.clock.display.note(message)

    def _begin(self, what: str) -> None:
        self._end()
        self.what, self.mark = what, time.perf_counter()
        self.at_work = True
        self.clock.busy += 1

    def _end(self) -> None:
        self.clock.busy -= self.at_work
        self.at_work = False
