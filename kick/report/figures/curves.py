"""Score against how far the model is compressed: a line for each method, a point for each pattern, with intervals."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kick.compare import Estimate
from kick.levels import Pattern
from kick.report.figures.style import (
    Planned,
    bars,
    hint,
    interval_in_words,
    label_lines,
    label_points,
    legend,
    logarithmic,
    method_style,
    name_of,
    scale_of,
    title,
)
from kick.report.results import Axis, Results, SettingResult
from kick.settings import DENSE
from kick.statistics import TOLERANCE

_PATTERN_STEP = 1.3  # points of sparsity between patterns that would lie on one another

_AXES: dict[Axis, str] = {
    "sparsity": "sparsity of the blocks' weights, measured (%)",
    "bits": "bits a weight of the blocks, with scales and zero points",
    "size": "parameters removed, measured (%)",
}


def planned(results: Results) -> Iterator[Planned]:
    for suite in results.suites:
        dense = results.estimate(DENSE, suite)
        if dense is None or dense.n == 0:
            continue
        for axis in _AXES:
            if _families(results, axis, suite):
                draw = partial(_score_against, axis, results, suite)
                yield Planned(f"{suite}-against-{axis}", f"{suite} against {axis}", draw)


def _families(results: Results, axis: Axis, suite: str) -> list[str]:
    """The lines of a figure that have a point; what was varied at one level alone has a figure of its own (studies)."""
    found = []
    for family in results.families_on(axis):
        own = [result for result in results.compressed if result.family == family]
        is_study = own[0].setting.variation and len({result.setting.level for result in own}) == 1
        if not is_study and any(results.estimate(result.name, suite) for result in own):
            found.append(family)
    return found


def _score_against(axis: Axis, results: Results, suite: str) -> tuple[Figure, str]:
    metric = results.metric(suite)
    dense = results.estimate(DENSE, suite)
    assert dense is not None
    figure, axes = plt.subplots()
    scale = scale_of(metric)
    percent = scale == 100

    lines = {"dense": dense.score * scale}
    axes.axhline(dense.score * scale, color="0.25", linewidth=1.2)
    if not metric.descriptive:
        limit = dense.score * (1 - TOLERANCE) if metric.higher_is_better else dense.score / (1 - TOLERANCE)
        axes.axhline(limit * scale, color="0.25", linewidth=1.0, linestyle=(0, (4, 3)))
        lines["95 % of dense"] = limit * scale
    axes.axhspan(dense.interval.low * scale, dense.interval.high * scale, color="0.25", alpha=0.08, linewidth=0)
    if metric.chance is not None:
        axes.axhline(metric.chance * scale, color="0.55", linewidth=1.0, linestyle=":")
        lines["chance"] = metric.chance * scale

    names, seeds = _draw_families(axes, axis, results, suite, scale, dense)
    axes.set_xlabel(_AXES[axis])
    axes.set_ylabel(name_of(metric))
    if metric.transform == "exp":
        logarithmic(axes, "y", ",.0f")
    if axis == "bits":
        axes.invert_xaxis()  # compression grows to the right everywhere
    else:
        left = min(-1.5, axes.get_xlim()[0]) if axis == "size" else -1.5  # dense stands at 0
        axes.set_xlim(left, max(axes.get_xlim()[1], axes.dataLim.x1 + 0.04 * (axes.dataLim.x1 - left)))
    label_points(axes, names, size=8)
    title(axes, f"{suite}: {metric.name.replace('_', ' ')} against {axis}")
    families = _families(results, axis, suite)
    legend(axes, len(families))
    label_lines(axes, lines)
    caption = (
        f"n = {dense.n}. Bands and bars: 95 % intervals; grey: the dense model's own."
        + (" Of several seeds: their mean, each run, and a band from the lowest to the highest." if seeds else "")
        + (
            ""
            if metric.descriptive
            else " Dashed: where 5 % of the dense score is lost; verdicts are paired, and are not read off bars beside "
            "this line."
        )
        + (
            " Patterns of one sparsity stand side by side around it."
            if any(isinstance(r.level, Pattern) and r.family in families for r in results.compressed)
            else ""
        )
        + (" Logarithmic scale; lower is better." if metric.transform == "exp" else "")
        + (f" Dotted: chance, {metric.chance * scale:g}{' %' if percent else ''}." if metric.chance is not None else "")
    )
    if not dense.signal:
        caption += " The dense model is not clearly above chance: this suite says nothing about it."
    return figure, caption


def _place(axis: Axis, result: SettingResult) -> float | None:
    """Where a setting stands on the axis, as measured."""
    if axis == "bits":
        return result.bits_per_weight
    if axis == "size":
        return None if result.parameters_removed is None else 100 * result.parameters_removed
    return None if result.sparsity is None else 100 * result.sparsity


def _draw_families(
    axes: Axes, axis: Axis, results: Results, suite: str, scale: float, dense: Estimate
) -> tuple[list[tuple[float, float, str]], bool]:
    """Lines with bands, from dense on; what stands alone as points with bars, patterns side by side.

    The names of points, to be written when the axes have their limits, (x, y, name); whether some line is of seeds.
    """
    patterns: dict[int, list[str]] = {}  # by their sparsity, in whole points
    for result in results.compressed:
        if isinstance(result.level, Pattern) and (at := _place(axis, result)) is not None:
            patterns.setdefault(round(at), []).append(result.name)
    names: list[tuple[float, float, str]] = []
    seeds = False

    def beside(result: SettingResult) -> float:
        same = next((own for own in patterns.values() if result.name in own), [result.name])
        return _PATTERN_STEP * (same.index(result.name) - (len(same) - 1) / 2)

    percent = scale != 1.0
    for family in _families(results, axis, suite):
        points = [
            (place, found, result)
            for result in results.compressed
            if result.family == family
            and (place := _place(axis, result)) is not None
            and (found := results.estimate(result.name, suite))
        ]
        points.sort(key=lambda point: point[0])
        if not points:
            continue
        style = method_style(results, points[0][2].method)
        for place, found, result in points:
            words = interval_in_words(found.score, found.interval, percent)
            hint(axes, place + beside(result), found.score * scale, f"{result.name}: {words}, n {found.n}")
        alone = points[0][2].stands_alone
        if not alone and len({place for place, _, _ in points}) < len(points):
            _draw_seeds(axes, points, scale, style, family)
            seeds = True
            continue
        curve = [(place + beside(result), found) for place, found, result in points]
        if axis != "bits" and not alone:
            curve.insert(0, (0.0, dense))
        first = len(curve) - len(points)  # dense is a line of its own, and takes no marker
        x = np.array([place for place, _ in curve])
        y = np.array([found.score for _, found in curve]) * scale
        low = np.array([found.interval.low for _, found in curve]) * scale
        high = np.array([found.interval.high for _, found in curve]) * scale
        if alone:
            axes.errorbar(
                x, y, yerr=bars(y, low, high), label=family, color=style["color"],
                marker=style["marker"], markerfacecolor="white", markersize=7, linestyle="none", capsize=3, zorder=4,
            )  # fmt: skip
            names += [(u, v, result.setting.level) for u, v, (_, _, result) in zip(x, y, points, strict=True)]
        else:
            axes.plot(
                x, y, label=family, linewidth=1.8, markersize=5.5, markevery=range(first, len(x)), zorder=3, **style
            )
            axes.fill_between(x, low, high, color=style["color"], alpha=0.16, linewidth=0)
    return names, seeds


def _draw_seeds(axes: Axes, points: list[Any], scale: float, style: dict[str, Any], family: str) -> None:
    """Several runs of a level: a line through their means, each run a small point, the band from lowest to highest."""
    places = sorted({place for place, _, _ in points})
    scores = [[scale * found.score for own, found, _ in points if own == place] for place in places]
    axes.plot(places, [np.mean(own) for own in scores], label=f"{family} (mean of seeds)", linewidth=1.8, **style)
    axes.fill_between(
        places, [min(own) for own in scores], [max(own) for own in scores], color=style["color"], alpha=0.16
    )
    for place, own in zip(places, scores, strict=True):
        axes.plot([place] * len(own), own, linestyle="none", marker=".", color=style["color"], markersize=4)
