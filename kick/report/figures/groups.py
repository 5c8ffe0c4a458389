"""Where a suite's questions fall into groups (subjects, lengths, turns) or have criteria: which of them were lost."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from kick.report.figures.style import MAP, Planned, hint_patch, shown_settings, title
from kick.report.results import FEWEST_IN_MEANS, Key, Results, SettingResult
from kick.settings import DENSE
from kick.suite import OVERALL

_MOST_ROWS = 80
_FULL = 1.2  # shares above are shown as this


def planned(results: Results) -> Iterator[Planned]:
    for suite in results.suites:
        compressed = [result for result in results.compressed if results.get(result.name, suite).comparisons]
        if not compressed:
            continue
        groups = [key for key in _keys(results, suite) if key[0] == results.metric(suite).name and key[1] != OVERALL]
        telling = [key for key in groups if results.get(DENSE, suite).estimates[key].signal]
        overall = results.estimate(DENSE, suite)  # among many groups of a guesser some look as if it knew
        if len(telling) > 1 and not results.metric(suite).descriptive and overall is not None and overall.signal:
            draw = partial(_map, results, suite, compressed, telling, "group", len(groups) - len(telling))
            yield Planned(f"{suite}-by-group", f"{suite} by group", draw)
        criteria = [
            (metric.name, OVERALL)
            for metric in results.suites[suite].judged_metrics
            if not metric.descriptive and (metric.name, OVERALL) in _keys(results, suite)
        ]
        if len(criteria) > 1:
            draw = partial(_map, results, suite, compressed, criteria, "criterion")
            yield Planned(f"{suite}-by-criterion", f"{suite} by criterion", draw)


def _keys(results: Results, suite: str) -> list[Key]:
    """(metric, group) of everything that the dense model was scored on, with questions enough to say something."""
    return [key for key, found in results.get(DENSE, suite).estimates.items() if found.n >= FEWEST_IN_MEANS]


def _map(
    results: Results, suite: str, compressed: Sequence[SettingResult], keys: Sequence[Key], what: str, without: int = 0
) -> tuple[Figure, str]:
    """The retained share of each group (down) in each setting (across). without: groups that have no signal."""
    dense = results.get(DENSE, suite)
    rows = sorted(keys, key=lambda key: -dense.estimates[key].n)[:_MOST_ROWS]  # sums of groups stand above their parts
    settings, left_out = shown_settings(compressed)
    shares = np.full((len(rows), len(settings)), np.nan)
    for column, result in enumerate(settings):
        for row, key in enumerate(rows):
            pair = results.get(result.name, suite).comparisons.get(key)
            if pair is not None and pair.verdict != "no signal":
                shares[row, column] = pair.retained
    figure, axes = plt.subplots(figsize=(2.6 + 0.28 * max(4, len(settings)), 1.6 + 0.19 * max(6, len(rows))))
    colours = plt.get_cmap(MAP).with_extremes(bad="0.85")
    image = axes.pcolormesh(
        100 * np.clip(np.ma.masked_invalid(shares), 0, _FULL), cmap=colours, vmin=0, vmax=100 * _FULL,
        edgecolors="white", linewidth=0.3,
    )  # fmt: skip
    axes.set_facecolor("0.85")
    for column, result in enumerate(settings):
        for row, key in enumerate(rows):
            own = results.get(result.name, suite)
            if key in own.estimates and key in own.comparisons:
                pair, found = own.comparisons[key], own.estimates[key]
                cell = plt.Rectangle((column, row), 1, 1, facecolor="none", edgecolor="none", alpha=0.0, fill=True)
                axes.add_patch(cell)
                words = f"{result.name}, {key[1] if what == 'group' else key[0]}: {found.score:.3g} of {pair.dense:.3g}"
                hint_patch(cell, f"{words}, {pair.verdict}, n {pair.n}", unseen=True)
    axes.set_xticks(np.arange(len(settings)) + 0.5, [r.name for r in settings], rotation=90, fontsize=7)
    names = [(key[1] if what == "group" else key[0]).replace("_", " ") for key in rows]
    labels = [f"{name} ({dense.estimates[key].n})" for name, key in zip(names, rows, strict=True)]
    axes.set_yticks(np.arange(len(rows)) + 0.5, labels, fontsize=7)
    axes.invert_yaxis()
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label("of the dense score retained (%)", fontsize=8)
    title(axes, f"{suite} by {what}")
    caption = (
        f"Share of the dense score that is left, by {what} (number of questions in brackets); "
        f"{100 * _FULL:.0f} % stands for all that is more. "
        + (
            f"Not here: {without} of {without + len(keys)}, on which the dense model is not clearly above chance. "
            if without
            else ""
        )
        + (f"The {len(rows)} largest of {len(keys)} are shown. " if len(rows) < len(keys) else "")
        + f"Groups are small: single cells are uncertain, and among many some look lost or kept by chance.{left_out}"
    )
    return figure, caption
