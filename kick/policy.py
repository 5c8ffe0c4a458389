"""Layer policies: which linear is compressed how far, when that is not the same for all.

In a sweep file, for any compressor that works linear by linear:

    - compressor: wanda
      levels: [0.5]
      layers:                              # a later rule overrides an earlier one
        - {first: 2, skip: true}           # the first two blocks stay dense
        - {last: 1, level: 0.3}
        - {match: "*.down_proj", level: 0.4}
        - {match: lm_head, level: 0.2}     # without a rule of its own the head stays dense
      allocation: {rule: owl}              # sparsities by each block's share of outliers

A glob is matched against a linear's full name, its name inside the block, and the last part of its name.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from kick.errors import LevelError
from kick.levels import Level, LevelText, Sparsity
from kick.spec import Spec

if TYPE_CHECKING:
    from kick.blocks import Block, Decoder, Linear


class LayerRule(Spec):
    """Linears by place (`first`, `last`: that many blocks) or by name (`match`: a glob), and what becomes of them."""

    first: int | None = Field(default=None, ge=1)
    last: int | None = Field(default=None, ge=1)
    match: str | None = None
    level: LevelText | None = None
    skip: bool = False

    @model_validator(mode="after")
    def _complete(self) -> "LayerRule":
        if sum(place is not None for place in (self.first, self.last, self.match)) != 1:
            raise ValueError("a layer rule has exactly one of first, last and match")
        if self.skip == (self.level is not None):
            raise ValueError("a layer rule has either a level, or skip: true")
        return self

    def covers(self, block: "Block", index: int, blocks: int, linear: "Linear") -> bool:
        if self.first is not None:
            return index < self.first
        if self.last is not None:
            return index >= blocks - self.last
        assert self.match is not None
        inside = linear.name.removeprefix(block.name + ".")
        names = (linear.name, inside, linear.name.rpartition(".")[2])
        return any(fnmatchcase(name, self.match) for name in names)


class OWL(Spec):
    """Sparsity of a block by its share of outliers: the more, the less is pruned.

    Yin et al., "Outlier Weighed Layerwise Sparsity", arXiv 2310.05175. A weight is an outlier if |W_ij| ||X_j|| exceeds
    `outlier` times the mean of its block. The blocks' outlier shares are scaled to a span of 2 * `spread` and centred,
    so that the mean sparsity of the linears that no rule covers is the one asked for, and none differs from it by more
    than 2 * `spread`.
    """

    rule: Literal["owl"] = "owl"
    outlier: float = Field(default=5.0, gt=0)
    spread: float = Field(default=0.08, gt=0, lt=0.5)


class Policy(Spec):
    """Rules for layers, and how a sparsity is allocated to the blocks. The default: the same for every linear."""

    layers: tuple[LayerRule, ...] = ()
    allocation: OWL | None = None

    @property
    def is_uniform(self) -> bool:
        return not self.layers and self.allocation is None

    def asked_levels(self) -> list[str]:
        """Those that the rules name."""
        return [rule.level for rule in self.layers if rule.level is not None]

    def check(self, level: Level | None) -> None:
        """Raise LevelError if the level cannot be allocated."""
        if self.allocation is not None and not isinstance(level, Sparsity):
            raise LevelError(f"allocation by outliers with level '{level}'.", "It distributes a sparsity.")

    def assign(
        self,
        decoder: "Decoder",
        level: Level | None,
        parse: Callable[[str], Level | None],
        outliers: "Callable[[OWL], list[float]]",
    ) -> "dict[Linear, Level | None]":
        """The level of each linear, None for one that is skipped. `outliers` gives each block's share.

        Raises LevelError for a rule that covers no linear.
        """
        ruled = [(rule, self._covered(rule, decoder)) for rule in self.layers]
        by_block: list[Level | None] = [level] * len(decoder.blocks)
        if self.allocation is not None:
            self.check(level)
            assert isinstance(level, Sparsity)
            free = set(decoder.linears) - {linear for _, covered in ruled for linear in covered}
            sizes = [
                sum(linear.weight.numel() for linear in block.linears if linear in free) for block in decoder.blocks
            ]
            shares = allocate(outliers(self.allocation), sizes, level.fraction, self.allocation.spread)
            by_block = [Sparsity(fraction=share) for share in shares]
        levels = {linear: by_block[index] for index, block in enumerate(decoder.blocks) for linear in block.linears}
        if decoder.head is not None:
            levels[decoder.head] = None
        for rule, covered in ruled:
            if not covered:
                names = ", ".join(linear.name for linear in decoder.blocks[0].linears)
                raise LevelError(f"the layer rule '{rule.match}' matches no linear.", f"A block holds {names}.")
            levels.update(dict.fromkeys(covered, None if rule.skip else parse(rule.level or "")))
        if decoder.head is not None and decoder.head_is_tied and levels[decoder.head] is not None:
            raise LevelError(
                f"a layer rule gives a level to {decoder.head.name}, whose weight is that of the embeddings.",
                "Only a head with a weight of its own can be compressed.",
            )
        return levels

    @staticmethod
    def _covered(rule: LayerRule, decoder: "Decoder") -> "list[Linear]":
        head = decoder.head
        return [
            linear
            for index, block in enumerate(decoder.blocks)
            for linear in block.linears
            if rule.covers(block, index, len(decoder.blocks), linear)
        ] + ([head] if head is not None and rule.match == head.name else [])  # by name alone: '*' means the blocks


def allocate(outliers: list[float], sizes: list[int], sparsity: float, spread: float) -> list[float]:
    """Sparsity of each block: falls linearly with its outlier share and spans 2 * `spread`. Its mean is as asked.

    >>> allocate([0.0, 1.0], [10, 10], 0.5, 0.1)
    [0.6, 0.4]
    """
    low, high = min(outliers), max(outliers)
    if high == low:
        return [sparsity] * len(outliers)
    kept = [2 * spread * (share - low) / (high - low) for share in outliers]
    mean = sum(part * size for part, size in zip(kept, sizes, strict=True)) / max(1, sum(sizes))
    found = [sparsity - part + mean for part in kept]
    if not all(0 < share < 1 for share in found):
        raise LevelError(
            f"a mean sparsity of {sparsity:g} with a spread of {spread:g} asks a block for {max(found):.3f}.",
            "Choose a smaller spread, or another sparsity.",
        )
    return found
