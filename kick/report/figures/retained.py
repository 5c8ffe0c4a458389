"""What was retained over all suites: against bytes, against perplexity, against speed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kick.measured import packed_bytes
from kick.report.figures.style import (
    LOST,
    MOST_SETTINGS,
    Planned,
    bars,
    hint,
    interval_in_words,
    label_lines,
    label_points,
    legend,
    logarithmic,
    method_style,
    title,
)
from kick.report.results import Results, SettingResult
from kick.settings import DENSE
from kick.statistics import Interval


def planned(results: Results) -> Iterator[Planned]:
    if not results.task_suites or not any(results.mean_retained(result.name) for result in results.compressed):
        return
    if (suite := results.perplexity_suite) is not None:
        draw = partial(_perplexity_against_capability, results, suite)
        yield Planned("perplexity-against-capability", "Perplexity against capability", draw)
    yield Planned("size-against-retained", "Size against mean retained score", partial(_size_against_retained, results))
    if any(result.training for result in results.compressed):
        yield Planned("cost-against-retained", "Cost of making it against mean retained score", partial(_cost, results))
    if (suite := _speed_suite(results)) is not None:
        draw = partial(_speed_against_retained, results, suite)
        yield Planned("speed-against-retained", "Speed against mean retained score", draw)


@dataclass(frozen=True)
class _Point:
    """A setting at `x`, with the interval `wide` there if it has one. words: what x says."""

    result: SettingResult
    x: float
    mean: tuple[float, Interval]
    words: str
    wide: Interval | None = None

    @property
    def y(self) -> float:
        return 100 * self.mean[0]


def _by_method(points: Sequence[_Point]) -> dict[str, list[int]]:
    """The places of each method's points; a method's patterns belong to it."""
    found: dict[str, list[int]] = {}
    for index, point in enumerate(points):
        found.setdefault(point.result.method, []).append(index)
    return found


def _draw(axes: Axes, results: Results, points: Sequence[_Point], open_markers: bool = False) -> None:
    """A marker with intervals for each point, and its values on hover. Open markers have no place in the legend."""
    for method, places in _by_method(points).items():
        own = [points[index] for index in places]
        style = method_style(results, method)
        x, y = [point.x for point in own], np.array([point.y for point in own])
        tall = bars(y / 100, [point.mean[1].low for point in own], [point.mean[1].high for point in own]) * 100
        known = [point.wide for point in own if point.wide is not None]
        wide = bars(x, [found.low for found in known], [found.high for found in known]) if known else None
        axes.errorbar(
            x, y, xerr=wide, yerr=tall, color=style["color"],
            marker=style["marker"], markersize=5.5, markerfacecolor="white" if open_markers else style["color"],
            capsize=2, linewidth=0.9, linestyle="none", label=None if open_markers else method, zorder=3,
        )  # fmt: skip
    for point in points:
        mean = interval_in_words(*point.mean, percent=True)
        hint(axes, point.x, point.y, f"{point.result.name}: {mean}; {point.words}")


def _asked(results: Results) -> str:
    """The suites that means are over, with the questions of each."""
    found = {suite: results.estimate(DENSE, suite) for suite in results.task_suites}
    return ", ".join(f"{suite} (n = {own.n})" for suite, own in found.items() if own is not None)


def _name(axes: Axes, points: Sequence[_Point]) -> None:
    """Levels beside the points, while there are few enough to be read."""
    if len(points) <= 2 * MOST_SETTINGS:
        label_points(axes, [(point.x, point.y, point.result.setting.levels) for point in points])


def _finish(axes: Axes, xlabel: str, heading: str) -> None:
    """What all figures of the mean retained score have in common."""
    axes.axhline(LOST, color="0.25", linewidth=1.0, linestyle=(0, (4, 3)))
    label_lines(axes, {"95 % of dense": LOST})
    axes.set_xlabel(xlabel)
    axes.set_ylabel("mean retained score (%)")
    axes.set_ylim(bottom=0)
    title(axes, heading)
    legend(axes, len(axes.get_legend_handles_labels()[0]))


def _size_against_retained(results: Results) -> tuple[Figure, str]:
    """What is on disk, and beside it what the weights would take packed; and the front of the packed ones."""
    figure, axes = plt.subplots()
    dense = next(result for result in results.settings if result.setting.is_dense)
    if dense.record:
        axes.plot(
            dense.record["bytes"] / 1e6, 100, marker="*", markersize=13, color="0.2", linestyle="none", label="dense"
        )
    points, ends = [], []
    for result in results.compressed:
        mean = results.mean_retained(result.name)
        if mean is not None and result.record is not None:
            disk, packed = result.record["bytes"] / 1e6, packed_bytes(result.record) / 1e6
            points.append(_Point(result, packed, mean, f"{packed:.0f} MB packed, {disk:.0f} MB on disk"))
            ends.append(disk)
    for method, own in _by_method(points).items():
        style = method_style(results, method)
        y = [points[index].y for index in own]
        across = {"color": style["color"], "linewidth": 0.7, "alpha": 0.5}
        axes.hlines(y, [points[index].x for index in own], [ends[index] for index in own], **across)
        filled = {"color": style["color"], "marker": style["marker"], "linestyle": "none"}
        axes.plot([ends[index] for index in own], y, label=method, **filled)
    _draw(axes, results, points, open_markers=True)
    edge = front([(point.x, point.y) for point in points])
    axes.step(
        [x for x, _ in edge], [y for _, y in edge], where="post", color="0.45", linewidth=1.0, zorder=1, label="front"
    )
    _finish(axes, "megabytes of weights", "Size against what was retained")
    _name(axes, points)
    caption = (
        "Filled: bytes on disk, where a zero or a quantised weight takes the room of any other. Open: packed, as codes "
        "with their scales (kick export) or, of pruned layers, as non-zero weights and a bit mask (a format that "
        "nothing here stores or runs). The grey steps: no other packed model is both smaller and better. "
        f"Mean over {_asked(results)}; bars: 95 % intervals."
    )
    return figure, caption


def front(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (size, score) those that no other beats in one without losing in the other, the smallest first.

    >>> front([(1, 5), (2, 4), (3, 9), (3, 7)])
    [(1, 5), (3, 9)]
    """
    found: list[tuple[float, float]] = []
    for size, score in sorted(places, key=lambda place: (place[0], -place[1])):
        if not found or score > found[-1][1]:
            found.append((size, score))
    return found


def _cost(results: Results) -> tuple[Figure, str]:
    """One-shot methods beside those that train: how long each took to make."""
    figure, axes = plt.subplots()
    points = []
    for result in results.compressed:
        mean = results.mean_retained(result.name)
        if mean is not None and result.record is not None and result.record["seconds"] > 0:
            tokens = sum(stage["tokens"] for stage in result.training)
            trained = 60 * sum(stage["hours"] for stage in result.training)  # a resumed run's last process saw a part
            minutes = max(result.record["seconds"] / 60, trained)
            words = f"{minutes:.1f} minutes" + (f", {tokens:,} tokens trained" if tokens else "")
            points.append(_Point(result, minutes, mean, words))
    _draw(axes, results, points)
    logarithmic(axes, "x", "g")
    _finish(axes, "minutes to make it, here (logarithmic)", "Cost against what was retained")
    _name(axes, points)
    here = results.run.get("hardware", {}).get("processor", "this machine")
    machines = {result.record.get("computed_on", here) for result in results.compressed if result.record is not None}
    return figure, (
        f"Minutes from the dense model to the checkpoint on {' or '.join(sorted(machines))}, calibration and training "
        f"together. Mean over {_asked(results)}; bars: 95 % intervals."
    )


def _speed_suite(results: Results) -> str | None:
    """A suite whose first metric is a speedup over the dense model."""
    return next((name for name in results.suites if results.metric(name).name == "speedup"), None)


def _speed_against_retained(results: Results, suite: str) -> tuple[Figure, str]:
    figure, axes = plt.subplots()
    axes.plot(1.0, 100, marker="*", markersize=13, color="0.2", linestyle="none", label="dense")
    points = []
    for result in results.compressed:
        mean, speed = results.mean_retained(result.name), results.estimate(result.name, suite)
        if mean is not None and speed is not None and speed.n:
            words = f"{interval_in_words(speed.score, speed.interval)} times dense"
            points.append(_Point(result, speed.score, mean, words, speed.interval))
    _draw(axes, results, points)
    axes.axvline(1.0, color="0.25", linewidth=1.0)
    _finish(axes, "speed over the dense model's, measured here", "Speed against what was retained")
    _name(axes, points)
    caption = (
        "Tokens a second over the dense model's, measured in turns on this hardware. Zeros and quantised weights in "
        f"dense storage run as dense ones do. Mean over {_asked(results)}; bars: 95 % intervals."
    )
    return figure, caption


def _perplexity_against_capability(results: Results, suite: str) -> tuple[Figure, str]:
    """Right: perplexity says it is worse. Down: tasks say so. What lies low on the left is what perplexity hides."""
    figure, axes = plt.subplots()
    axes.plot(1.0, 100, marker="*", markersize=13, color="0.2", linestyle="none", label="dense")
    points = []
    for result in results.compressed:
        mean, pair = results.mean_retained(result.name), results.comparison(result.name, suite)
        if mean is not None and pair is not None and pair.retained > 0:
            x, wide = 1 / pair.retained, _inverse(pair.interval)
            words = f"perplexity {interval_in_words(x, wide)} times dense"
            points.append(_Point(result, x, mean, words, wide))
    _draw(axes, results, points)
    reached = [end for point in points for end in (point.x, point.wide.high if point.wide else 0.0) if isfinite(end)]
    largest = max([1.0, *reached])
    axes.axvspan(1.0, 1 + results.perplexity_margin, color="0.25", alpha=0.08, linewidth=0)
    smallest = min([0.95, *(point.x for point in points), *(p.wide.low for p in points if p.wide and p.wide.low > 0)])
    axes.set_xlim(left=0.95 * smallest, right=1.25 * max(largest, 1 + 2 * results.perplexity_margin))
    logarithmic(axes, "x", "g")
    _finish(axes, "perplexity over the dense model's", "Perplexity against capability")
    _name(axes, points)
    caption = (
        f"Each setting's perplexity ({suite}, logarithmic) beside the mean share of the dense score that is left over "
        f"{_asked(results)}; bars: 95 % intervals. Grey: perplexity rises by at most "
        f"{results.perplexity_margin:.0%}; what lies below the dashed line there looks fine by perplexity and is not."
    )
    return figure, caption


def _inverse(interval: Interval) -> Interval:
    low, high = (1 / end if end else float("nan") for end in (interval.high, interval.low))
    return Interval(low, high)
