"""Settings: what a model is compressed by, and how far. Parsed, printed and hashed here.

A setting is written `compressor@level`: `magnitude@0.5`, `wanda@2:4`, `gptq@4`, `sheared@1.3B`. Stages are chained with
`>`: `wanda@0.5 > gptq@4`. The model as it came is `dense`.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
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
            words = "".join(f" {re.escape(_word(key))}=.*" for key in self.variation)
            name = re.sub(f"(.*?){words}", r"\1", name)
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


def variation_in_words(variation: Mapping[str, Any], among: Mapping[str, Sequence[Any]] | None = None) -> str:
    """`samples=32 source=c4`: short enough for a table.

    Of a path its last part without suffixes, or as many as tell it from the other values of its key, those `among`.

    >>> paths = ["/data/c4/train.jsonl", "/data/wiki/train.jsonl"]
    >>> [variation_in_words({"calibration.source": path}, {"calibration.source": paths}) for path in paths]
    ['source=c4/train', 'source=wiki/train']
    """
    among = among or {}
    return " ".join(f"{_word(key)}={_short(value, among.get(key, ()))}" for key, value in variation.items())


def _word(key: str) -> str:
    return key.rpartition(".")[2]


def _short(value: Any, others: Sequence[Any]) -> str:
    if not _is_path(value):
        return str(value)
    paths = [Path(other) for other in others if _is_path(other)]
    for count in range(1, max(2, len(Path(value).parts))):
        own, *found = (_last(path, count) for path in (Path(value), *paths))
        if found.count(own) <= others.count(value):
            return own
    return str(value)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "/" in value


def _last(path: Path, count: int) -> str:
    """The last `count` parts of a path, without suffixes."""
    return "/".join([*path.parts[-count:-1], path.name.partition(".")[0]])


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON: the identity of everything that kick stores."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
