"""Levels: how far a model is compressed. Parsed and printed here: `0.5`, `2:4`, `4`, `0.5+4bit`, `1.3B`."""

import re
from enum import Flag, auto
from typing import Annotated, Any

from pydantic import BeforeValidator

from kick.errors import LevelError
from kick.spec import Spec

USUAL_LEVELS = {
    "sparsities": tuple(f"{tenth / 10:g}" for tenth in range(1, 8)),
    "patterns": ("2:4", "4:8"),
    "bits": ("8", "4", "3", "2"),
}
"""What the field reports, by name: sparsities from 10 to 70 %, the patterns that hardware runs, bits a weight."""


class Knob(Flag):
    """Which kinds of level a compressor takes."""

    NONE = 0
    SPARSITY = auto()
    PATTERN = auto()
    BITS = auto()
    SHAPE = auto()
    JOINT = auto()


class Sparsity(Spec):
    """A share of weights that become zero, 0 < fraction < 1."""

    fraction: float

    def __str__(self) -> str:
        return f"{self.fraction:g}"


class Pattern(Spec):
    """N:M: of every `of` neighbours along the input dimension, `keep` stay."""

    keep: int
    of: int

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


class Bits(Spec):
    """Bits that a quantised weight takes."""

    width: int

    def __str__(self) -> str:
        return str(self.width)


class Shape(Spec):
    """A target architecture by name."""

    name: str

    def __str__(self) -> str:
        return self.name


class Joint(Spec):
    """Pruned and quantised in one pass."""

    prune: Sparsity | Pattern
    bits: Bits

    def __str__(self) -> str:
        return f"{self.prune}+{self.bits}bit"


Level = Sparsity | Pattern | Bits | Shape | Joint
ANY_KNOB = Knob.SPARSITY | Knob.PATTERN | Knob.BITS | Knob.SHAPE | Knob.JOINT

_NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"


def pruning(level: Level | None) -> Level | None:
    """What of a level says how much is pruned: itself, but for one that quantises, too."""
    return level.prune if isinstance(level, Joint) else level


def as_written(level: Any) -> Any:
    """A level as names have it: `0.50`, `.5` and the number 0.5 are all `0.5`. What is no level stays as it is."""
    if isinstance(level, int | float) and not isinstance(level, bool):
        return repr(level)
    if not isinstance(level, str):
        return level
    share, plus, bits = level.strip().partition("+")
    is_share = re.fullmatch(_NUMBER, share) and not share.isdigit()
    return (repr(float(share)) if is_share else share) + plus + bits


LevelText = Annotated[str, BeforeValidator(as_written)]
"""A level as it is written; in YAML it may be a plain number."""

_EXAMPLES = {
    Knob.SPARSITY: "a sparsity between 0 and 1, for example 0.5",
    Knob.PATTERN: "an N:M pattern, for example 2:4",
    Knob.BITS: "a whole number of bits from 1 to 16, for example 4",
    Knob.SHAPE: "the name of a target shape",
    Knob.JOINT: "a sparsity or pattern with bits, for example 0.5+4bit",
}


def parse_level(text: str, knob: Knob) -> Level | None:
    """The level written as `text`, for a compressor that takes `knob`. None for a compressor without levels.

    Raises LevelError for a level that is malformed, out of range, or of a kind that the compressor does not take.
    """
    text = text.strip()
    if knob == Knob.NONE:
        if text:
            raise LevelError(
                f"level '{text}' given to a compressor that takes none.", "Leave out '@' and what follows."
            )
        return None
    wanted = "Expected " + " or ".join(_EXAMPLES[kind] for kind in Knob if kind & knob) + "."
    if not text:
        raise LevelError("no level was given.", wanted)
    joint = re.fullmatch(r"([^+]+)\+(\d+)bit", text)
    if joint and Knob.JOINT in knob:
        prune, bits = parse_level(joint[1], Knob.SPARSITY | Knob.PATTERN), parse_level(joint[2], Knob.BITS)
        assert isinstance(prune, Sparsity | Pattern)
        assert isinstance(bits, Bits)
        return Joint(prune=prune, bits=bits)
    pattern = re.fullmatch(r"(\d+):(\d+)", text)
    number = re.fullmatch(_NUMBER, text)
    if pattern and Knob.PATTERN in knob:
        return _pattern(int(pattern[1]), int(pattern[2]))
    if not pattern and ":" in text and re.search(r"\d:\d", text) and re.search(r"\d*\.\d", text):
        raise LevelError(
            f"level '{text}' gives a sparsity together with a pattern.",
            "A pattern fixes the sparsity (2:4 is 50 %): give one of the two.",
        )
    if number and Knob.BITS in knob and re.fullmatch(r"\d+", text):
        if not 1 <= int(text) <= 16:
            raise LevelError(f"level '{text}' is not a usable number of bits.", wanted)
        return Bits(width=int(text))
    if number and Knob.SPARSITY in knob:
        fraction = float(text)
        if not 0 < fraction < 1:
            raise LevelError(f"level '{text}' is not between 0 and 1.", wanted + " The uncompressed model is 'dense'.")
        return Sparsity(fraction=fraction)
    if Knob.SHAPE in knob and not number and not pattern and not joint:
        return Shape(name=text)
    raise LevelError(f"level '{text}' is not one that this compressor takes.", wanted)


def parse_pattern(text: str) -> Pattern:
    """The pattern written as `text`, where nothing else will do. Raises LevelError."""
    pattern = parse_level(text, Knob.PATTERN)
    assert isinstance(pattern, Pattern)
    return pattern


def _pattern(keep: int, of: int) -> Pattern:
    if not 0 < keep < of:
        raise LevelError(
            f"level '{keep}:{of}' keeps {keep} of every {of} weights.",
            "An N:M pattern keeps N of M with 0 < N < M, for example wanda@2:4.",
        )
    return Pattern(keep=keep, of=of)
