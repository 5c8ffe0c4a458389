"""Levels and settings: how far a model is compressed, and by what. Parsed, printed and hashed here.

A setting is written `compressor@level`: `magnitude@0.5`, `wanda@2:4`, `gptq@4`, `sheared@1.3B`; the model as it came is
`dense`.
"""

import hashlib
import json
import re
from enum import Flag, auto
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kick.errors import LevelError

DENSE = "dense"


class Knob(Flag):
    """Which kinds of level a compressor takes."""

    NONE = 0
    SPARSITY = auto()
    PATTERN = auto()
    BITS = auto()
    SHAPE = auto()


class Spec(BaseModel):
    """A frozen description; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


Level = Sparsity | Pattern | Bits | Shape

_EXAMPLES = {
    Knob.SPARSITY: "a sparsity between 0 and 1, for example 0.5",
    Knob.PATTERN: "an N:M pattern, for example 2:4",
    Knob.BITS: "a whole number of bits from 1 to 16, for example 4",
    Knob.SHAPE: "the name of a target shape",
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
        raise LevelError("a compressor without a level.", wanted)
    pattern = re.fullmatch(r"(\d+):(\d+)", text)
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text)
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
    if Knob.SHAPE in knob and not number and not pattern:
        return Shape(name=text)
    raise LevelError(f"level '{text}' is not one that this compressor takes.", wanted)


def _pattern(keep: int, of: int) -> Pattern:
    if not 0 < keep < of:
        raise LevelError(
            f"level '{keep}:{of}' keeps {keep} of every {of} weights.",
            "An N:M pattern keeps N of M with 0 < N < M, for example wanda@2:4.",
        )
    return Pattern(keep=keep, of=of)


def split_setting(text: str) -> tuple[str, str]:
    """`wanda@0.5` -> (`wanda`, `0.5`); a compressor without a level gives an empty second part."""
    compressor, _, level = text.strip().partition("@")
    if not compressor or "@" in level:
        raise LevelError(f"'{text}' is not a setting.", "Write compressor@level, for example wanda@0.5, or dense.")
    return compressor, level


class Setting(Spec):
    """Compressor, level, parameters and seed: one column of every comparison."""

    compressor: str
    level: str = ""
    params: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    label: str = ""

    @property
    def name(self) -> str:
        """How results call it: the label if one was given, else `compressor@level`."""
        return self.label or (f"{self.compressor}@{self.level}" if self.level else self.compressor)

    @property
    def is_dense(self) -> bool:
        return self.compressor == DENSE


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON: the identity of everything that kick stores."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
