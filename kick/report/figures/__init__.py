"""The figures of a report: which ones a run supports, drawn as SVG, PNG and PDF.

Each module plans its figures from the results; nothing is drawn before it is chosen. The same results give the same
bytes.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from kick.errors import ConfigError
from kick.report.figures import answers, curves, groups, retained, studies, training
from kick.report.figures.style import Drawn, Planned, in_style, save
from kick.report.results import Results

_ROOMS = (retained, curves, studies, groups, answers, training)  # in the order in which a report shows them


def planned(results: Results) -> list[Planned]:
    """Every figure that the results support."""
    return [figure for room in _ROOMS for figure in room.planned(results)]


def draw_all(results: Results, folder: Path, patterns: Sequence[str] = ("*",)) -> list[Drawn]:
    """The figures whose names fit one of `patterns` (globs), into `folder`. Raises ConfigError if none fits one."""
    everything = planned(results)
    for pattern in patterns:
        if pattern != "*" and not any(fnmatchcase(figure.name, pattern) for figure in everything):
            names = ", ".join(figure.name for figure in everything) or "none"
            raise ConfigError(f"no figure fits '{pattern}'.", f"This run has: {names}.")
    chosen = [figure for figure in everything if any(fnmatchcase(figure.name, pattern) for pattern in patterns)]
    return draw(chosen, folder)


def draw(figures: Sequence[Planned], folder: Path) -> list[Drawn]:
    """All of `figures`, into `folder`."""
    if figures:
        folder.mkdir(parents=True, exist_ok=True)
    with in_style():
        return [save(folder, figure) for figure in figures]
