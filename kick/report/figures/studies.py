"""One thing varied at a time: calibration, a compressor's or a suite's parameter, seeds."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kick.compare import Estimate
from kick.report.figures.style import (
    Planned,
    bars,
    hint,
    interval_in_words,
    label_lines,
    legend,
    logarithmic,
    name_of,
    nth_style,
    scale_of,
    shown_settings,
    title,
)
from kick.report.results import Results, SettingResult
from kick.settings import DENSE, variation_in_words
from kick.suite import Metric

Point = tuple[Any, Estimate, str]  # value of what is varied, score, name
_MOST_LINES = 12


def planned(results: Results) -> Iterator[Planned]:
    for key in dict.fromkeys(key for result in results.compressed for key in result.setting.variation):
        short = key.rpartition(".")[2]
        for suite in results.suites:
            if _settings_by_line(results, key, suite):
                draw = partial(_settings, results, key, suite)
                yield Planned(f"{suite}-over-{short}", f"{suite} against {short}", draw)
    for group in _suites_that_differ(results):
        yield Planned(group.heading.replace(" ", "-"), group.heading, partial(_suites, results, group))


@dataclass(frozen=True)
class _Suites:
    """Suites of one kind, asked the same questions, that differ in the parameter `key` alone."""

    names: list[str]
    key: str
    values: list[Any]
    heading: str


def _settings_by_line(results: Results, key: str, suite: str) -> dict[str, list[Point]]:
    """A line for each setting but for what `key` varies; seeds of one value stand at the same place."""
    lines: dict[str, list[Point]] = {}
    for result in results.compressed:
        found = results.estimate(result.name, suite)
        if key in result.setting.variation and found is not None:
            lines.setdefault(_without(result, key), []).append((result.setting.variation[key], found, result.name))
    return {name: points for name, points in lines.items() if len({str(value) for value, _, _ in points}) > 1}


def _without(result: SettingResult, key: str) -> str:
    level = f"@{result.setting.level}" if result.setting.level else ""
    others = " ".join(f"{k.rpartition('.')[2]}={v}" for k, v in result.setting.variation.items() if k != key)
    return f"{result.setting.method}{level} {others}".strip()


def _settings(results: Results, key: str, suite: str) -> tuple[Figure, str]:
    figure, axes = plt.subplots()
    metric = results.metric(suite)
    dense = results.estimate(DENSE, suite)
    _draw(axes, _settings_by_line(results, key, suite), metric)
    scale = scale_of(metric)
    if dense is not None:
        axes.axhline(dense.score * scale, color="0.25", linewidth=1.2)
        label_lines(axes, {"dense": dense.score * scale})
    short = key.rpartition(".")[2].replace("_", " ")
    _finish(axes, short + (" of calibration" if key.startswith("calibration.") else ""), metric, f"{suite}: {short}")
    n = dense.n if dense else 0
    caption = f"Score against {short}, all else equal; n = {n}, bars: 95 % intervals. Points at one place are seeds."
    return figure, caption


def _suites_that_differ(results: Results) -> Iterator[_Suites]:
    suites = {name: suite for name, suite in results.run["suites"].items() if name in results.suites}
    for kind in dict.fromkeys(suite.get("suite", name) for name, suite in suites.items()):
        own = {name: suite["params"] for name, suite in suites.items() if suite.get("suite", name) == kind}
        for key in sorted({key for params in own.values() for key in params}):
            groups: dict[str, list[str]] = {}
            for name, params in own.items():
                fixed = sorted((k, repr(v)) for k, v in params.items() if k != key)
                asked = tuple(sample.id for sample in results.get(DENSE, name).samples)
                groups.setdefault(repr((fixed, hash(asked))), []).append(name)
            differing = [names for names in groups.values() if len({repr(own[name].get(key)) for name in names}) > 1]
            for names in differing:
                others = {k: v for k, v in own[names[0]].items() if k != key and _varies(own, k)}
                words = f" with {variation_in_words(others)}" if len(differing) > 1 and others else ""
                values = [own[name].get(key) for name in names]
                yield _Suites(names, key, values, f"{kind} by {key}{words}")


def _varies(params: dict[str, dict[str, Any]], key: str) -> bool:
    return len({repr(own.get(key)) for own in params.values()}) > 1


def _suites(results: Results, group: _Suites) -> tuple[Figure, str]:
    """Numbers along an axis with a line for each setting; words as markers side by side for each setting."""
    names, key, values, heading = group.names, group.key, group.values, group.heading
    figure, axes = plt.subplots(figsize=(7.4, 4.2))
    metric = results.metric(names[0])
    shown, left_out = shown_settings([r for r in results.settings if r.name == DENSE or not r.setting.is_dense])
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        lines = {
            result.name: [
                (value, found, result.name)
                for value, name in zip(values, names, strict=True)
                if (found := results.estimate(result.name, name))
            ]
            for result in shown[:_MOST_LINES]
        }
        _draw(axes, lines, metric)
        _finish(axes, key, metric, heading)
        if len(shown) > _MOST_LINES:
            left_out = f" The first {_MOST_LINES} of {len(shown)} settings."
    else:
        scale = scale_of(metric)
        for place, (value, name) in enumerate(zip(values, names, strict=True)):
            style = nth_style(place)
            for x, result in enumerate(shown):
                if (found := results.estimate(result.name, name)) is None:
                    continue
                at, y = x + 0.2 * (place - (len(values) - 1) / 2), found.score * scale
                reach = bars(y, found.interval.low * scale, found.interval.high * scale)
                axes.errorbar(
                    at, y, yerr=reach, color=style["color"], marker=style["marker"], linestyle="none", capsize=2,
                    linewidth=0.9, label=f"{key} {value}" if x == 0 else None,
                )  # fmt: skip
                hint(axes, at, y, f"{result.name}, {key} {value}: {interval_in_words(found.score, found.interval)}")
        axes.set_xticks(range(len(shown)), [result.name for result in shown], rotation=60, ha="right", fontsize=8)
        _finish(axes, "", metric, heading)
    dense = results.estimate(DENSE, names[0])
    n = dense.n if dense else 0
    return figure, f"The same questions asked with another {key}; n = {n} each, bars: 95 % intervals.{left_out}"


def _draw(axes: Axes, lines: dict[str, list[Point]], metric: Metric) -> None:
    """Each line through the means at its places, each point with its interval; words stand in the order they come."""
    scale = scale_of(metric)
    values = list({str(value): value for points in lines.values() for value, _, _ in points}.values())
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    places = {str(value): float(value) if numeric else index for index, value in enumerate(values)}
    for number, (name, points) in enumerate(lines.items()):
        style = nth_style(number)
        by_place: dict[float, list[Estimate]] = {}
        for value, found, setting in points:
            place, y = places[str(value)], found.score * scale
            by_place.setdefault(place, []).append(found)
            reach = bars(y, found.interval.low * scale, found.interval.high * scale)
            axes.errorbar(place, y, yerr=reach, color=style["color"], marker=style["marker"], markersize=5, capsize=2,
                          linewidth=0.9, linestyle="none")  # fmt: skip
            hint(axes, place, y, f"{setting}: {interval_in_words(found.score, found.interval)}, n {found.n}")
        line = sorted(by_place)
        means = [scale * sum(found.score for found in by_place[place]) / len(by_place[place]) for place in line]
        axes.plot(line, means, label=name, linewidth=1.6, markersize=5, **style)
    if numeric:
        if min(places.values()) > 0 and max(places.values()) >= 8 * min(places.values()):
            axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(places.values()), [f"{place:g}" for place in sorted(places.values())])
        axes.minorticks_off()
    else:
        axes.set_xticks(list(places.values()), list(places), fontsize=8)


def _finish(axes: Axes, xlabel: str, metric: Metric, heading: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(name_of(metric))
    if metric.transform == "exp":
        logarithmic(axes, "y", ",.4g")
    title(axes, heading)
    legend(axes, len(axes.get_legend_handles_labels()[0]))
