"""SparseGPT: prune column by column and let the remaining weights make up for what was removed.

    kick compress MODEL sparsegpt@0.5 --out DIR     sparsegpt@2:4     sparsegpt@0.5+4bit (pruned and quantised at once)

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774. The
weights with the smallest w^2 / [H^-1]_jj go, chosen in each block of 128 columns of a matrix, or among M neighbours.
"""

import torch
from pydantic import Field
from torch import Tensor

from kick.compressor import Knob
from kick.errors import LevelError
from kick.levels import Joint, Level, Pattern, Sparsity
from kick.quantization import Quantized

from .masks import keep_count, keep_largest
from .obs import Rounding, solve
from .rounding import GroupSize, check_bits
from .second_order import SecondOrderCompressor, stack, unstack
from .statistics import Hessian


class SparseGPT(SecondOrderCompressor):
    name = "sparsegpt"
    knob = Knob.SPARSITY | Knob.PATTERN | Knob.JOINT

    class Params(SecondOrderCompressor.Params):
        group_size: GroupSize = Field(default=128, description="when quantised too: columns with one scale; -1: all")
        symmetric: bool = Field(default=False, description="when quantised too: zero is the middle code")

    def check_level(self, level: Level) -> None:
        if isinstance(level, Joint):
            check_bits(level.bits)
            group = self.params.group_size
            if isinstance(level.prune, Pattern) and group != -1 and group % level.prune.of:
                raise LevelError(
                    f"groups of {group} columns hold no whole number of {level.prune.of} neighbours.",
                    "Choose a group_size that M divides.",
                )

    def solve_group(self, weights: list[Tensor], statistic: Hessian, level: Level) -> list[Tensor | Quantized]:
        """Matrices [out, in] that share an input: one solver call, but each reaches the level by itself."""
        factor = self.factor(statistic)
        prune, rounding = level, None
        if isinstance(level, Joint):
            prune = level.prune
            rounding = Rounding(level.bits.width, self.params.symmetric, self.params.group_size)
        assert isinstance(prune, Sparsity | Pattern)
        chooser = _Largest(prune, [len(weight) for weight in weights])
        solution = solve(stack(weights, factor.dead), factor.upper, choose=chooser, rounding=rounding)
        return unstack(solution, rounding, weights)


class _Largest:
    """Lets the highest scores of each matrix stay. `rows`: how many rows of the stack belong to each."""

    def __init__(self, level: Sparsity | Pattern, rows: list[int]) -> None:
        self.level = level
        self.rows = rows
        self.width = level.of if isinstance(level, Pattern) else None

    def __call__(self, score: Tensor, start: int) -> Tensor:
        """score [columns, rows of the stack]"""
        if isinstance(self.level, Pattern):
            return keep_largest(score.T, self.level, dim="row").T
        end = start + len(score)
        stay = []
        for part in score.split(self.rows, dim=1):
            # rounded over all columns up to here, so that the matrix as a whole loses exactly what was asked
            removed = [round(self.level.fraction * part.shape[1] * column) for column in (start, end)]
            stay.append(keep_count(part.reshape(1, -1), part.numel() - (removed[1] - removed[0])).reshape(part.shape))
        return torch.cat(stay, dim=1)
