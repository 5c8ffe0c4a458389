"""The figures of a report: which ones a run supports, drawn as SVG, PNG and PDF.

Each module plans its figures from the results; nothing is drawn before it is chosen. The same results give the same
bytes.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from kick.errors import ConfigError
from kick.files import stop_if_full
from kick.report.figures import answers, curves, groups, retained, studies, training
from kick.report.figures.style import Drawn, Planned, file_name, in_style, save
from kick.report.results import Results

_ROOMS = (retained, curves, studies, groups, answers, training)  # in the order in which a report shows them


def planned(results: Results) -> list[Planned]:
    """Every figure that the results support. Of several of one name the later ones are numbered: names are files."""
    found = [figure for room in _ROOMS for figure in room.planned(results)]
    seen: Counter[str] = Counter()
    for place, figure in enumerate(found):
        seen[figure.name] += 1
        if seen[figure.name] > 1:
            found[place] = replace(figure, name=f"{figure.name}-{seen[figure.name]}")
    return found


def choose(results: Results, patterns: Sequence[str] = ("*",)) -> list[Planned]:
    """The figures whose names fit one of `patterns` (globs). Raises ConfigError if none fits one."""
    everything = planned(results)
    for pattern in patterns:
        if pattern != "*" and not any(fnmatchcase(figure.name, pattern) for figure in everything):
            names = ", ".join(figure.name for figure in everything) or "none"
            raise ConfigError(f"no figure fits '{pattern}'.", f"This run has: {names}.")
    return [figure for figure in everything if any(fnmatchcase(figure.name, pattern) for pattern in patterns)]


def draw(figures: Sequence[Planned], folder: Path) -> list[Drawn]:
    """All of `figures`, into `folder`. One that cannot be drawn is left out, and said: it costs no other."""
    if figures:
        folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with in_style():
        for figure in figures:
            try:
                drawn.append(save(folder, figure))
            except Exception as error:  # of drawing, which may fail at anything that results hold
                stop_if_full(error)
                for kind in ("svg", "png", "pdf"):  # of another state of the run
                    (folder / f"{file_name(figure)}.{kind}").unlink(missing_ok=True)
                print(f"kick: the figure {figure.name} is not drawn: {type(error).__name__}: {error}", file=sys.stderr)
    return drawn
