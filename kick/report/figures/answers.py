"""What happened to answers: which flipped, how long they are, how often they repeat themselves."""

from collections.abc import Iterator
from functools import partial

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from kick.report.figures.style import COLOURS, Planned, bars, hint, hint_patch, interval_in_words, shown_settings, title
from kick.report.results import Results, SettingResult
from kick.settings import DENSE
from kick.suite import OVERALL, Metric

_MOST_PANELS = 6


def planned(results: Results) -> Iterator[Planned]:
    for suite in results.suites:
        pairs = [results.comparison(result.name, suite) for result in results.compressed]
        if any(pair is not None and pair.flips for pair in pairs):
            yield Planned(f"{suite}-flips", f"{suite}: answers that changed", partial(_flips, results, suite))
    for suite in results.suites:
        if metrics := _described(results, suite):
            draw = partial(_descriptions, results, suite, metrics)
            yield Planned(f"{suite}-answers", f"{suite}: what answers are like", draw)


def _flips(results: Results, suite: str) -> tuple[Figure, str]:
    """Bars to both sides: what was lost below, what was won above. A score that stands still may hide both."""
    settings, left_out = shown_settings(results.compressed)
    found = [
        (result.name, pair)
        for result in settings
        if (pair := results.comparison(result.name, suite)) is not None and pair.lost is not None and pair.n
    ]
    figure, axes = plt.subplots(figsize=(max(5.0, 1.6 + 0.3 * len(found)), 3.8))
    for place, (name, pair) in enumerate(found):
        assert pair.won is not None
        assert pair.lost is not None
        for count, sign, colour, hatch, what in (
            (pair.won, 1, COLOURS[0], "", "wrong to right"),
            (pair.lost, -1, COLOURS[1], "//", "right to wrong"),
        ):
            height = sign * 100 * count / pair.n
            (bar,) = axes.bar(
                place, height, color=colour, hatch=hatch, edgecolor="white", label=what if place == 0 else None
            )
            hint_patch(bar, f"{name}: {count} of {pair.n} {what}")
    axes.axhline(0, color="0.25", linewidth=0.8)
    axes.set_xticks(range(len(found)), [name for name, _ in found], rotation=90, fontsize=8)
    axes.set_ylabel("share of questions (%)")
    title(axes, f"{suite}: answers that changed")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)
    low, high = axes.dataLim.y0, axes.dataLim.y1
    axes.set_ylim(low - 0.08 * (high - low), high + 0.16 * (high - low))  # the legend stands above the bars
    n = found[0][1].n if found else 0
    caption = f"Of n = {n} questions, those answered rightly by one of the dense and the compressed model alone."
    return figure, caption + left_out


def _described(results: Results, suite: str) -> list[Metric]:
    """Metrics that describe answers: lengths, repetition. Not those of a suite that gives no verdict at all.

    What is the same for all settings, the evidence that they were given for example, tells nothing about any of them.
    """
    if results.metric(suite).descriptive:
        return []
    found = []
    shown, _ = _shown(results)
    for metric in results.suites[suite].metrics:
        own = [results.get(result.name, suite).estimates.get((metric.name, OVERALL)) for result in shown]
        dense = results.get(DENSE, suite).estimates.get((metric.name, OVERALL))
        differs = len({estimate.score for estimate in own if estimate is not None and estimate.n}) > 1
        if metric.descriptive and dense is not None and dense.n and differs:
            found.append(metric)
    return found[:_MOST_PANELS]


def _shown(results: Results) -> tuple[list[SettingResult], str]:
    return shown_settings([r for r in results.settings if r.name == DENSE or not r.setting.is_dense])


def _descriptions(results: Results, suite: str, metrics: list[Metric]) -> tuple[Figure, str]:
    shown, left_out = _shown(results)
    columns = 2 if len(metrics) == 4 else min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(2.9 * columns + 0.06 * len(shown) * columns, 2.3 * lines + 0.9),
        sharex=True,
        squeeze=False,
    )
    for axes in grid.flat[len(metrics) :]:
        axes.set_visible(False)
    for axes, metric in zip(grid.flat, metrics, strict=False):
        for place, result in enumerate(shown):
            found = results.get(result.name, suite).estimates.get((metric.name, OVERALL))
            if found is None or not np.isfinite(found.score):
                continue
            axes.errorbar(
                place, found.score, yerr=bars(found.score, found.interval.low, found.interval.high), marker="o",
                color="0.2" if result.name == DENSE else COLOURS[0], markersize=4, capsize=2, linewidth=0.9,
            )  # fmt: skip
            hint(axes, place, found.score, f"{result.name}: {interval_in_words(found.score, found.interval)}")
        dense = results.get(DENSE, suite).estimates[metric.name, OVERALL]
        axes.axhline(dense.score, color="0.25", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_title(metric.name.replace("_", " "), loc="left", fontsize=9)
        axes.set_ylabel(metric.unit, fontsize=8)
        axes.set_xticks(range(len(shown)), [result.name for result in shown], rotation=90, fontsize=6.5)
        axes.tick_params(axis="x", labelbottom=True)
    figure.tight_layout()
    n = max(results.get(DENSE, suite).estimates[metric.name, OVERALL].n for metric in metrics)
    caption = f"What the answers to {suite} are like (n = {n}); dashed: the dense model's. Bars: 95 % intervals."
    return figure, caption + left_out
