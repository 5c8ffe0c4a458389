"""Figures of a training run: loss and whatever else its history tells, against tokens."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from kick import distributed
from kick.report.figures.style import COLOURS, DASHES, in_style

from .history import HISTORY, History

_STRUCTURES = ("layer", "hidden", "head", "intermediate")


def draw(history: History, folder: Path) -> None:
    """Put history.jsonl and the figure of it, training.svg and .png, into `folder`. The first process does it."""
    if distributed.is_main():
        _draw(history, folder)
    distributed.wait()


def _draw(history: History, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(history.path, folder / HISTORY)
    told = set().union(*history.rows) if history.rows else set()
    panels: list[Callable[[Axes, History], None]] = [_loss]
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
    rows = -(-len(panels) // columns)
    with in_style():
        figure, axes = plt.subplots(
            rows, columns, figsize=(5.2 * columns, 3.4 * rows), squeeze=False, layout="constrained"
        )
        for axis, panel in zip(axes.flat, panels, strict=False):
            panel(axis, history)
            axis.set_xlabel("tokens seen")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        figure.savefig(folder / "training.svg", metadata={"Date": None, "Creator": "kick"})
        figure.savefig(folder / "training.png", metadata={"Software": "kick"})
        plt.close(figure)


def _line(axes: Axes, history: History, name: str, nth: int, **style: Any) -> None:
    steps, values = history.column(name)
    if steps:
        axes.plot(_tokens(history)[steps], values, color=COLOURS[nth % len(COLOURS)], **{"lw": 1.4, **style})


def _tokens(history: History) -> np.ndarray:
    """[steps] seen up to and with each step."""
    return np.cumsum([row["tokens"] for row in history.rows])


def _loss(axes: Axes, history: History) -> None:
    name = "cross_entropy" if "cross_entropy" in history.rows[0] else "loss"
    _line(axes, history, name, 0, alpha=0.35, lw=0.8)
    steps, values = history.column(name)
    width = max(1, len(values) // 20)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(_tokens(history)[steps][width - 1 :], smooth, color=COLOURS[0], lw=1.8, label=f"mean of {width} steps")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.legend()


def _flips(axes: Axes, history: History) -> None:
    _line(axes, history, "flip_rate", 0, label="since the last masks")
    _line(axes, history, "initial_flip_rate", 1, linestyle="--", label="since the first masks")
    axes.set_ylabel("masks that changed (share of weights)")
    axes.legend()


def _open(axes: Axes, history: History) -> None:
    for nth, name in enumerate(_STRUCTURES):
        steps, values = history.column(f"open_{name}")
        share = np.array(values) / history.rows[0][f"open_{name}"]
        axes.plot(_tokens(history)[steps], share, color=COLOURS[nth], linestyle=DASHES[nth], lw=1.5, label=name)
    axes.set_ylabel("expected open units (share)")
    axes.legend()


def _multipliers(axes: Axes, history: History) -> None:
    for nth, name in enumerate(_STRUCTURES):
        _line(axes, history, f"lambda_{name}", nth, linestyle=DASHES[nth], label=name)
    axes.set_ylabel("multiplier λ")
    axes.legend()


def _domain_losses(axes: Axes, history: History) -> None:
    _by_domain(axes, history, "domain_loss", "held-out loss (nats per token)")


def _domain_weights(axes: Axes, history: History) -> None:
    _by_domain(axes, history, "domain_weight", "weight in the mixture")


def _by_domain(axes: Axes, history: History, key: str, label: str) -> None:
    rows = [row for row in history.rows if key in row]
    tokens = _tokens(history)[[row["step"] for row in rows]]
    for nth, name in enumerate(rows[0][key]):
        style = {"color": COLOURS[nth % len(COLOURS)], "linestyle": DASHES[nth % len(DASHES)]}
        axes.plot(tokens, [row[key][name] for row in rows], marker="o", ms=3, lw=1.3, label=name, **style)
    axes.set_ylabel(label)
    axes.legend(fontsize=7.5, ncols=2)
