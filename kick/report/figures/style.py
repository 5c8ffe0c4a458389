"""What all figures have in common: one style, a colour, marker and dash for each method, values that show on hover.

Colours are Okabe and Ito's, which people with colour blindness tell apart, and every method has a marker and a dash of
its own, so that figures survive print without colour. SVG keeps text as text.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import BboxBase

from kick.files import safe_name, write_bytes, write_text
from kick.report.results import Results, SettingResult
from kick.statistics import TOLERANCE, Interval
from kick.suite import Metric

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX<>"
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))
MAP = "cividis"  # lightness alone orders it: right for every eye and in grey
LOST = 100 * (1 - TOLERANCE)

_MANY_DECADES = 1000.0
_LINE_HEIGHT = 9.0  # points between names of lines

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
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a label may hold dollars
}


@dataclass(frozen=True)
class Planned:
    """A figure that can be drawn. `draw` gives it with its caption: what is shown, n, and the meaning of bars."""

    name: str
    title: str
    draw: Callable[[], tuple[Figure, str]]


@dataclass(frozen=True)
class Drawn:
    """A figure on disk. width: in inches, at the size that its letters are meant to have."""

    name: str
    title: str
    caption: str
    svg: Path
    width: float


_SCRIPTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans", "Noto Emoji", "Symbola")
"""Fonts that have what matplotlib's own lacks, where they are installed: names of settings are in any script."""


@contextmanager
def in_style() -> Iterator[None]:
    here = set(font_manager.get_font_names())
    fonts = {"font.family": ["DejaVu Sans", *(name for name in _SCRIPTS if name in here)]}
    with plt.rc_context({**_STYLE, **fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the SVG has the letters all the same
        yield


def file_name(planned: Planned) -> str:
    """Without its suffix; not every system has colons in the names of files."""
    return safe_name(planned.name).replace(":", "-")


def save(folder: Path, planned: Planned) -> Drawn:
    """SVG with values on hover, PNG and PDF."""
    figure, caption = planned.draw()
    name = file_name(planned)
    figure.draw_without_rendering()
    box = figure.get_tightbbox().padded(0.1)  # laid out once for all three
    _keep_places_of_legends(figure)

    def drawn(format: str, **metadata: str | None) -> bytes:
        target = io.BytesIO()
        figure.savefig(target, format=format, metadata=metadata, bbox_inches=box)
        return target.getvalue()

    svg = folder / f"{name}.svg"
    write_text(svg, _hints(figure).into(drawn("svg", Date=None, Creator="kick").decode("utf-8"), box))
    for patch in _hints(figure).unseen:
        patch.set_visible(False)
    write_bytes(folder / f"{name}.png", drawn("png", Software="kick"))
    write_bytes(folder / f"{name}.pdf", drawn("pdf", Creator="kick", CreationDate=None))
    plt.close(figure)
    return Drawn(name, planned.title, caption, svg, box.width)


def _keep_places_of_legends(figure: Figure) -> None:
    """Let a legend stay where the first layout put it: the search for the best place takes longer than the drawing."""
    for axes in figure.axes:
        found = axes.get_legend()
        if found is not None and (within := found.get_bbox_to_anchor()).width:  # not hung on a point
            box = found.get_window_extent()
            found.set_loc(((box.x0 - within.x0) / within.width, (box.y0 - within.y0) / within.height))


# Values on hover: a browser shows the <title> of what the pointer is over


def hint(axes: Axes, x: float, y: float, text: str) -> None:
    """Let `text` show where the pointer is over (x, y), in the axes' data."""
    _hints(axes.figure).points.append((axes, x, y, text))


def hint_patch(patch: Any, text: str, unseen: bool = False) -> None:
    """Let `text` show where the pointer is over a bar or a cell. unseen: it is there for nothing else."""
    own = _hints(patch.figure)
    patch.set_gid(f"hint-{len(own.patches)}")
    own.patches[patch.get_gid()] = text
    if unseen:
        patch.set_in_layout(False)
        own.unseen.append(patch)


@dataclass
class _Hints:
    """What a figure says on hover."""

    points: list[tuple[Axes, float, float, str]] = field(default_factory=list)
    patches: dict[str, str] = field(default_factory=dict)  # by the id of the patch
    unseen: list[Any] = field(default_factory=list)  # patches that are there for nothing else

    def into(self, svg: str, box: BboxBase) -> str:
        """The drawing with its texts. box: the part of the figure that it shows, in inches.

        Points get invisible discs that matplotlib never sees: as artists, a thousand of them would take longer than
        all else that is drawn.
        """
        svg = re.sub(r'<g id="(hint-\d+)">', lambda match: match[0] + _title(self.patches[match[1]]), svg)
        discs = "".join(f"{_disc(*point, box)}\n" for point in self.points)
        return svg.replace("</svg>", f'<g fill-opacity="0">\n{discs}</g>\n</svg>') if discs else svg


def _disc(axes: Axes, x: float, y: float, text: str, box: BboxBase) -> str:
    """A disc of 11 points around (x, y), in the points of an SVG, whose y runs down."""
    right, up = axes.transData.transform((x, y)) / axes.figure.dpi
    across, down = 72 * (right - box.x0), 72 * (box.y1 - up)
    return f'<circle cx="{across:.1f}" cy="{down:.1f}" r="5.5">{_title(text)}</circle>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _hints(figure: Any) -> _Hints:
    if not hasattr(figure, "hints"):
        figure.hints = _Hints()
    return figure.hints


# Words


def interval_in_words(score: float, interval: Interval, percent: bool = False) -> str:
    """`41.2 % [38.0, 44.5]`, or plain numbers."""
    if percent:
        return f"{100 * score:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    return f"{score:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


# Parts of axes


def method_style(results: Results, method: str) -> dict[str, Any]:
    """One colour, marker and dash for each method."""
    return nth_style(results.methods.index(method))


def nth_style(place: int) -> dict[str, Any]:
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place % len(DASHES)],
    }


def label_points(axes: Axes, points: Sequence[tuple[float, float, str]], size: float = 7.5) -> None:
    """Name each (x, y) beside it, within the axes, where no other name or point is; called when these have limits."""
    inside = tuple(axes.bbox.extents)
    places: Any = axes.transData.transform([(x, y) for x, y, _ in points]) if points else []
    scale = axes.figure.dpi / 72
    taken = [(px - 4 * scale, py - 4 * scale, px + 4 * scale, py + 4 * scale) for px, py in places]
    for (x, y, text), (px, py) in zip(points, places, strict=True):
        width, height = 0.62 * size * len(text) * scale, 1.1 * size * scale
        boxes = {}
        for right, up in _AROUND:
            left = px + right * scale if right > 0 else px + right * scale - width
            low = py + up * scale
            boxes[right, up] = (left, low, left + width, low + height)
        right, up = min(  # all are of one size: the less of it lies inside, the more lies outside
            boxes,
            key=lambda side: sum(_overlap(boxes[side], other) for other in taken) - _overlap(boxes[side], inside),
        )
        taken.append(boxes[right, up])
        axes.annotate(
            text, (x, y), xytext=(right, up), textcoords="offset points", fontsize=size,
            ha="left" if right > 0 else "right", va="bottom",
        )  # fmt: skip


_AROUND = tuple((right, up) for up in (3, -10, 11, -18, 19, -26) for right in (5, -5))  # points of paper, best first


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes (left, low, right, high) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def label_lines(axes: Axes, lines: dict[str, float]) -> None:
    """Name horizontal lines, to the right of the axes where no curve runs, none over another. Once limits are set."""
    names = sorted(lines, key=lines.__getitem__)
    points_a_pixel = 72 / axes.figure.dpi
    own = [axes.transData.transform((0, lines[name]))[1] * points_a_pixel for name in names]
    wanted = np.array([0.0] * len(own))
    for index, height in enumerate(own):
        wanted[index] = height if index == 0 else max(height, wanted[index - 1] + _LINE_HEIGHT)
    moved = wanted - own
    for start, end in _runs(wanted):  # what pushed each other apart is centred where it would have been
        moved[start:end] -= moved[start:end].mean()
    for name, move in zip(names, moved, strict=True):
        axes.annotate(
            name, (1.0, lines[name]), xycoords=("axes fraction", "data"), xytext=(4, move), textcoords="offset points",
            ha="left", va="center", fontsize=8, color="0.3", annotation_clip=False,
        )  # fmt: skip


def _runs(heights: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches of ascending heights that are a line's height apart."""
    start = 0
    for index in range(1, len(heights) + 1):
        if index == len(heights) or heights[index] - heights[index - 1] > _LINE_HEIGHT * 1.001:
            yield start, index
            start = index


def logarithmic(axes: Axes, which: Literal["x", "y"], form: str) -> None:
    """Make an axis logarithmic, with ticks at 1, 2 and 5, over many decades at 1 alone, in `form`. Once all is drawn.

    Matplotlib's own ticks would be formulas, which are not drawn as such here.
    """
    axes.set(**{f"{which}scale": "log"})
    axis: Any = getattr(axes, f"{which}axis")
    low, high = sorted(axis.get_view_interval())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format(value, form)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high < _MANY_DECADES * low else (1,)))


def bars(values: Any, low: Any, high: Any) -> np.ndarray:
    """Intervals as matplotlib wants them: how far they reach below and above [2, n]; one that is not known is none."""
    reach = np.atleast_2d(np.stack([np.subtract(values, low), np.subtract(high, values)]).T).T
    return np.nan_to_num(np.maximum(reach, 0.0), posinf=0.0)


def scale_of(metric: Metric) -> float:
    """Shares are drawn in percent."""
    return 100.0 if metric.unit.startswith("share") else 1.0


def name_of(metric: Metric) -> str:
    """For an axis, with its unit."""
    unit = "%" if scale_of(metric) == 100 else metric.unit
    return metric.name.replace("_", " ") + (f" ({unit})" if unit else "")


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11)


MOST_SETTINGS = 48
"""So many stand side by side in a figure that can be read."""


def shown_settings(settings: Sequence[SettingResult]) -> tuple[list[SettingResult], str]:
    """Those that a figure has room for, and what its caption says of the others."""
    if len(settings) <= MOST_SETTINGS:
        return list(settings), ""
    return list(settings[:MOST_SETTINGS]), f" The first {MOST_SETTINGS} of {len(settings)} settings."


def legend(axes: Axes, count: int) -> None:
    """Inside the axes while it is short; below them where it would cover the curves; none of nothing."""
    if not axes.get_legend_handles_labels()[0]:
        return
    if count > 5:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4, fontsize=8)
    else:
        axes.legend(loc="best", fontsize=9)
