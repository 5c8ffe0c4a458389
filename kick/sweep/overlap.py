"""Calibration text that is also scored: what a compressor was fitted to is no test of it."""

from collections.abc import Iterable

WINDOW = 32
"""Words in a row that two texts do not share by chance."""


def shared_passage(calibration: Iterable[str], scored: Iterable[str]) -> str | None:
    """A passage of `WINDOW` words that stands in a text of both; any that is twice as long is found, else None."""
    windows = {
        hash(" ".join(words[start : start + WINDOW]))
        for words in map(str.split, calibration)
        for start in range(len(words) - WINDOW + 1)
    }
    for words in map(str.split, scored):
        for start in range(0, len(words) - WINDOW + 1, WINDOW):
            passage = " ".join(words[start : start + WINDOW])
            if hash(passage) in windows:
                return passage
    return None
