import io
import time

import pytest

from kick.progress import Lines, Silent, display, duration
from kick.sweep.clock import Clock


class Remembering(Silent):
    def __init__(self):
        self.steps = []

    def step(self, what, done, total, left, detail=""):
        self.steps.append((what, done, total, left))


@pytest.fixture
def now(monkeypatch):
    clock = {"seconds": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["seconds"])
    monkeypatch.setattr(time, "monotonic", lambda: clock["seconds"])
    return clock


def test_the_time_left_comes_from_each_kinds_own_rate(now):
    seen = Remembering()
    clock = Clock(seen, {"slow": 20, "quick": 40}, ["a", "b"]).lane()
    clock.make("a", "compress")
    now["seconds"] += 5
    clock.made()
    assert seen.steps[-1] == ("a: compress", 0, 60, None)  # no question has been timed yet
    clock.ask("a", "slow", 10)
    now["seconds"] += 20
    clock.advance(10)  # 2 s each: 10 left of these, 40 of the other kind taken as equal, one compression of 5 s
    assert seen.steps[-1] == ("a: slow", 10, 60, pytest.approx(10 * 2 + 40 * 2 + 5))
    clock.ask("a", "quick", 20)
    clock.skip(10)  # on disk already
    now["seconds"] += 5
    clock.advance(10)
    assert seen.steps[-1] == ("a: quick", 30, 60, pytest.approx(10 * 2 + 20 * 0.5 + 5))


def test_works_side_by_side_share_the_time_left(now):
    seen = Remembering()
    clock = Clock(seen, {"suite": 40})
    first, second = clock.lane(), clock.lane()
    first.ask("a", "suite", 20)
    second.ask("b", "suite", 20)
    now["seconds"] += 10
    first.advance(5)  # 2 s a question
    second.advance(5)
    assert seen.steps[-1] == ("b: suite", 10, 40, pytest.approx(30 * 2 / 2))
    first.stop()
    second.advance(0)
    assert seen.steps[-1] == ("b: suite", 25, 40, pytest.approx(15 * 2))


def test_the_time_left_does_not_jump_when_a_lane_is_done_with_a_suite_and_goes_on(now):
    seen = Remembering()
    clock = Clock(seen, {"suite": 30})
    first, second = clock.lane(), clock.lane()
    first.ask("a", "suite", 10)
    second.ask("b", "suite", 10)
    now["seconds"] += 10
    first.advance(10)
    assert seen.steps[-1] == ("a: suite", 10, 30, pytest.approx(20 * 1 / 2))
    assert clock.seconds_left() == pytest.approx(20 * 1 / 2)  # as is said by the second while the first loads a model


def test_training_counts_before_it_begins_and_follows_its_own_pace(now):
    seen = Remembering()
    clock = Clock(seen, {"suite": 20}, ["quick", "trained"], {"trained": 300.0})
    lane = clock.lane()
    lane.make("quick", "compress")
    now["seconds"] += 4
    lane.made()
    lane.ask("quick", "suite", 10)
    now["seconds"] += 10
    lane.advance(10)
    assert seen.steps[-1][3] == pytest.approx(10 + 300)
    lane.make("trained", "compress")
    now["seconds"] += 50
    lane.show(1, 10, "pruning", "loss 3")  # slower than was expected: nine more steps of 50 s
    assert seen.steps[-1] == ("trained: compress", 10, 20, pytest.approx(10 + 450))
    now["seconds"] += 10
    lane.show(9, 10, "pruning")  # the pace of this stage leaves 7 s, but of all 300 s only 60 are over
    assert seen.steps[-1][3] == pytest.approx(10 + 240)
    now["seconds"] += 280
    lane.show(1, 2, "continuing")  # a stage that has just begun, later than all was expected to end
    assert seen.steps[-1][3] == pytest.approx(10)
    lane.made()
    lane.ask("trained", "suite", 10)
    assert seen.steps[-1][3] == pytest.approx(10)


def test_a_setting_that_need_not_be_made_is_not_waited_for(now):
    seen = Remembering()
    clock = Clock(seen, {"suite": 20}, ["a", "b"], {"a": 100.0, "b": 100.0})
    lane = clock.lane()
    lane.ask("a", "suite", 10)  # its checkpoint lies there
    now["seconds"] += 10
    lane.advance(10)
    assert clock.seconds_left() == pytest.approx(10 + 100)
    lane.make("b", "compress")
    lane.stop()  # its process died
    assert clock.seconds_left() == pytest.approx(10)
    lane.make("b", "compress")  # and another one begins again
    assert clock.seconds_left() == pytest.approx(10 + 100)


def test_what_is_given_up_is_not_waited_for(now):
    seen = Remembering()
    clock = Clock(seen, {"suite": 20}).lane()
    clock.ask("a", "suite", 10)
    now["seconds"] += 1
    clock.advance(1)
    clock.stop()  # it failed with nine questions left
    clock.ask("b", "suite", 10)
    assert seen.steps[-1] == ("b: suite", 10, 20, pytest.approx(10))


def test_what_is_tried_again_counts_once(now):
    seen = Remembering()
    clock = Clock(seen, {"suite": 10})
    first = clock.lane()
    first.ask("a", "suite", 10)
    now["seconds"] += 4
    first.advance(4)
    first.stop()  # its process died
    clock.again("suite", 10)
    second = clock.lane()
    second.ask("a", "suite", 10)
    second.skip(4)  # those are on disk
    assert clock.seconds_left() == pytest.approx(6)
    now["seconds"] += 6
    second.advance(6)
    assert seen.steps[-1] == ("a: suite", 10, 10, 0)


def test_a_log_gets_a_line_for_each_new_thing_and_one_every_ten_seconds(now):
    text = io.StringIO()
    lines = Lines(text)
    now["seconds"] = 100.0
    for done in range(5):
        lines.step("a: suite", done, 100, None)
    now["seconds"] += 11
    lines.step("a: suite", 6, 100, 125.0)
    lines.step("b: suite", 7, 100, 30.0, "loss 3.1")
    lines.step("b: suite", 7, 100, 30.0, "loss 3.0")  # nothing new
    assert text.getvalue() == "  0 %  a: suite\n  6 %  a: suite, 2 min left\n  7 %  b: suite, loss 3.1, 30 s left\n"


def test_a_log_is_not_a_terminal():
    assert isinstance(display(io.StringIO()), Lines)


def test_a_terminal_gets_a_bar(capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    from kick.progress import Bar

    bar = display(Terminal())
    assert isinstance(bar, Bar)
    bar.step("[/a]: suite", 3, 10, 60.0)  # a label may hold anything
    bar._bar.refresh()
    bar.note("failed: [red]not markup[/red]")
    bar.close()
    assert "failed: [red]not markup[/red]" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (89, "89 s"), (125, "2 min"), (7300, "2.0 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
