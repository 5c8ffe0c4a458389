"""Small and dense, or large and sparse: models of several sizes, dense and compressed, against their bytes."""

from collections.abc import Sequence
from functools import partial

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from kick.measured import packed_bytes
from kick.report.figures.style import (
    Planned,
    bars,
    hint,
    interval_in_words,
    label_points,
    legend,
    logarithmic,
    name_of,
    nth_style,
    scale_of,
    title,
)
from kick.report.results import Results
from kick.settings import DENSE


def planned(runs: Sequence[Results]) -> list[Planned]:
    """A figure for each suite that several models answered."""
    found = []
    for suite in dict.fromkeys(suite for results in runs for suite in results.suites):
        own = [results for results in runs if suite in results.suites and results.estimate(DENSE, suite) is not None]
        if len({results.run["model"]["name"] for results in own}) > 1 and not own[0].metric(suite).descriptive:
            found.append(Planned(f"{suite}-against-bytes", f"{suite} against bytes", partial(_draw, own, suite)))
    return found


def _draw(runs: Sequence[Results], suite: str) -> tuple[Figure, str]:
    figure, axes = plt.subplots(figsize=(7.0, 4.4))
    metric = runs[0].metric(suite)
    scale = scale_of(metric)
    dense: list[tuple[float, float]] = []
    names: list[tuple[float, float, str]] = []
    for number, results in enumerate(runs):
        style = nth_style(number)
        for result in results.settings:
            found = results.estimate(result.name, suite)
            if found is None or result.record is None or (result.setting.is_dense and result.name != DENSE):
                continue
            x, y = packed_bytes(result.record) / 1e6, found.score * scale
            is_dense = result.name == DENSE
            if is_dense:
                dense.append((x, y))
            name = results.run["model"]["name"]
            axes.errorbar(
                x, y, yerr=bars(y, found.interval.low * scale, found.interval.high * scale), color=style["color"],
                marker=style["marker"], markersize=10 if is_dense else 5, markerfacecolor=None if is_dense else "white",
                linestyle="none", capsize=2, linewidth=0.9, label=f"{name}, dense" if is_dense else None, zorder=4,
            )  # fmt: skip
            if not is_dense:
                names.append((x, y, result.name))
            hint(axes, x, y, f"{name} {result.name}: {interval_in_words(found.score, found.interval)}, {x:.0f} MB")
    dense.sort()
    axes.plot([x for x, _ in dense], [y for _, y in dense], color="0.35", linewidth=1.2, zorder=2)
    logarithmic(axes, "x", ",g")
    axes.set_xlabel("megabytes of weights, packed (logarithmic)")
    axes.set_ylabel(name_of(metric))
    if metric.transform == "exp":
        logarithmic(axes, "y", ",.4g")
    title(axes, f"{suite}: small and dense, or large and sparse")
    legend(axes, len(runs))
    label_points(axes, names, size=6.5)
    better = "above" if metric.higher_is_better else "below"
    n = max(found.n for results in runs if (found := results.estimate(DENSE, suite)) is not None)
    return figure, (
        f"n = {n}. Filled and joined: dense models. Open: compressed ones, at their packed bytes. What lies {better} "
        "the line is worth more than a dense model of its bytes. Bars: 95 % intervals."
    )
