"""Figures: score against sparsity for each suite, perplexity against sparsity, size against what was retained.

One style for all: Okabe and Ito's colours with a marker and a dash of its own for each method, so that they can be told
apart without colour. SVG keeps text as text; both files are the same bytes for the same results.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kick.compare import Estimate
from kick.files import safe_name
from kick.report.results import Axis, Results, SettingResult
from kick.report.tables import PERPLEXITY_MARGIN
from kick.settings import DENSE
from kick.statistics import TOLERANCE

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
_PATTERN_STEP = 1.5  # points of sparsity between methods whose patterns would lie on one another
_STYLE = {
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 110,
    "savefig.dpi": 180,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "kick",
}


@dataclass(frozen=True)
class Drawn:
    """A figure on disk. `caption` says what is shown, with n and the meaning of the band."""

    name: str
    title: str
    caption: str
    svg: Path


def draw_all(results: Results, folder: Path) -> list[Drawn]:
    """Every figure that the results support, as SVG and PNG into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with plt.rc_context(_STYLE):
        for suite in results.suites:
            if (dense := results.estimate(DENSE, suite)) is not None and dense.n > 0:
                drawn += [
                    _save(folder, *_score_against(axis, results, suite)) for axis in _AXES if results.families_on(axis)
                ]
        if results.task_suites and any(results.mean_retained(result.name) for result in results.compressed):
            drawn.append(_save(folder, *_size_against_retained(results)))
            if results.perplexity_suite is not None:
                drawn.insert(0, _save(folder, *_perplexity_against_capability(results, results.perplexity_suite)))
    return drawn


def _save(folder: Path, figure: Figure, name: str, title: str, caption: str) -> Drawn:
    name = safe_name(name)
    svg = folder / f"{name}.svg"
    figure.savefig(svg, metadata={"Date": None, "Creator": "kick"}, bbox_inches="tight")
    figure.savefig(folder / f"{name}.png", metadata={"Software": "kick"}, bbox_inches="tight")
    plt.close(figure)
    return Drawn(name, title, caption, svg)


def _method_style(results: Results, family: str) -> dict[str, Any]:
    """One colour, marker and dash for each compressor; its N:M patterns share the colour."""
    methods = list(dict.fromkeys(name.removesuffix(" N:M") for name in results.families))
    place = methods.index(family.removesuffix(" N:M"))
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _DASHES[place % len(_DASHES)],
    }


_AXES: dict[Axis, str] = {
    "sparsity": "sparsity of the pruned layers, measured (%)",
    "bits": "bits a weight of the blocks, with scales and zero points",
    "size": "parameters removed, measured (%)",
}


def _score_against(axis: Axis, results: Results, suite: str) -> tuple[Figure, str, str, str]:
    metric = results.metric(suite)
    dense = results.estimate(DENSE, suite)
    assert dense is not None
    figure, axes = plt.subplots()
    percent = metric.unit.startswith("share")
    scale = 100.0 if percent else 1.0

    axes.axhline(dense.score * scale, color="0.25", linewidth=1.2)
    _label_line(axes, dense.score * scale, "dense", "above" if metric.higher_is_better else "below")
    if not metric.descriptive:
        limit = dense.score * (1 - TOLERANCE) if metric.higher_is_better else dense.score / (1 - TOLERANCE)
        axes.axhline(limit * scale, color="0.25", linewidth=1.0, linestyle=(0, (4, 3)))
        _label_line(axes, limit * scale, "95 % of dense", "below" if metric.higher_is_better else "above")
    axes.axhspan(dense.interval.low * scale, dense.interval.high * scale, color="0.25", alpha=0.08, linewidth=0)
    if metric.chance is not None:
        axes.axhline(metric.chance * scale, color="0.55", linewidth=1.0, linestyle=":")
        _label_line(axes, metric.chance * scale, "chance")

    _draw_families(axes, axis, results, suite, scale, dense)
    axes.set_xlabel(_AXES[axis])
    axes.set_ylabel(
        f"{metric.name.replace('_', ' ')}{' (%)' if percent else f' ({metric.unit})' if metric.unit else ''}"
    )
    if metric.transform == "exp":
        axes.set_yscale("log")
        _name_ticks(axes.yaxis, ",.0f")
    if axis == "bits":
        axes.invert_xaxis()  # compression grows to the right everywhere
    else:
        axes.set_xlim(left=min(-1.5, axes.get_xlim()[0]) if axis == "size" else -1.5)  # dense stands at 0
    axes.set_title(f"{suite}: {metric.name.replace('_', ' ')} against {axis}", loc="left", fontsize=11)
    axes.legend(loc="best", fontsize=9)
    caption = (
        f"n = {dense.n}. Bands and bars: 95 % intervals; grey: the dense model's own."
        + ("" if metric.descriptive else " Dashed: where 5 % of the dense score is lost.")
        + (
            " Patterns stand side by side at their sparsity."
            if any(f.endswith(" N:M") for f in results.families_on(axis))
            else ""
        )
        + (" Logarithmic scale; lower is better." if metric.transform == "exp" else "")
        + (f" Dotted: chance, {metric.chance * scale:g}{' %' if percent else ''}." if metric.chance is not None else "")
    )
    if not dense.signal:
        caption += " The dense model is not clearly above chance: this suite says nothing about it."
    return figure, f"{suite}-against-{axis}", f"{suite} against {axis}", caption


def _place(axis: Axis, result: SettingResult) -> float | None:
    """Where a setting stands on the axis, as measured."""
    if axis == "bits":
        return result.bits_per_weight
    if axis == "size":
        return None if result.parameters_removed is None else 100 * result.parameters_removed
    return None if result.sparsity is None else 100 * result.sparsity


def _draw_families(axes: Axes, axis: Axis, results: Results, suite: str, scale: float, dense: Estimate) -> None:
    """Lines with bands, from dense on; what stands alone as points with bars, patterns named and side by side."""
    patterns = [family for family in results.families if family.endswith(" N:M")]
    for family in results.families_on(axis):
        style = _method_style(results, family)
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
        alone = points[0][2].stands_alone
        beside = _PATTERN_STEP * (patterns.index(family) - (len(patterns) - 1) / 2) if family in patterns else 0.0
        curve = [(place, found) for place, found, _ in points]
        if axis != "bits" and not alone:
            curve.insert(0, (0.0, dense))
        first = len(curve) - len(points)  # dense is a line of its own, and takes no marker
        x = np.array([place + beside for place, _ in curve])
        y = np.array([found.score for _, found in curve]) * scale
        low = np.array([found.interval.low for _, found in curve]) * scale
        high = np.array([found.interval.high for _, found in curve]) * scale
        if alone:
            axes.errorbar(
                x, y, yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)], label=family, color=style["color"],
                marker=style["marker"], markerfacecolor="white", markersize=7, linestyle="none", capsize=3, zorder=4,
            )  # fmt: skip
            for place, score, (_, _, result) in zip(x, y, points, strict=True):
                axes.annotate(
                    result.setting.level, (place, score), xytext=(-7 if beside < 0 else 7, 3),
                    textcoords="offset points", ha="right" if beside < 0 else "left", fontsize=8,
                )  # fmt: skip
        else:
            axes.plot(
                x, y, label=family, linewidth=1.8, markersize=5.5, markevery=range(first, len(x)), zorder=3, **style
            )
            axes.fill_between(x, low, high, color=style["color"], alpha=0.16, linewidth=0)


def _label_line(axes: Axes, y: float, text: str, side: str = "center") -> None:
    """Name a horizontal line, to the right of the axes where no curve runs."""
    axes.annotate(
        text, (1.0, y), xycoords=("axes fraction", "data"), xytext=(4, {"above": 3, "below": -3}.get(side, 0)),
        textcoords="offset points", ha="left", va="center", fontsize=8, color="0.3", annotation_clip=False,
    )  # fmt: skip


def _name_ticks(axis: Any, form: str) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, written in `form`."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: format(value, form)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))


def _bars(value: float, low: float, high: float) -> list[list[float]]:
    """An interval as matplotlib wants it: how far it reaches below and above."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _finish_retained(axes: Axes, xlabel: str, title: str) -> None:
    """What all figures of the mean retained score have in common."""
    axes.axhline(100 * (1 - TOLERANCE), color="0.25", linewidth=1.0, linestyle=(0, (4, 3)))
    _label_line(axes, 100 * (1 - TOLERANCE), "95 % of dense")
    axes.set_xlabel(xlabel)
    axes.set_ylabel("mean retained score (%)")
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(loc="best", fontsize=9)


def _size_against_retained(results: Results) -> tuple[Figure, str, str, str]:
    """What is on disk, and beside it what the weights would take packed."""
    figure, axes = plt.subplots()
    dense = next(result for result in results.settings if result.setting.is_dense)
    if dense.record:
        axes.plot(
            dense.record["bytes"] / 1e6, 100, marker="*", markersize=13, color="0.2", linestyle="none", label="dense"
        )
    labelled: set[str] = set()
    for result in results.compressed:
        mean = results.mean_retained(result.name)
        if mean is None or result.record is None:
            continue
        style = _method_style(results, result.family)
        method = result.family.removesuffix(" N:M")
        y = 100 * mean[0]
        disk, packed = result.record["bytes"] / 1e6, _packed_bytes(result.record) / 1e6
        bars = _bars(y, 100 * mean[1].low, 100 * mean[1].high)
        axes.plot([packed, disk], [y, y], color=style["color"], linewidth=0.7, alpha=0.5)
        axes.errorbar(
            packed,
            y,
            yerr=bars,
            color=style["color"],
            marker=style["marker"],
            markerfacecolor="white",
            capsize=2,
            linewidth=0.9,
        )
        axes.plot(
            disk,
            y,
            color=style["color"],
            marker=style["marker"],
            linestyle="none",
            label=None if method in labelled else method,
        )
        labelled.add(method)
        axes.annotate(
            result.setting.levels, (packed, y), xytext=(0, 6), textcoords="offset points", ha="right", fontsize=7.5
        )
    _finish_retained(axes, "megabytes of weights", "Size against what was retained")
    caption = (
        "Filled: bytes on disk, where a zero or a quantised weight takes the room of any other. Open: packed, as codes "
        "with their scales (kick export) or, of pruned layers, as non-zero weights and a bit mask (a format that "
        "nothing here stores or runs). "
        f"Mean over {', '.join(results.task_suites)}; bars: 95 % intervals."
    )
    return figure, "size-against-retained", "Size against mean retained score", caption


def _perplexity_against_capability(results: Results, suite: str) -> tuple[Figure, str, str, str]:
    """Right: perplexity says it is worse. Down: tasks say so. What lies low on the left is what perplexity hides."""
    figure, axes = plt.subplots()
    axes.plot(1.0, 100, marker="*", markersize=13, color="0.2", linestyle="none", label="dense")
    labelled: set[str] = set()
    largest = 1.0
    for result in results.compressed:
        mean, pair = results.mean_retained(result.name), results.comparison(result.name, suite)
        if mean is None or pair is None or not pair.retained > 0:
            continue
        style = _method_style(results, result.family)
        method = result.family.removesuffix(" N:M")
        x, y = 1 / pair.retained, 100 * mean[0]
        wide = _bars(x, 1 / pair.interval.high, 1 / pair.interval.low)
        tall = _bars(y, 100 * mean[1].low, 100 * mean[1].high)
        axes.errorbar(
            x, y, xerr=wide, yerr=tall, color=style["color"], marker=style["marker"], markersize=5.5, capsize=2,
            linewidth=0.9, linestyle="none", label=None if method in labelled else method, zorder=3,
        )  # fmt: skip
        labelled.add(method)
        largest = max(largest, x)
        axes.annotate(result.setting.levels, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7.5)
    axes.axvspan(1.0, 1 + PERPLEXITY_MARGIN, color="0.25", alpha=0.08, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlim(left=0.9, right=1.15 * max(largest, 1 + 2 * PERPLEXITY_MARGIN))
    _name_ticks(axes.xaxis, "g")
    _finish_retained(axes, "perplexity over the dense model's", "Perplexity against capability")
    caption = (
        f"Each setting's perplexity ({suite}, logarithmic) beside the mean share of the dense score that is left over "
        f"{', '.join(results.task_suites)}; bars: 95 % intervals. Grey: perplexity rises by at most "
        f"{PERPLEXITY_MARGIN:.0%}; what lies below the dashed line there looks fine by perplexity and is not."
    )
    return figure, "perplexity-against-capability", "Perplexity against capability", caption


def _packed_bytes(record: dict[str, Any]) -> float:
    """Bytes with each linear as codes and scales, or as its non-zero weights and a bit mask, whichever is smaller."""
    stored = 8 * getattr(torch, record["dtype"]).itemsize
    bits = 0.0
    for layer in record["layers"].values():
        weights, each = layer["weights"], layer["bits_per_weight"]
        bits += min(weights * each, (weights - layer["zeros"]) * each + weights) - weights * stored
    return record["bytes"] + bits / 8
