"""Figures of training: loss and whatever else a history tells, against tokens."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kick.report.figures.style import COLOURS, DASHES, Planned
from kick.report.results import Results

Rows = list[dict[str, Any]]  # a history: one for each step
_STRUCTURES = ("layer", "hidden", "head", "intermediate")


def planned(results: Results) -> Iterator[Planned]:
    """One for each stretch of training of each setting."""
    for result in results.compressed:
        for stretch, rows in result.histories.items():
            heading = f"Training of {result.name}: {stretch}"
            yield Planned(
                f"training-{result.name}-{stretch.replace('/', '-')}", heading, partial(_captioned, heading, rows)
            )


def _captioned(heading: str, rows: Rows) -> tuple[Figure, str]:
    tokens = sum(row["tokens"] for row in rows)
    return draw(rows), f"{heading}. {len(rows):,} steps, {tokens:,} tokens; thin: each step, thick: running means."


def draw(rows: Rows) -> Figure:
    """A panel for the loss and for each other thing that `rows` tell."""
    told = set().union(*rows) if rows else set()
    panels: list[Callable[[Axes, Rows], None]] = [_loss]
    panels += [
        panel
        for key, panel in (
            ("flip_rate", _flips),
            ("open_layer", _open),
            ("lambda_layer", _multipliers),
            ("domain_loss", _domain_losses),
            ("domain_weight", _domain_weights),
        )
        if key in told
    ]
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    size = (5.2 * columns, 3.4 * height)
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel(axis, rows)
        axis.set_xlabel("tokens seen")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    return figure


def _column(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """(places of rows, values) of the steps that tell `name`."""
    found = [(place, row[name]) for place, row in enumerate(rows) if isinstance(row.get(name), int | float)]
    return [place for place, _ in found], [value for _, value in found]


def _line(axes: Axes, rows: Rows, name: str, nth: int, **style: Any) -> None:
    steps, values = _column(rows, name)
    if steps:
        axes.plot(_tokens(rows)[steps], values, color=COLOURS[nth % len(COLOURS)], **{"lw": 1.4, **style})


def _tokens(rows: Rows) -> np.ndarray:
    """[steps] seen up to and with each step."""
    return np.cumsum([row["tokens"] for row in rows])


def _loss(axes: Axes, rows: Rows) -> None:
    name = "cross_entropy" if "cross_entropy" in rows[0] else "loss"
    _line(axes, rows, name, 0, alpha=0.35, lw=0.8)
    steps, values = _column(rows, name)
    width = max(1, len(values) // 20)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(_tokens(rows)[steps][width - 1 :], smooth, color=COLOURS[0], lw=1.8, label=f"mean of {width} steps")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.legend()


def _flips(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "flip_rate", 0, label="since the last masks")
    _line(axes, rows, "initial_flip_rate", 1, linestyle="--", label="since the first masks")
    axes.set_ylabel("masks that changed (share of weights)")
    axes.legend()


def _open(axes: Axes, rows: Rows) -> None:
    for nth, name in enumerate(_STRUCTURES):
        steps, values = _column(rows, f"open_{name}")
        share = np.array(values) / rows[0][f"open_{name}"]
        axes.plot(_tokens(rows)[steps], share, color=COLOURS[nth], linestyle=DASHES[nth], lw=1.5, label=name)
    axes.set_ylabel("expected open units (share)")
    axes.legend()


def _multipliers(axes: Axes, rows: Rows) -> None:
    for nth, name in enumerate(_STRUCTURES):
        _line(axes, rows, f"lambda_{name}", nth, linestyle=DASHES[nth], label=f"λ {name}")
        _line(axes, rows, f"phi_{name}", nth, linestyle=DASHES[nth], alpha=0.4, label=f"φ {name}")
    axes.set_ylabel("multipliers")
    axes.legend(fontsize=7.5, ncols=2)


def _domain_losses(axes: Axes, rows: Rows) -> None:
    _by_domain(axes, rows, "domain_loss", "held-out loss (nats per token)")
    references: dict[str, float] = next((row["domain_reference"] for row in rows if "domain_reference" in row), {})
    for nth, value in enumerate(references.values()):
        axes.axhline(value, color=COLOURS[nth % len(COLOURS)], linestyle=(0, (1, 2)), lw=0.9, zorder=1)
    if references:
        axes.set_ylabel("held-out loss (nats per token); dotted: reference", fontsize=8)


def _domain_weights(axes: Axes, rows: Rows) -> None:
    _by_domain(axes, rows, "domain_weight", "weight in the mixture")


def _by_domain(axes: Axes, rows: Rows, key: str, label: str) -> None:
    places = [place for place, row in enumerate(rows) if key in row]
    tokens = _tokens(rows)[places]
    for nth, name in enumerate(rows[places[0]][key]):
        style = {"color": COLOURS[nth % len(COLOURS)], "linestyle": DASHES[nth % len(DASHES)]}
        axes.plot(tokens, [rows[place][key][name] for place in places], marker="o", ms=3, lw=1.3, label=name, **style)
    axes.set_ylabel(label)
    axes.legend(fontsize=7.5, ncols=2)
