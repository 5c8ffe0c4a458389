"""Settings: what a model is compressed by, and how far. Parsed, printed and hashed here.

A setting is written `compressor@level`: `magnitude@0.5`, `wanda@2:4`, `gptq@4`, `sheared@1.3B`. Stages are chained with
`>`: `wanda@0.5 > gptq@4`. The model as it came is `dense`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from kick.calibration import CalibrationSpec
from kick.errors import LevelError
from kick.levels import LevelText
from kick.lm.spec import LMSpec
from kick.policy import Policy
from kick.spec import Seed, Spec

DENSE = "dense"
CHAIN = " > "


class Stage(Policy):
    """One compressor at one level, with its parameters and its layer policy."""

    compressor: str
    level: LevelText = ""
    params: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: object) -> object:
        if isinstance(given, str):
            compressor, level = split_stage(given)
            return {"compressor": compressor, "level": level}
        return given

    def __str__(self) -> str:
        return f"{self.compressor}@{self.level}" if self.level else self.compressor


class Variant(Spec):
    """Another way to ask the dense model, as parameters of `dense`: what comes out different is noise."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    lm: LMSpec | None = None


class Setting(Stage):
    """A stage, those that come after it, and the seed of all: one column of every comparison.

    calibration: instead of the sweep's. variation: where a grid varies something besides levels and seeds, what and to
    what, as it stands in the name.
    """

    then: tuple[Stage, ...] = ()
    seed: Seed = 0
    label: str = ""
    calibration: CalibrationSpec | None = None
    variation: dict[str, Any] = Field(default_factory=dict)

    @property
    def stages(self) -> tuple[Stage, ...]:
        first = Stage(**{key: getattr(self, key) for key in Stage.model_fields})
        return (first, *self.then)

    @property
    def name(self) -> str:
        """How results call it: the label if one was given, else `compressor@level`, chained."""
        return self.label or CHAIN.join(map(str, self.stages))

    @property
    def compressors(self) -> str:
        """`wanda`, or chained `wanda > gptq`."""
        return CHAIN.join(stage.compressor for stage in self.stages)

    @property
    def levels(self) -> str:
        """`0.5`, or chained `0.5 > 4`; of stages without a level nothing."""
        return CHAIN.join(stage.level for stage in self.stages if stage.level)

    @property
    def method(self) -> str:
        """The name without level, variation and seed: what is one method in tables and figures."""
        name = self.label.removesuffix(f"#{self.seed}")
        if self.variation:
            name = name.removesuffix(f" {variation_in_words(self.variation)}")
        if name == CHAIN.join(map(str, self.stages)):
            return self.compressors
        return (name.removesuffix(f"@{self.level}") if self.level else name) or self.compressors

    @property
    def is_dense(self) -> bool:
        """Whether its weights are the model's own: `dense` itself, and variants of how it is asked."""
        return self.compressor == DENSE and not self.then

    @property
    def variant(self) -> Variant:
        """How it is asked where that is not how the others are. Raises pydantic's ValidationError."""
        return Variant(**self.params) if self.is_dense else Variant()


def parse_setting(text: str) -> Setting:
    """`wanda@0.5`, `dense`, or a chain: `wanda@0.5 > gptq@4`. Raises LevelError for anything else."""
    first, *rest = [split_stage(part) for part in text.split(CHAIN.strip())]
    then = tuple(Stage(compressor=compressor, level=level) for compressor, level in rest)
    return Setting(compressor=first[0], level=first[1], then=then)


def split_stage(text: str) -> tuple[str, str]:
    """`wanda@0.5` -> (`wanda`, `0.5`); a compressor without a level gives an empty second part."""
    compressor, _, level = text.strip().partition("@")
    if not compressor or "@" in level:
        raise LevelError(
            f"'{text.strip()}' is not a setting.",
            "Write compressor@level, for example wanda@0.5; a chain with '>'; or dense.",
        )
    return compressor, level


def variation_in_words(variation: dict[str, Any]) -> str:
    """`samples=32 source=c4`: short enough for a table; of a path its last part without suffixes."""
    return " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in variation.items())


def _short(value: Any) -> str:
    return Path(value).name.partition(".")[0] if isinstance(value, str) and "/" in value else str(value)


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON: the identity of everything that kick stores."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
